"""What a device asks of the code that drives it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def reads_are_free(device: torch.device) -> bool:
    """Whether a number of this device can be read at any time.

    On an accelerator a read waits until all work that was given to it is done, and leaves it idle until more comes. A
    step that does not log reads nothing there.
    """
    return device.type == "cpu"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


class HostCopy:
    """Tensors on their way to the host. The copy is queued behind what made them, and nothing waits until `read`.

    Args:
        tensors: Tensors of one device, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies: dict[str, Tensor] = {}
        self._done: torch.cuda.Event | None = None
        device = None
        for name, tensor in tensors.items():
            kind = tensor.device.type
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=kind == "cuda")
            # Elsewhere memory cannot be pinned, and nothing says when such a copy is there.
            self._copies[name] = copy.copy_(tensor.detach(), non_blocking=kind in ("cpu", "cuda"))
            device = tensor.device if kind == "cuda" else device
        if device is not None:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))

    @classmethod
    def here(cls, tensors: Mapping[str, Tensor]) -> "HostCopy":
        """Tensors as they are, on the host already, or for a reader that may wait."""
        found = cls({})
        found._copies = dict(tensors)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_copies": self.read(), "_done": None}  # an event is of this process alone

    def read(self) -> dict[str, Tensor]:
        """The copies, as soon as they are there. A step after they were made that is no wait."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        return self._copies
