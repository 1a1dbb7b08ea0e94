"""What Hydra imports at the start of every application in the environment, ours or not.

It must be quick, must not import torch, and must never fail with anything but ImportError: Hydra turns that one into a
warning, everything else ends the application of somebody who may not even use this package.
"""

try:
    from hydra_ckpt.registry import HydraCkptSearchPath, offer

    offer()
except ImportError:
    raise
except Exception as error:
    raise ImportError(f"hydra_ckpt could not offer its options: {error!r}") from error

__all__ = ["HydraCkptSearchPath"]
