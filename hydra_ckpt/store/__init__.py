"""The checkpoint directory and its guarantees: names, manifest, draft to checkpoint, pointers, lease, retention."""
