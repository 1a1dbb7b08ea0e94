"""One load, from a selector to installed state.

`restoring` (which checkpoint), `load` (ours), `foreign` (other tools'), `translation` (names that differ),
`installing` (into the live objects).
"""
