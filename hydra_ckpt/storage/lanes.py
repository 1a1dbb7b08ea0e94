"""The order of copies from accelerators to host memory. Untested on GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

# A target in host memory, and what is copied to it.
Pair = tuple[torch.Tensor, torch.Tensor]


class Lanes:
    """A separate stream for each device, on which copies run concurrently with the training thread's stream.

    `follow` and `lead` refer to the stream that is current in the calling thread, so the training thread calls them.

    Args:
        devices: The accelerators.
        module_of: Gives a device's module of PyTorch, such as `torch.cuda`.
    """

    def __init__(
        self, devices: Iterable[torch.device], module_of: Callable[[torch.device], Any] = torch.get_device_module
    ) -> None:
        self._modules = {device: module_of(device) for device in devices}
        self._streams = {device: module.Stream(device) for device, module in self._modules.items()}

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Lanes:
        """Those that copies of these tensors need; none for host memory, nor for devices without streams."""
        devices = {tensor.device for tensor in tensors}
        return cls(
            {
                device
                for device in devices
                if device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
            }
        )

    def follow(self) -> None:
        """Make copies from now on wait for the work queued so far. Does not wait itself."""
        for device, stream in self._streams.items():
            stream.wait_event(self._modules[device].current_stream(device).record_event())

    def lead(self) -> None:
        """Make work queued from now on wait for the copies made so far. Does not wait itself."""
        for device, stream in self._streams.items():
            self._modules[device].current_stream(device).wait_event(stream.record_event())

    def meet(self) -> None:
        """Wait until the work queued so far is done, so that other threads may read what it makes."""
        for device in self._streams:
            self._modules[device].current_stream(device).synchronize()

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Copy from anywhere. What comes from an accelerator is complete after `synchronize`.

        The sources must stay until then.
        """
        here = [(target, source) for target, source in pairs if source.device not in self._streams]
        for target, source in pairs:
            if source.device in self._streams:
                with self._modules[source.device].stream(self._streams[source.device]):
                    target.copy_(source, non_blocking=True)
        if here:
            # All in one call: while a training thread is busy, each return to the interpreter may wait for its lock.
            torch._foreach_copy_([target for target, _ in here], [source for _, source in here])

    def synchronize(self) -> None:
        """Return when all copies are complete."""
        for stream in self._streams.values():
            stream.synchronize()
