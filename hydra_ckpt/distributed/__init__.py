"""Communication between the ranks of a run; the only package that communicates.

A `Group` is created once, collectively. After that it no longer needs the training's process group: its own TCPStore,
hosted by rank 0, carries everything. Each thread uses a `Channel`; at every step, the training thread uses reductions
(`Vote`).

Example: a run of 4 ranks has one TCPStore, on rank 0, and on each rank two connections to it: channel `main` for the
training thread, `save` for the background thread. A message of one never waits for one of the other.
"""
