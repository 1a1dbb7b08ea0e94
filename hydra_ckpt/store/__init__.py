"""The checkpoint directory and its promises: names, manifest, draft to checkpoint, pointers, lease, retention."""
