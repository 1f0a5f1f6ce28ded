"""Examples as bytes, and back exactly."""

import pytest
import torch

from forge_lightning.dream.store import RowStore


def store(mask="mask", folder=None, labels=("labels",), label_pad=-100):
    return RowStore(8, mask, folder, "Owner", labels, label_pad)


def filled(one, rows, extras=None):
    packed = one.pack(rows, extras or {})
    for i in range(len(packed)):
        one.put(i, packed, i)
    return packed


IDS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [1, 0, 0, 0]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize("mapped", [False, True])
def test_examples_come_back_padded_to_the_longest_read(mapped, tmp_path):
    one = store(folder=tmp_path if mapped else None)
    labels = IDS.masked_fill(MASK == 0, -100)
    filled(one, {"ids": IDS, "mask": MASK, "labels": labels, "x": torch.arange(6.0).view(3, 2), "n": torch.arange(3)})
    rows, _ = one.read([2, 1])
    assert rows["ids"].tolist() == [[1, 0], [8, 9]]
    assert rows["labels"].tolist() == [[1, -100], [8, 9]]
    assert rows["x"].tolist() == [[4, 5], [2, 3]]
    assert rows["n"].tolist() == [2, 1]
    assert one.sequences == ["ids", "mask", "labels"]
    assert [rows[name].dtype for name in ("ids", "x", "n")] == [torch.int64, torch.float32, torch.int64]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[1.5, -0.0], [float("inf"), float("nan")]]).bfloat16(),
        torch.tensor([[True, False], [False, True]]),
        torch.tensor([[2**31, -(2**31) - 1], [2**62, 0]]),
        torch.tensor([[1e300, 2.0], [3.0, 4.0]], dtype=torch.float64),
        torch.zeros(2, 3, 2, 2).half(),
        torch.tensor([[1 + 2j, 0j], [3j, 1 + 0j]]),
    ],
    ids=lambda values: str(values.dtype),
)
def test_every_dtype_is_restored_bit_by_bit(values):
    one = store()
    filled(one, {"x": values})
    again, _ = one.read([0, 1])
    assert again["x"].dtype == values.dtype
    assert torch.equal(again["x"].view(torch.uint8), values.view(torch.uint8))


def test_integers_that_outgrow_half_their_bits_keep_earlier_examples():
    one = store()
    filled(one, {"x": torch.tensor([[1, 2], [3, 4]])})
    half = one.num_bytes
    packed = one.pack({"x": torch.tensor([[2**40, 5]])}, {})
    one.put(2, packed, 0)
    assert half == 16
    assert one.num_bytes == 48
    assert one.read([0, 1, 2])[0]["x"].tolist() == [[1, 2], [3, 4], [2**40, 5]]


def test_bytes_are_those_of_the_examples_without_padding():
    one = store()
    packed = filled(one, {"ids": IDS, "mask": MASK})
    assert [one.length(slot) for slot in range(3)] == [2 * 4 * n for n in (3, 2, 1)]
    assert one.num_bytes == 2 * 4 * 6
    one.free(0)
    assert one.num_bytes == 2 * 4 * 3
    assert [packed.length(i) for i in range(3)] == [24, 16, 8]


def test_hashes_are_of_the_content_whatever_its_padding():
    one = store()
    ids = one.pack({"ids": IDS, "mask": MASK}, {}).ids()
    shorter = one.pack({"ids": IDS[1:, :2], "mask": MASK[1:, :2]}, {}).ids()
    assert ids[1:] == shorter
    assert len(set(ids)) == 3
    assert all(0 <= number < 2**62 for number in ids)


def test_extras_have_lengths_of_their_own():
    one = store()
    extras = {"logits": [torch.ones(2, 3), torch.zeros(0, 3)]}
    filled(one, {"x": torch.zeros(2, 1)}, extras)
    again = one.read([0, 1])[1]["logits"]
    assert [t.shape for t in again] == [(2, 3), (0, 3)]
    assert torch.equal(again[0], torch.ones(2, 3))


def test_examples_padded_at_the_front_stay_there():
    one = store()
    filled(one, {"ids": IDS.flip(1), "mask": MASK.flip(1)})
    assert one.padded_at_front
    assert one.read([0, 2])[0]["ids"].tolist() == [[0, 7, 6, 5], [0, 0, 0, 1]]


def test_state_is_restored_to_other_slots():
    one, other = store(), store()
    filled(one, {"ids": IDS, "mask": MASK, "x": torch.arange(3.0)})
    other.load(one.state_dict([2, 0]), {0: 5, 1: 7})
    rows, _ = other.read([5, 7])
    assert rows["ids"].tolist() == [[1, 0, 0], [5, 6, 7]]
    assert rows["x"].tolist() == [2.0, 0.0]
    assert other.num_bytes == one.length(0) + one.length(2)


def test_fields_that_do_not_fit_are_refused():
    one = store()
    filled(one, {"ids": IDS, "mask": MASK})
    with pytest.raises(ValueError, match=r"`Owner` stores rows of \['ids', 'mask'\]|`Owner` stores"):
        one.pack({"ids": IDS}, {})
    with pytest.raises(ValueError, match="'ids' was as long as the mask 'mask', and now is 2 long and the mask 4"):
        one.pack({"ids": IDS[:, :2], "mask": MASK}, {})


@pytest.mark.parametrize("wide_first", [False, True])
def test_states_of_other_integer_widths_are_read(wide_first):
    """One rank has stored integers in half their bits, and another one in full."""
    narrow, wide = store(), store()
    filled(narrow, {"x": torch.tensor([[1, 2], [3, 4]]), "y": torch.tensor([[0.5], [1.5]])})
    filled(wide, {"x": torch.tensor([[2**40, 5], [6, 7]]), "y": torch.tensor([[2.5], [3.5]])})
    both = store()
    first, second = (wide, narrow) if wide_first else (narrow, wide)
    both.load(first.state_dict([0, 1]), {0: 0, 1: 1})
    both.load(second.state_dict([0, 1]), {0: 2, 1: 3})
    rows, _ = both.read([0, 1, 2, 3])
    x = {True: [[2**40, 5], [6, 7], [1, 2], [3, 4]], False: [[1, 2], [3, 4], [2**40, 5], [6, 7]]}[wide_first]
    y = {True: [2.5, 3.5, 0.5, 1.5], False: [0.5, 1.5, 2.5, 3.5]}[wide_first]
    assert rows["x"].tolist() == x
    assert rows["y"].flatten().tolist() == y
