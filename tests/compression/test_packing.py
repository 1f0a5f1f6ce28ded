"""Integers as bytes, and back."""

import math

import pytest
import torch

from forge_lightning.compression.packing import (
    decode_symbols,
    encode_symbols,
    entropy_bits,
    pack_bits,
    pack_trits,
    unpack_bits,
    unpack_trits,
)


def integers(high, count, seed=0):
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_bits_come_back(bits, count):
    values = integers(2**bits, count)
    packed = pack_bits(values, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, count), values.int())


def test_bits_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"bits=3.*0 to 7, not 1 to 8"):
        pack_bits(torch.tensor([1, 8]), 3)
    with pytest.raises(ValueError, match="need 2 bytes, not 1"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 4, 3)


@pytest.mark.parametrize("count", [0, 1, 5, 1003])
def test_trits_come_back_at_five_a_byte(count):
    values = integers(3, count)
    packed = pack_trits(values)
    assert len(packed) == math.ceil(count / 5)
    assert torch.equal(unpack_trits(packed, count), values.int())


def test_trits_refuse_other_bytes():
    with pytest.raises(ValueError, match="0, 1 and 2"):
        pack_trits(torch.tensor([3]))
    with pytest.raises(ValueError, match="not 5 trits"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="not 6 trits"):
        unpack_trits(torch.tensor([1], dtype=torch.uint8), 6)


@pytest.mark.parametrize("count", [1, 2, 2047, 2048, 10_000])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_symbols_come_back(count, num_classes):
    values = (torch.randn(count, generator=torch.Generator().manual_seed(1)) * 3).round().int()
    values -= values.min()
    classes = None if num_classes is None else integers(num_classes, count).int()
    coded = encode_symbols(values, classes)
    assert torch.equal(decode_symbols(coded, count, classes), values)


def test_symbols_of_one_kind_take_no_words():
    coded = encode_symbols(torch.zeros(5000, dtype=torch.int32))
    assert coded["words"].numel() == 0
    assert torch.equal(decode_symbols(coded, 5000), torch.zeros(5000, dtype=torch.int32))


def test_symbols_are_near_their_entropy():
    values = (torch.randn(200_000, generator=torch.Generator().manual_seed(1)) * 2).round().int()
    values -= values.min()
    counts = torch.bincount(values).double() / len(values)
    entropy = -(counts * counts.clamp(min=1e-9).log2()).sum().item()
    assert entropy_bits(values) == pytest.approx(entropy, abs=1e-9)
    coded = encode_symbols(values)
    bits = 8 * sum(part.nbytes for part in coded.values()) / len(values)
    assert entropy < bits < 1.01 * entropy


def test_rare_symbols_keep_a_probability():
    values = torch.zeros(100_000, dtype=torch.int32)
    values[:3000] = torch.arange(3000)
    coded = encode_symbols(values)
    assert torch.equal(decode_symbols(coded, len(values)), values)


def test_symbols_refuse_what_is_cut_short():
    values = integers(16, 5000).int()
    coded = encode_symbols(values)
    with pytest.raises(ValueError, match="ends before"):
        decode_symbols({**coded, "words": coded["words"][:-2]}, 5000)
    with pytest.raises(ValueError, match="where it should"):
        decode_symbols(coded, 4999)
    with pytest.raises(ValueError, match="do not add up"):
        decode_symbols({**coded, "frequencies": coded["frequencies"].roll(1)}, 5000)
    with pytest.raises(ValueError, match="takes 0 to 4095"):
        encode_symbols(torch.tensor([4096]))
