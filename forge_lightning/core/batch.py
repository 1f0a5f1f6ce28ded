"""What a batch holds: its labels, its mask, its tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LABEL_NAMES = ("labels", "target", "targets", "label", "y")
"""Usual names of the labels in a batch, ours first."""


@dataclass(frozen=True)
class PositionFields:
    """What of a batch says which positions count; each ``(B, T)`` or absent."""

    mask: Tensor | None = None
    labels: Tensor | None = None
    tokens: Tensor | None = None


def field_of(batch: Any, key: str | int | None) -> Tensor | None:
    """A batch's tensor by key, attribute or position."""
    value: Any = None
    if isinstance(batch, Mapping):
        value = batch.get(key)
    elif isinstance(key, str):
        value = getattr(batch, key, None)
    elif isinstance(key, int) and isinstance(batch, Sequence) and -len(batch) <= key < len(batch):
        value = batch[key]
    return value if isinstance(value, Tensor) else None
