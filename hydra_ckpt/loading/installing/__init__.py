"""Gives live objects what was read, and finds out whether they have it."""
