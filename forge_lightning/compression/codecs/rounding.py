"""Codecs on uniform grids: round to nearest, GPTQ, and GPTQ with entropy-coded integers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.compression.packing import (
    MAX_SYMBOLS,
    decode_symbols,
    encode_symbols,
    entropy_bits,
    pack_bits,
    unpack_bits,
)
from forge_lightning.core.validate import require

_SHRINK = torch.linspace(0.4, 1.0, 25)
"""Tried ranges of a grid, as a share of the largest weight."""
_CLASSES = (1, 2, 4, 8)  # of rows, each with frequencies of its own


def feedback_matrix(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The upper Cholesky factor of the inverse Hessian, which says how later columns make up for earlier ones.

    Args:
        hessian: ``(in, in)``, symmetric, positive semidefinite.
        damping: Added to the diagonal, as a share of its mean.

    Returns:
        ``(in, in)``, float32.
    """
    mean = float(hessian.diagonal().mean())
    for stronger in (1, 10, 100, 1000):  # rounding may have left a matrix that is not positive definite
        damped = hessian.double().clone()
        damped.diagonal().add_(stronger * damping * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            found: Tensor = factor
            return found.float()
    raise ValueError("A Hessian is not positive semidefinite.")


def with_feedback(
    weight: Tensor, hessian: Tensor, quantise: Callable[[Tensor, int], Tensor], block: int = 128
) -> Tensor:
    """Quantise column after column, and move the error of each to the columns that are still to come.

    Columns that matter most come first.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``.
        quantise: Gets a column ``(out,)`` and its number, and returns what will be read in its place.
        block: Columns whose errors reach the later ones together.

    Returns:
        What will be read, ``(out, in)``.

    References:
        Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2022.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = feedback_matrix(hessian[order][:, order])
    rest = weight[:, order].t().contiguous()  # (in, out): columns lie together
    read = torch.empty_like(rest)
    numbers = order.tolist()
    for start in range(0, len(rest), block):
        end = min(start + block, len(rest))
        errors = torch.empty(end - start, rest.shape[1])
        for column in range(start, end):
            read[column] = quantise(rest[column], numbers[column])
            errors[column - start] = (rest[column] - read[column]) / factor[column, column]
            if column + 1 < end:
                rest[column + 1 : end].addr_(factor[column, column + 1 : end], errors[column - start], alpha=-1)
        if end < len(rest):
            rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(read)
    result[order] = read
    return result.t().contiguous()


def clipped_scales(weight: Tensor, bits: int, group_size: int, column_weights: Tensor | None = None) -> Tensor:
    """Step of the grid of each group of columns, with the range that has the least squared error.

    Args:
        weight: ``(out, in)``.
        bits: Bits of a weight.
        group_size: Columns of a group.
        column_weights: How much an error in each column matters, ``(in,)``.

    Returns:
        ``(out, groups)``, float16.
    """
    rows, columns = weight.shape
    groups = math.ceil(columns / group_size)
    padded = weight.new_zeros(rows, groups * group_size)
    padded[:, :columns] = weight
    padded = padded.view(rows, groups, group_size)
    importance = weight.new_zeros(groups * group_size)
    importance[:columns] = 1.0 if column_weights is None else column_weights.clamp(min=1e-12)
    importance = importance.view(groups, group_size)
    levels = 2**bits
    largest = padded.abs().amax(-1) / (levels / 2 - 0.5)
    best, scales = torch.full_like(largest, torch.inf), largest.clone()
    for shrink in _SHRINK:
        scale = (largest * shrink).half().float()
        error = ((_on_grid(padded, scale[..., None], levels) - padded) ** 2 * importance).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    result: Tensor = scales.half()
    return result


def _places(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The nearest of ``levels`` levels around 0, as a number from 0."""
    safe = torch.where(scale > 0, scale, 1.0)
    places: Tensor = (weight / safe + (levels - 1) / 2).round()
    return places.clamp(0, levels - 1)


def _on_grid(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (_places(weight, scale, levels) - (levels - 1) / 2) * scale


class RoundToNearest(Codec):
    """Round each weight to the nearest of ``2**bits`` levels; a group of columns shares a step, with a clipped range.

    Args:
        bits: Bits of a weight, 2 to 8.
        group_size: Columns that share a step of 16 bits.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, bits: int = 4, group_size: int = 128) -> None:
        name = type(self).__name__
        require(name, 2 <= bits <= 8, "bits", bits, "2 to 8")
        require(name, group_size >= 1, "group_size", group_size, "at least 1")
        self.bits, self.group_size = bits, group_size

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, hessian, _ = checked(type(self).__name__, weight, hessian, row_weights)
        column_weights = None if hessian is None else hessian.diagonal()
        scales = clipped_scales(weight, self.bits, self.group_size, column_weights)
        if not scales.isfinite().all():
            raise ValueError(f"`{self.label}`: weights up to {float(weight.abs().max()):.3g} need steps above 16 bits.")
        read = self._read_values(weight, hessian, scales)
        places = _places(read, self._spread(scales, weight.shape[1]), 2**self.bits)
        return Packed(
            {"places": pack_bits(places.flatten().int(), self.bits), "scales": scales},
            {
                "codec": type(self).__name__,
                "shape": list(weight.shape),
                "bits": self.bits,
                "group_size": self.group_size,
            },
        )

    def _read_values(self, weight: Tensor, hessian: Tensor | None, scales: Tensor) -> Tensor:
        """Values near the levels that are to be written."""
        return weight

    def _spread(self, scales: Tensor, columns: int) -> Tensor:
        return scales.float().repeat_interleave(self.group_size, 1)[:, :columns]

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        rows, columns = packed.metadata["shape"]
        bits, group_size = packed.metadata["bits"], packed.metadata["group_size"]
        places = unpack_bits(packed.tensors["places"], bits, rows * columns).view(rows, columns).float()
        scales = packed.tensors["scales"].float().repeat_interleave(group_size, 1)[:, :columns]
        centred: Tensor = places - (2**bits - 1) / 2
        return centred * scales


class GPTQ(RoundToNearest):
    """`RoundToNearest`, where later columns make up for the errors of earlier ones. The baseline to beat.

    Without a Hessian it is `RoundToNearest`.

    Args:
        bits: Bits of a weight, 2 to 8.
        group_size: Columns that share a step of 16 bits.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2022. Steps of groups are fixed before, so that
        the columns need no order in the file.
    """

    needs_hessian = True

    def _read_values(self, weight: Tensor, hessian: Tensor | None, scales: Tensor) -> Tensor:
        if hessian is None:
            return weight
        steps = self._spread(scales, weight.shape[1]).t().contiguous()
        levels = 2**self.bits
        return with_feedback(weight, hessian, lambda column, number: _on_grid(column, steps[number], levels))


class EntropyGPTQ(Codec):
    """`GPTQ` on one unbounded grid, whose integers are entropy coded: any rate, and no step for each group.

    Rows whose errors matter less get a coarser grid, where the row weights are known. Common integers take few bits,
    outliers many; at the same number of bits the error is smaller than on a grid with a fixed number of levels.

    Args:
        bits: Bits of a weight to aim at, 0.5 to 8.

    Raises:
        ValueError: If ``bits`` is out of range.
    """

    needs_hessian = True

    def __init__(self, bits: float = 3.0) -> None:
        require("EntropyGPTQ", 0.5 <= bits <= 8, "bits", bits, "0.5 to 8")
        self.bits = float(bits)

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, hessian, row_weights = checked("EntropyGPTQ", weight, hessian, row_weights)
        coarseness = _coarseness(row_weights, len(weight))
        relative = torch.exp2(coarseness.float() / 4)[:, None]
        spread = (weight / relative).square().mean(1).sqrt()
        step = self._step(weight / relative, _quantiles(spread, _CLASSES[-1]))
        steps = step * relative[:, 0]
        if hessian is None:
            read = weight
        else:
            read = with_feedback(weight, hessian, lambda column, number: (column / steps).round() * steps)
        numbers = (read / steps[:, None]).round().int()
        lowest = int(numbers.min())
        if int(numbers.max()) - lowest >= MAX_SYMBOLS:  # one weight a thousand times as large as the others
            numbers = numbers.clamp(-(MAX_SYMBOLS // 2), MAX_SYMBOLS // 2 - 1)
            lowest = int(numbers.min())
        symbols = (numbers - lowest).flatten()
        classes = min((_quantiles(spread, number) for number in _CLASSES), key=lambda each: _coded_size(symbols, each))
        coded = encode_symbols(symbols, classes.repeat_interleave(weight.shape[1]))
        if coarseness.any():
            coded["coarseness"] = pack_bits(coarseness, 8)
        return Packed(
            {**coded, "step": step.reshape(1), "classes": pack_bits(classes, 3)},
            {"codec": "EntropyGPTQ", "shape": list(weight.shape), "lowest": lowest},
        )

    def _step(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The grid's step at which the integers have the entropy that is aimed at."""
        low, high = -24.0, 4.0
        scale = weight.square().mean().sqrt().clamp(min=1e-20)
        rows = classes.repeat_interleave(weight.shape[1])
        for _ in range(24):
            middle = (low + high) / 2
            numbers = (weight / (scale * 2.0**middle)).round().clamp(-2000, 2000).int().flatten()
            if entropy_bits(numbers - numbers.min(), rows) > self.bits:
                low = middle
            else:
                high = middle
        step: Tensor = scale * 2.0**high
        return step.float()

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        rows, columns = packed.metadata["shape"]
        tensors = packed.tensors
        classes = unpack_bits(tensors["classes"], 3, rows).repeat_interleave(columns)
        numbers = decode_symbols(tensors, rows * columns, classes) + packed.metadata["lowest"]
        steps = tensors["step"].float().expand(rows)
        if "coarseness" in tensors:
            steps = steps * torch.exp2(unpack_bits(tensors["coarseness"], 8, rows).float() / 4)
        whole: Tensor = numbers.view(rows, columns).float()
        return whole * steps[:, None]


def _coarseness(row_weights: Tensor | None, rows: int) -> Tensor:
    """How much coarser than the finest each row's grid is, in quarters of a power of two: ``(out,)``, 0 to 63.

    An error of a step matters as its square times the row's weight, and costs the same bits in each row.
    """
    if row_weights is None or not bool(row_weights.any()):
        return torch.zeros(rows, dtype=torch.int32)
    floor = 1e-3 * row_weights.mean()
    quarters = -2 * (row_weights + floor).log2()  # of 1/√w
    return (quarters - quarters.min()).round().clamp(0, 63).int()


def _coded_size(symbols: Tensor, classes: Tensor) -> float:
    """Bytes of symbols whose rows have these classes, with the table of frequencies."""
    of_symbols = classes.repeat_interleave(len(symbols) // len(classes))
    table = 2 * (int(classes.max()) + 1) * (int(symbols.max()) + 1)
    return entropy_bits(symbols, of_symbols) * len(symbols) / 8 + table


def _quantiles(values: Tensor, number: int) -> Tensor:
    """Class of each value, so that classes are about equally large: ``(N,)``, 0 to ``number - 1``."""
    if number == 1:
        return torch.zeros(len(values), dtype=torch.int32)
    edges = torch.quantile(values, torch.linspace(0, 1, number + 1)[1:-1])
    return torch.bucketize(values, edges).int()
