"""The ranks of a run talking to each other; nothing else in the package does.

A `Group` is made once, collectively, and then needs the training's process group no more: a TCPStore of its own,
hosted by rank 0, carries everything. Threads talk on a `Channel` of it; the training thread, which asks at every step,
by reductions (`Vote`).
"""
