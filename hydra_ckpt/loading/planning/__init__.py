"""Compares a checkpoint with the live objects: what to read, into what, and everything that does not match."""
