"""The Hydra job around a run: its directory and configuration, agreed by all ranks before there is a process group."""
