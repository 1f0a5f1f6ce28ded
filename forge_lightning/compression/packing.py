"""Integers as few bytes: fixed widths, five trits in a byte, and an entropy coder. NumPy and torch alone."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_PRECISION = 14  # bits of the probabilities of the entropy coder
_TOTAL = 1 << _PRECISION
_LOWEST = 1 << 16  # of a coder's state between two symbols
_SYMBOLS_PER_LANE = 2048
_CHUNK = 1 << 20  # integers whose bits are spread out at a time: a multiple of 8
MAX_SYMBOLS = 4096
"""Different symbols that the entropy coder takes: each needs a probability above 0."""


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Write integers with the same number of bits each, the lowest bit first.

    Args:
        values: Integers in ``[0, 2**bits)``, ``(N,)``.
        bits: Bits of each, 1 to 16.

    Returns:
        Bytes, ``(ceil(N * bits / 8),)``, uint8.

    Raises:
        ValueError: If a value does not fit.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3]), 4).tolist()
        [33, 3]
    """
    numbers = values.numpy().astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >> bits):
        raise ValueError(f"`pack_bits(bits={bits})` takes 0 to {2**bits - 1}, not {numbers.min()} to {numbers.max()}.")
    if bits == 8:
        return torch.from_numpy(numbers.astype(np.uint8))
    if bits == 16:
        return torch.from_numpy(numbers.astype("<u2").view(np.uint8))
    parts = [
        np.packbits(((part[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1), bitorder="little")
        for part in np.split(numbers, range(_CHUNK, len(numbers), _CHUNK))
    ]
    return torch.from_numpy(np.concatenate(parts))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Read what `pack_bits` wrote: ``count`` integers, ``(count,)``, int32.

    Raises:
        ValueError: If there are fewer.
    """
    data = packed.numpy()
    if len(data) * 8 < count * bits:
        raise ValueError(f"{count} integers of {bits} bits need {-(-count * bits // 8)} bytes, not {len(data)}.")
    if bits == 8:
        return torch.from_numpy(data[:count].astype(np.int32))
    if bits == 16:
        return torch.from_numpy(data[: 2 * count].copy().view("<u2").astype(np.int32))
    single = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    values = np.zeros(count, np.int32)
    for place in range(bits):
        values |= single[:, place].astype(np.int32) << place
    return torch.from_numpy(values)


def pack_trits(values: Tensor) -> Tensor:
    """Write numbers 0, 1 and 2, five to a byte: 1.6 bits each.

    Args:
        values: ``(N,)``.

    Returns:
        Bytes, ``(ceil(N / 5),)``, uint8.

    Example:
        >>> pack_trits(torch.tensor([2, 2, 2, 2, 2, 1])).tolist()
        [242, 1]
    """
    numbers = values.numpy().astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() > 2):
        raise ValueError(f"`pack_trits` takes 0, 1 and 2, not {numbers.min()} to {numbers.max()}.")
    padded = np.zeros(-(-len(numbers) // 5) * 5, np.int64)
    padded[: len(numbers)] = numbers
    return torch.from_numpy((padded.reshape(-1, 5) @ 3 ** np.arange(5)).astype(np.uint8))


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Read what `pack_trits` wrote: ``(count,)``, int32.

    Raises:
        ValueError: If there are fewer, or a byte is none of five trits.
    """
    data = packed.numpy().astype(np.int32)
    if len(data) * 5 < count or (data.size and data.max() > 242):
        raise ValueError(f"{len(data)} bytes up to {data.max(initial=0)} are not {count} trits.")
    trits = (data[:, None] // 3 ** np.arange(5)) % 3
    return torch.from_numpy(trits.reshape(-1)[:count].astype(np.int32))


def entropy_bits(symbols: Tensor, classes: Tensor | None = None) -> float:
    """Bits a symbol, at least, of a code that knows how often each symbol occurs (in each class).

    Args:
        symbols: Integers from 0, ``(N,)``.
        classes: Class of each, integers from 0, ``(N,)``.
    """
    counts = _counts(symbols, classes).double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-(counts * share.clamp(min=1e-300).log2()).sum() / max(1, len(symbols)))


def _counts(symbols: Tensor, classes: Tensor | None) -> Tensor:
    """How often each symbol occurs in each class: ``(classes, symbols)``."""
    width = int(symbols.max()) + 1 if len(symbols) else 1
    if classes is None:
        return torch.bincount(symbols.long(), minlength=width)[None]
    height = int(classes.max()) + 1 if len(symbols) else 1
    joint = torch.bincount(classes.long() * width + symbols.long(), minlength=width * height)
    return joint.view(height, width)


def encode_symbols(symbols: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
    """Write integers in about as many bits as their entropy, by range asymmetric numeral systems.

    Many coders ("lanes") run side by side on every n-th symbol and share one stream of 16-bit words.

    Args:
        symbols: Integers in ``[0, 4096)``, ``(N,)``.
        classes: Class of each symbol, ``(N,)``, each with frequencies of its own. The reader must know them.

    Returns:
        ``words``, ``states`` and ``frequencies``, uint8.

    Raises:
        ValueError: If a symbol is out of range.

    References:
        Duda, `Asymmetric numeral systems <https://arxiv.org/abs/1311.2540>`_, 2013.
        Giesen, `Interleaved entropy coders <https://arxiv.org/abs/1402.3392>`_, 2014.
    """
    if len(symbols) and not 0 <= int(symbols.min()) <= int(symbols.max()) < MAX_SYMBOLS:
        raise ValueError(f"`encode_symbols` takes 0 to {MAX_SYMBOLS - 1}, not {symbols.min()} to {symbols.max()}.")
    counts = _counts(symbols, classes)
    table = np.stack([_frequencies(row) for row in counts.numpy()])
    starts = np.cumsum(table, 1) - table
    lanes = max(1, len(symbols) // _SYMBOLS_PER_LANE)
    of_symbol = _by_lane(symbols.numpy().astype(np.int64), lanes)
    of_class = _by_lane(
        np.zeros(len(symbols), np.int64) if classes is None else classes.numpy().astype(np.int64), lanes
    )
    states = np.full(lanes, _LOWEST, np.uint64)
    written: list[np.ndarray] = []
    present = len(symbols)
    for step in reversed(range(len(of_symbol))):
        width = min(lanes, present - step * lanes)
        state, symbol, group = states[:width], of_symbol[step, :width], of_class[step, :width]
        frequency = table[group, symbol].astype(np.uint64)
        full = state >= frequency << np.uint64(32 - _PRECISION)
        written.append((state[full] & np.uint64(0xFFFF)).astype("<u2"))
        state[full] >>= np.uint64(16)
        quotient, remainder = np.divmod(state, frequency)
        states[:width] = (quotient << np.uint64(_PRECISION)) + remainder + starts[group, symbol].astype(np.uint64)
    words = np.concatenate(written[::-1]) if written else np.zeros(0, "<u2")
    return {
        "words": torch.from_numpy(words.view(np.uint8)),
        "states": torch.from_numpy(states.astype("<u4").view(np.uint8)),
        "frequencies": torch.from_numpy(table.astype("<u2").view(np.uint8).reshape(len(table), -1)),
    }


def decode_symbols(coded: Mapping[str, Tensor], count: int, classes: Tensor | None = None) -> Tensor:
    """Read what `encode_symbols` wrote: ``(count,)``, int32.

    Raises:
        ValueError: If the data are not a code of that many symbols.
    """
    table = coded["frequencies"].numpy().copy().view("<u2").astype(np.uint32)
    if (table.sum(1) != _TOTAL).any():
        raise ValueError("The frequencies of an entropy code do not add up.")
    starts = np.cumsum(table, 1) - table
    slots = np.stack([np.repeat(np.arange(len(row)), row) for row in table]).astype(np.int32)
    states = coded["states"].numpy().copy().view("<u4").astype(np.uint64)
    words = coded["words"].numpy().copy().view("<u2").astype(np.uint64)
    lanes = len(states)
    of_class = _by_lane(_class_numbers(classes, count), lanes)
    found = np.zeros(of_class.shape, np.int32)
    place = 0
    for step in range(len(of_class)):
        width = min(lanes, count - step * lanes)
        state, group = states[:width], of_class[step, :width]
        slot = (state & np.uint64(_TOTAL - 1)).astype(np.int64)
        symbol = slots[group, slot]
        found[step, :width] = symbol
        state = table[group, symbol] * (state >> np.uint64(_PRECISION)) + (slot - starts[group, symbol]).astype(
            np.uint64
        )
        low = state < _LOWEST
        taken = words[place : place + int(low.sum())]
        if len(taken) != low.sum():
            raise ValueError("An entropy code ends before its last symbol.")
        state[low] = (state[low] << np.uint64(16)) | taken
        place += len(taken)
        states[:width] = state
    if place != len(words) or (states != _LOWEST).any():
        raise ValueError("An entropy code does not end where it should.")
    return torch.from_numpy(found.reshape(-1)[:count])


def _class_numbers(classes: Tensor | None, count: int) -> np.ndarray:
    return np.zeros(count, np.int64) if classes is None else classes.numpy().astype(np.int64)


def _by_lane(values: np.ndarray, lanes: int) -> np.ndarray:
    """``(N,)`` to ``(steps, lanes)``, filled with zeros."""
    filled = np.zeros(-(-len(values) // lanes) * lanes, values.dtype)
    filled[: len(values)] = values
    return filled.reshape(-1, lanes)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts as shares of ``_TOTAL``: at least 1 for what occurs, and all together exact."""
    total = int(counts.sum())
    if total == 0:
        shares = np.zeros(len(counts), np.int64)
        shares[0] = _TOTAL
        return shares
    shares = np.maximum((counts > 0).astype(np.int64), counts.astype(np.int64) * _TOTAL // total)
    order = np.argsort(-shares, kind="stable")
    missing = _TOTAL - int(shares.sum())
    shares[order[0]] += max(0, missing)
    for place in order:  # too many only where rare symbols were rounded up
        taken = min(max(0, -missing), int(shares[place]) - 1) if counts[place] else 0
        shares[place] -= taken
        missing += taken
    return shares
