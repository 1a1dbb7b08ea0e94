"""What is around a model: data-parallel, activation-checkpointing and compile wrappers, and names without them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.state.module_oracle import WRAPPERS, Passed, passed
from hydra_ckpt.state.optimizer_oracle import is_own_method


def canonical(name: Any) -> str:
    """The name of a tensor as its model has it, without what wrappers have put into it."""
    text = str(name)
    for wrapper in WRAPPERS:
        text = text.replace(wrapper, "")
    return text.removeprefix("module.")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside data-parallel, activation-checkpointing and compile wrappers."""
    while (inner := inside(module)) is not None:
        module = inner
    return module


def inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds; None if it is not a wrapper."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    inner: nn.Module | None = None
    if isinstance(module, DistributedDataParallel | DataParallel):
        inner = module.module
    elif isinstance(module, ActivationWrapper):
        inner = module._checkpoint_wrapped_module
    elif dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        inner = module._orig_mod
    elif not is_own_method(module, "state_dict", "torch.nn.modules.module"):
        if module not in _PASSED:
            _PASSED[module] = passed(module)
        inner = _PASSED[module].child
    return inner


def still_inside(module: nn.Module) -> bool:
    """Whether a wrapper still passes on what is inside it, as it did; if not, it is looked at again."""
    if module not in _PASSED or passed(module).is_as(_PASSED[module]):
        return True
    del _PASSED[module]
    return False


def adds_entries(module: nn.Module) -> bool:
    """Whether a wrapper of another library adds entries to what it passes on, at the last look."""
    return module in _PASSED and _PASSED[module].adds


def core_of(module: nn.Module) -> nn.Module:
    """The module that is asked for its state: the one inside all wrappers, or one that passes its state on.

    The latter may add entries of its own to it at any time.
    """
    core = module
    while (inner := inside(module)) is not None:
        core = inner if module not in _PASSED else core
        module = inner
    return core


# Wrappers of other libraries, with what they pass on as their own state. By identity: a module may overload `==`.
_PASSED: MutableMapping[nn.Module, Passed] = WeakIdKeyDictionary()


def refuse_fsdp1(modules: Iterable[nn.Module]) -> None:
    """Refuse FSDP version 1, whose flat parameters do not show which part of which tensor a rank holds.

    Raises:
        CheckpointConfigError: A module, or one in it, is wrapped in it. No `state_dict()` was called, because that
            would gather it.
    """
    for outer in modules:
        for name, module in outer.named_modules():
            if isinstance(module, FullyShardedDataParallel):
                raise CheckpointConfigError(
                    f"model{'.' if name else ''}{name} is a FullyShardedDataParallel (FSDP version 1), whose flat "
                    "parameters cannot be saved shard by shard. Use FSDP2: torch.distributed.fsdp.fully_shard(module) "
                    "instead of FullyShardedDataParallel(module); with accelerate FullyShardedDataParallelPlugin("
                    "fsdp_version=2), or fsdp_version: 2 in its configuration file"
                )
