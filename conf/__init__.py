"""The options this package adds to Hydra's search path, importable as ``hydra_ckpt.conf``."""
