"""One load, from a selector to installed state.

`restoring` chooses the checkpoint, `load` conducts the rest: `sources` open it (ours, and other tools'), `planning`
compares it with the live objects, `reading` reads and verifies, `installing` gives the objects their state. `notes`
collects what the report will say.
"""
