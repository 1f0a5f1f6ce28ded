"""Codecs in series, each on what the one before it has left."""

from collections.abc import Sequence

from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, decode


def in_series(
    codecs: Sequence[Codec], weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None
) -> Packed:
    """Encode a matrix by each codec in turn, decoding between them. Only what the last one wrote is kept.

    Errors add up and sizes do not: this is worse than its parts, and there to show it.

    Args:
        codecs: At least one.
        weight: ``(out, in)``.
        hessian: ``(in, in)``.
        row_weights: ``(out,)``.

    Raises:
        ValueError: If there is no codec.
    """
    if not codecs:
        raise ValueError("`in_series` needs at least one codec.")
    for codec in codecs[:-1]:
        weight = decode(codec.encode(weight, hessian, row_weights))
    return codecs[-1].encode(weight, hessian, row_weights)
