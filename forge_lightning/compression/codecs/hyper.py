"""Hyper-compression: pairs of weights as points of a trajectory through a square."""

import math

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.compression.codecs.vptq import nearest_centres
from forge_lightning.compression.packing import (
    MAX_SYMBOLS,
    decode_symbols,
    encode_symbols,
    pack_bits,
    unpack_bits,
)
from forge_lightning.core.validate import require


def trajectory(num_points: int) -> Tensor:
    """Points of a straight line that winds through the unit square, centred on 0: ``(U, 2)``, in [-1/2, 1/2].

    Its slope is the rounded root of the number of points, so that they are a sheared grid: a two-dimensional lattice.
    """
    along = torch.arange(num_points, dtype=torch.float64) / num_points
    across = (torch.arange(num_points) * math.ceil(math.sqrt(num_points)) % num_points) / num_points
    centred = torch.stack([along, across], 1) + 0.5 / num_points - 0.5
    return centred.float()


class Hyper(Codec):
    """Write two weights as the number of the nearest point on a line that winds through a square.

    The line's points are a lattice, so this is a uniform quantiser of pairs, whatever its name says: at the same number
    of bits `RoundToNearest` in groups has a smaller error. Where the numbers are entropy coded it does better, as any
    grid does; `EntropyGPTQ` does that with feedback.

    Args:
        points: Points of the line, ``U``, 4 to 4,096.
        categories: Squares, each as large as the number of it times the first, 1 to 3: outliers go to the larger ones.
        entropy: Entropy code the numbers where that is smaller.

    Raises:
        ValueError: If an argument is out of range, or there are too many numbers for an entropy code.

    References:
        Fan et al., `Hyper-Compression <https://arxiv.org/abs/2409.00592>`_, 2024. The square is as large as has the
        least error, in place of a fixed side.
    """

    def __init__(self, points: int = 128, categories: int = 1, entropy: bool = True) -> None:
        require("Hyper", 4 <= points <= MAX_SYMBOLS, "points", points, f"4 to {MAX_SYMBOLS:,}")
        require("Hyper", 1 <= categories <= 3, "categories", categories, "1 to 3")
        if entropy and points * categories > MAX_SYMBOLS:
            raise ValueError(
                f"`Hyper(points={points}, categories={categories})` makes {points * categories:,} different numbers;"
                f" an entropy code takes {MAX_SYMBOLS:,}. Set `entropy=False`."
            )
        self.points, self.categories, self.entropy = points, categories, entropy

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, _, _ = checked("Hyper", weight)
        flat = weight.flatten()
        pairs = torch.cat([flat, flat.new_zeros(len(flat) % 2)]).view(-1, 2)
        side, numbers = self._best_side(pairs)
        bits = (self.points * self.categories - 1).bit_length()
        tensors = {"numbers": pack_bits(numbers, bits)}
        if self.entropy:
            coded = encode_symbols(numbers)
            if sum(part.nbytes for part in coded.values()) < tensors["numbers"].nbytes:
                tensors = coded
        return Packed(
            {**tensors, "side": side.reshape(1)},
            {
                "codec": "Hyper",
                "shape": list(weight.shape),
                "points": self.points,
                "categories": self.categories,
            },
        )

    def _best_side(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The square with the least error, by a sample of the pairs; and the numbers of all of them in it."""
        largest = pairs.abs().max().clamp(min=1e-20)
        sample = pairs[:: max(1, len(pairs) // 8192)]
        sides = 2 * largest * torch.exp2(torch.linspace(-4, 0.25, 18))
        errors = []
        for side in sides:
            numbers = self._numbers(sample, side)
            errors.append((self._points(numbers, side) - sample).square().sum())
        side = sides[int(torch.stack(errors).argmin())]
        return side, self._numbers(pairs, side)

    def _numbers(self, pairs: Tensor, side: Tensor) -> Tensor:
        """Number of the nearest point, with its category."""
        reach = pairs.abs().amax(1) / (side / 2)
        category = (reach.ceil() - 1).clamp(0, self.categories - 1)
        scaled = pairs / side / (category + 1)[:, None]
        nearest, _ = nearest_centres(scaled, trajectory(self.points))
        return (nearest + self.points * category.long()).int()

    def _points(self, numbers: Tensor, side: Tensor) -> Tensor:
        category = numbers // self.points
        return trajectory(self.points)[(numbers % self.points).long()] * side * (category + 1)[:, None]

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        rows, columns = packed.metadata["shape"]
        codec = cls(packed.metadata["points"], packed.metadata["categories"], entropy=False)
        count = -(-rows * columns // 2)
        if "numbers" in packed.tensors:
            bits = (codec.points * codec.categories - 1).bit_length()
            numbers = unpack_bits(packed.tensors["numbers"], bits, count)
        else:
            numbers = decode_symbols(packed.tensors, count)
        pairs = codec._points(numbers, packed.tensors["side"].float())
        return pairs.flatten()[: rows * columns].view(rows, columns).contiguous()
