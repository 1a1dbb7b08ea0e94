"""Opens checkpoints for a load: ours, and those of other tools."""
