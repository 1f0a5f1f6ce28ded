"""Batches of any kind as named tensors, and back."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from forge_lightning.dream.batch_rows import joined, rows_of, template_of, with_rows

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(6.0).view(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    "batch",
    [X, (X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}, OrderedDict(x=X, y=Y)],
    ids=["tensor", "tuple", "list", "namedtuple", "dict", "ordered"],
)
def test_batch_comes_back_with_its_type(batch):
    rows = rows_of(batch)
    chosen = {name: tensor[1:] for name, tensor in rows.items()}
    again = with_rows(batch, chosen)
    assert type(again) is type(batch)
    for name, tensor in rows_of(again).items():
        assert torch.equal(tensor, rows[name][1:])
    assert all(len(tensor) == 0 for tensor in rows_of(template_of(batch)).values())
    assert len(next(iter(rows_of(batch).values()))) == 3


def test_attributes_of_a_dict_subclass_are_kept():
    class Batch(dict):
        pass

    batch = Batch(x=X)
    batch.source = "here"
    assert with_rows(batch, {"x": X[:1]}).source == "here"


@pytest.mark.parametrize("at_front", [False, True])
def test_joined_pads_the_shorter_sequences(at_front):
    first, second = {"ids": torch.tensor([[1, 2, 3]])}, {"ids": torch.tensor([[4], [5]])}
    pads = {"ids": 9}
    both = joined(first, second, pads, ["ids"], at_front)["ids"].tolist()
    assert both == [[1, 2, 3], *([[9, 9, 4], [9, 9, 5]] if at_front else [[4, 9, 9], [5, 9, 9]])]


def test_joined_takes_the_first_batchs_type():
    both = joined({"x": torch.ones(1, 2, dtype=torch.float64)}, {"x": torch.ones(1, 2)}, {}, [])
    assert both["x"].dtype == torch.float64


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"the batch has \['x'\], and stored examples \['y'\]|stored examples have"):
        joined({"x": X}, {"y": X}, {}, [])
    with pytest.raises(ValueError, match="'x' has length 2, and stored examples 1"):
        joined({"x": X}, {"x": X[:, :1]}, {}, [])
    with pytest.raises(ValueError, match="the batch is empty"):
        rows_of({})
