"""The activation in what a layer returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from forge_lightning.core.batch import PositionFields


def activation_of(output: Any, name: str, key: str | None = None) -> Tensor:
    """Return the activation in a layer's output: a tensor, the first of a tuple or list, or a mapping's entry.

    Raises:
        ValueError: If it holds none, naming the layer.
    """
    if isinstance(output, Mapping):
        output = output[key] if key in output else tuple(output.values())
    if isinstance(output, tuple | list):
        output = next((value for value in output if isinstance(value, Tensor)), None)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(
            f"Layer {name!r} returns {type(output).__name__}, which holds no activations. Name another layer, or"
            " the entry with `output_key`."
        )
    return output


def is_positions_first(x: Tensor, fields: PositionFields) -> bool:
    """Whether activations are ``(T, B, D)``, by what the batch holds as ``(B, T)``."""
    known = [tuple(t.shape) for t in (fields.mask, fields.labels, fields.tokens) if t is not None and t.ndim == 2]
    shape = tuple(x.shape[:2])
    return x.ndim == 3 and shape not in known and shape[::-1] in known
