"""Dense: weights as they are, or in 16 bits."""

from typing import Literal

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.core.validate import require

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Dense(Codec):
    """Keep a matrix, in 16 or 32 bits: what a group is left with where nothing smaller will do.

    Args:
        dtype: "bfloat16", "float16" or "float32". Weights that were of that type lose nothing.

    Raises:
        ValueError: If ``dtype`` is none of the three.
    """

    def __init__(self, dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16") -> None:
        require("Dense", dtype in _TYPES, "dtype", dtype, f"one of {', '.join(_TYPES)}")
        self.dtype = dtype

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, _, _ = checked("Dense", weight)
        values = weight.to(_TYPES[self.dtype])
        if not values.isfinite().all():
            raise ValueError(f"`Dense(dtype={self.dtype!r})`: a weight is too large for it.")
        return Packed({"values": values}, {"codec": "Dense", "shape": list(weight.shape)})

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        return packed.tensors["values"].float()
