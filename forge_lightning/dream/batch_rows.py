"""Convert any batch to named tensors with one entry per example, and back."""

from collections.abc import Container, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from forge_lightning.core.device import to_device


def rows_of(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, by name or by position in a tuple.

    Args:
        batch: A mapping or sequence of tensors ``(B, ...)``, or one tensor.

    Raises:
        ValueError: If the batch holds anything else, or tensors with different numbers of examples.
    """
    if isinstance(batch, Tensor):
        fields: dict[str, Any] = {"0": batch}
    elif isinstance(batch, Mapping):
        fields = {str(key): value for key, value in batch.items()}
    elif isinstance(batch, tuple | list):
        fields = {str(place): value for place, value in enumerate(batch)}
    else:
        raise ValueError(f"the batch is a {type(batch).__name__}, and must be a mapping or tuple of tensors.")
    for name, value in fields.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            kind = "a number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"entry {name!r} of the batch is {kind}; only tensors (B, ...) can be stored by example. Drop it in the"
                " loader's `collate_fn`, or in the module's `on_before_batch_transfer`."
            )
    if not fields:
        raise ValueError("the batch is empty.")
    sizes = {name: len(value) for name, value in fields.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the tensors of the batch differ in their number of examples: {sizes}.")
    return fields


def with_rows(batch: Any, rows: Mapping[str, Tensor]) -> Any:
    """A batch of the same type with these tensors."""
    if isinstance(batch, Tensor):
        return rows["0"]
    if isinstance(batch, Mapping):
        made = {key: rows[str(key)] for key in batch}
        if not isinstance(batch, dict):
            return type(batch)(made)  # type: ignore[call-arg]
        new = copy(batch)  # with attributes of a dict subclass
        new.update(made)
        return new
    values = [rows[str(place)] for place in range(len(batch))]
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)


def template_of(batch: Any) -> Any:
    """A batch of the same type without examples, for `with_rows`."""
    return with_rows(batch, {name: torch.empty(0) for name in rows_of(batch)})


def joined(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    pads: Mapping[str, float],
    sequences: Container[str],
    at_front: bool = False,
) -> dict[str, Tensor]:
    """Concatenate examples.

    Args:
        first: Tensors ``(B, ...)`` by name.
        second: Tensors of the same names.
        pads: Padding value of each sequence.
        sequences: Names of tensors whose examples may differ in length.
        at_front: Pad at the front instead of at the end.

    Raises:
        ValueError: If names differ, or lengths of tensors that are no sequences.
    """
    if set(first) != set(second):
        raise ValueError(f"the batch has {list(first)}, and stored examples have {list(second)}.")
    rows = {}
    for name, one in first.items():
        other = to_device(second[name].to(one.dtype), one.device)
        if one.ndim > 1 and one.shape[1] != other.shape[1]:
            if name not in sequences:
                raise ValueError(
                    f"{name!r} has length {one.shape[1]}, and stored examples {other.shape[1]}. Where lengths differ,"
                    " batches need a mask that is 0 at the padding."
                )
            width = max(one.shape[1], other.shape[1])
            one, other = (_widened(part, width, pads.get(name, 0), at_front) for part in (one, other))
        rows[name] = torch.cat([one, other])
    return rows


def _widened(rows: Tensor, width: int, pad: float, at_front: bool) -> Tensor:
    more = rows.new_full((len(rows), width - rows.shape[1], *rows.shape[2:]), pad)
    return torch.cat([more, rows] if at_front else [rows, more], 1)
