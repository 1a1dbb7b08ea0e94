"""`python -m hydra_ckpt.cli`, for environments without the console script."""

from __future__ import annotations

from hydra_ckpt.cli import main

if __name__ == "__main__":
    main()
