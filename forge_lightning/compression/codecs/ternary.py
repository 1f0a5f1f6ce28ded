"""Ternary: weights of -1, 0 and 1, five in a byte."""

from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.compression.packing import pack_trits, unpack_trits

EPS = 1e-5


def ternary_scale(weight: Tensor) -> Tensor:
    """Mean absolute value of a weight, at least 1e-5, of its own type: ``()``."""
    return weight.abs().mean().clamp(min=EPS)


def ternary(weight: Tensor) -> Tensor:
    r"""A weight rounded to -1, 0 and 1 times its mean absolute value.

    .. math:: \hat W = γ\,\mathrm{clip}(\mathrm{round}(W / γ), -1, 1), \quad γ = \mathrm{mean}|W|

    Args:
        weight: Any shape.

    Returns:
        The same shape and type.

    Example:
        >>> import torch
        >>> ternary(torch.tensor([0.1, -2.0, 0.9, 1.0]))
        tensor([ 0., -1.,  1.,  1.])

    References:
        Ma et al., `The Era of 1-bit LLMs <https://arxiv.org/abs/2402.17764>`_, 2024.
    """
    scale = ternary_scale(weight)
    return (weight / scale).round().clamp(-1, 1) * scale


class Ternary(Codec):
    """BitNet b1.58: one scale a matrix, and five weights in a byte (1.6 bits a weight).

    For weights that were trained so, by `TernaryQAT`. Other weights lose most of what they know.
    """

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, _, _ = checked("Ternary", weight)
        scale = ternary_scale(weight)
        trits = (weight / scale).round().clamp(-1, 1).flatten().int() + 1
        return Packed(
            {"trits": pack_trits(trits), "scale": scale.reshape(1)},
            {"codec": "Ternary", "shape": list(weight.shape)},
        )

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        rows, columns = packed.metadata["shape"]
        trits = unpack_trits(packed.tensors["trits"], rows * columns)
        return (trits.float() - 1).view(rows, columns) * packed.tensors["scale"].float()
