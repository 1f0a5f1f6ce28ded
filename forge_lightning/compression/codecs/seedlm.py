"""SeedLM: blocks of weights as a pseudo-random basis, named by its seed, and a few coefficients."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from forge_lightning.compression.codecs.base import Codec, Packed, checked
from forge_lightning.compression.packing import pack_bits, unpack_bits
from forge_lightning.core.validate import require

_TAPS = {3: (0, 1), 16: (0, 1, 3, 12)}
"""Bits whose sum is shifted in, for registers that run through all states but 0."""
_FORMS = {4: (8, 3), 3: (12, 4)}  # weights and coefficients of a block, by bits a weight
_CANDIDATES = 32
_CHUNK = 128  # blocks, and seeds below, whose products stay in a cache
_SEEDS = 2048
_EXPONENTS = (-1, 0, 1)
_REFINED = 6  # of a block's candidates


def lfsr_states(bits: int, num_steps: int) -> Tensor:
    """States of a linear feedback shift register after each start.

    Args:
        bits: Length of the register, ``K``: 3 or 16.
        num_steps: How many states.

    Returns:
        ``(2**K - 1, num_steps)``, int32: row ``s - 1`` is what follows the state ``s``.

    Example:
        >>> lfsr_states(3, 8)[4 - 1].tolist()  # Fig. 4 of the paper
        [2, 5, 6, 7, 3, 1, 4, 2]

    References:
        Shafipour et al., `SeedLM <https://arxiv.org/abs/2410.10714>`_, 2024.
    """
    state = torch.arange(1, 2**bits, dtype=torch.int32)
    found = torch.empty(len(state), num_steps, dtype=torch.int32)
    for step in range(num_steps):
        shifted_in = torch.zeros_like(state)
        for tap in _TAPS[bits]:
            shifted_in ^= (state >> tap) & 1
        state = (state >> 1) | (shifted_in << (bits - 1))
        found[:, step] = state
    return found


@cache
def _bases(block: int, rank: int) -> Tensor:
    """The basis of each seed: ``(65535, block, rank)``, in [-1, 1]."""
    half = 2**15
    return ((lfsr_states(16, block * rank).float() - half) / (half - 1)).view(-1, block, rank)


@cache
def _orthonormal(block: int, rank: int) -> list[list[Tensor]]:
    """The same spaces with orthonormal bases: for some seeds at a time ``rank`` matrices, ``(block, seeds)`` each."""
    vectors = torch.linalg.qr(_bases(block, rank)).Q.permute(2, 1, 0)
    return [[vector.contiguous() for vector in part.unbind(0)] for part in vectors.split(_SEEDS, 2)]


class SeedLM(Codec):
    """Write a block of weights as the seed of a shift register, an exponent and coefficients of 4 bits.

    It needs no data, and its rate is fixed. At the same number of bits `RoundToNearest` has a smaller error: use it
    where a seed is cheaper to fetch than a weight, which takes hardware of its own.

    The search is exact: for each block the 32 seeds whose spaces come nearest are tried in full, and more of them
    until no other can be better.

    Args:
        bits: Bits of a weight, 4 (blocks of 8 with 3 coefficients) or 3 (blocks of 12 with 4).

    Raises:
        ValueError: If ``bits`` is neither.

    References:
        Shafipour et al., `SeedLM <https://arxiv.org/abs/2410.10714>`_, 2024. The exponent is such that the largest
        coefficient fills the 4 bits, not the power of two below it; coefficients are then improved one step at a time.
    """

    def __init__(self, bits: Literal[3, 4] = 4) -> None:
        require("SeedLM", bits in _FORMS, "bits", bits, "3 or 4")
        self.bits = bits

    def encode(self, weight: Tensor, hessian: Tensor | None = None, row_weights: Tensor | None = None) -> Packed:
        weight, _, _ = checked("SeedLM", weight)
        size, rank = _FORMS[self.bits]
        scale = weight.square().mean().sqrt().clamp(min=1e-4).half()
        flat = weight.flatten() / scale.float()
        blocks = torch.zeros(-(-len(flat) // size) * size)
        blocks[: len(flat)] = flat
        found = [_search(part, size, rank) for part in blocks.view(-1, size).split(_CHUNK)]
        seeds, exponents, coefficients = (torch.cat(parts) for parts in zip(*found, strict=True))
        fields = torch.cat([(exponents + 8)[:, None], coefficients + 8], 1)
        return Packed(
            {
                "seeds": pack_bits(seeds, 16),
                "coefficients": pack_bits(fields.flatten(), 4),
                "scale": scale.reshape(1),
            },
            {"codec": "SeedLM", "shape": list(weight.shape), "bits": self.bits},
        )

    @classmethod
    def read(cls, packed: Packed) -> Tensor:
        rows, columns = packed.metadata["shape"]
        size, rank = _FORMS[packed.metadata["bits"]]
        number = -(-rows * columns // size)
        seeds = unpack_bits(packed.tensors["seeds"], 16, number).long()
        fields = unpack_bits(packed.tensors["coefficients"], 4, number * (rank + 1)).view(number, -1).float() - 8
        values = fields[:, 1:] * torch.exp2(fields[:, :1])
        if int(seeds.min()) < 1:
            raise ValueError("A seed of 0 leads nowhere: the data are not what SeedLM wrote.")
        blocks = torch.bmm(_bases(size, rank)[seeds - 1], values[..., None])
        return blocks.flatten()[: rows * columns].view(rows, columns) * packed.tensors["scale"].float()


def _search(blocks: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Seed, exponent and coefficients of each block, ``(B,)``, ``(B,)``, ``(B, rank)``."""
    inside = torch.empty(len(blocks), len(_bases(size, rank)))
    for part, bases in zip(inside.split(_SEEDS, 1), _orthonormal(size, rank), strict=True):
        total = (blocks @ bases[0]).square_()
        for basis in bases[1:]:
            product = blocks @ basis
            total.addcmul_(product, product)
        part.copy_(total)
    # What of a block lies outside a space, no coefficients can reach: a lower bound of each seed's error.
    squares = blocks.square().sum(1)
    nearest, places = inside.topk(_CANDIDATES + 1)
    error, seed, exponent, coefficients = _best_of(blocks, places[:, :_CANDIDATES], size, rank)
    unsure = error > squares - nearest[:, -1]
    width = _CANDIDATES
    while bool(unsure.any()) and width < inside.shape[1]:
        width = min(8 * width, inside.shape[1])
        which = unsure.nonzero().flatten()
        nearest, places = inside[which].topk(width)
        better = _best_of(blocks[which], places, size, rank)
        wins = better[0] < error[which]
        for value, new in zip((error, seed, exponent, coefficients), better, strict=True):
            value[which[wins]] = new[wins]
        unsure[which] = error[which] > squares[which] - nearest[:, -1]
    return seed, exponent, coefficients


def _best_of(blocks: Tensor, places: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best of some seeds for each block: squared error, seed, exponent, coefficients."""
    bases = _bases(size, rank)[places]  # (B, n, size, rank)
    gram = bases.transpose(-1, -2) @ bases
    linear = (bases.transpose(-1, -2) @ blocks[:, None, :, None]).squeeze(-1)  # (B, n, rank)
    exact = torch.linalg.solve(gram + 1e-4 * torch.eye(rank), linear)
    largest = exact.abs().amax(-1).clamp(min=1e-9)
    natural = torch.ceil(torch.log2(largest / 7.5))
    squares = blocks.square().sum(1)[:, None, None]
    exponent = torch.stack([(natural + shift).clamp(-8, 7) for shift in _EXPONENTS], -1)  # (B, n, E)
    power = torch.exp2(exponent)[..., None]
    whole = (exact[:, :, None] / power).round().clamp(-8, 7)  # (B, n, E, rank)
    values = whole * power
    error = squares - 2 * (values * linear[:, :, None]).sum(-1) + (values * (values @ gram)).sum(-1)
    kept = error.flatten(1).topk(min(_REFINED, error[0].numel()), largest=False).indices  # (B, m)
    of_seed = kept // len(_EXPONENTS)
    whole = whole.flatten(1, 2).gather(1, kept[..., None].expand(-1, -1, rank))
    power = power.flatten(1, 3).gather(1, kept)[..., None]
    gram = gram.gather(1, of_seed[..., None, None].expand(-1, -1, rank, rank))
    linear = linear.gather(1, of_seed[..., None].expand(-1, -1, rank))
    whole, error = _descend(whole, power, gram, linear, error.flatten(1).gather(1, kept))
    least, which = error.min(1)
    row = torch.arange(len(blocks))
    seeds = places.gather(1, of_seed)[row, which] + 1
    chosen = exponent.flatten(1).gather(1, kept)[row, which]
    return least, seeds, chosen.long(), whole[row, which].long()


def _descend(whole: Tensor, power: Tensor, gram: Tensor, linear: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Move one coefficient by one, as long as that lowers the squared error."""
    rank = whole.shape[-1]
    moves = torch.cat([torch.eye(rank), -torch.eye(rank)])  # (2 rank, rank)
    bend = gram.diagonal(dim1=-2, dim2=-1).repeat(1, 1, 2) * power**2
    for _ in range(4):
        slope = 2 * power * ((gram @ (whole * power)[..., None]).squeeze(-1) - linear)
        change = torch.cat([slope, -slope], -1) + bend
        moved = whole[..., None, :] + moves
        change = change.masked_fill((moved < -8).any(-1) | (moved > 7).any(-1), torch.inf)
        gain, which = change.min(-1)
        better = gain < -1e-7
        if not bool(better.any()):
            break
        whole = torch.where(better[..., None], whole + moves[which], whole)
        error = torch.where(better, error + gain, error)
    return whole, error
