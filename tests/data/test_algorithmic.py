import itertools

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from forge_lightning.data import AlgorithmicData


def rows(operation, **kwargs):
    return AlgorithmicData(operation, **kwargs).examples()


@pytest.mark.parametrize(
    ("operation", "rule", "count"),
    [
        ("add", lambda a, b: (a + b) % 7, 49),
        ("subtract", lambda a, b: (a - b) % 7, 49),
        ("multiply", lambda a, b: a * b % 7, 42),
        ("divide", lambda a, b: a * pow(b, -1, 7) % 7, 42),
    ],
)
def test_equations_are_true_and_complete(operation, rule, count):
    table = rows(operation, modulus=7)
    assert len(table) == count == len({(a, b) for a, _, b, _, _ in table.tolist()})
    assert all(c == rule(a, b) for a, _, b, _, c in table.tolist())
    assert set(table[:, 1].tolist()) == {8}
    assert set(table[:, 3].tolist()) == {7}


def test_s5_is_composition():
    elements = list(itertools.permutations(range(5)))
    table = rows("s5")
    assert len(table) == 120 * 120
    for a, _, b, _, c in table[::997].tolist():
        assert elements[c] == tuple(elements[a][i] for i in elements[b])


def test_sparse_parity_depends_on_the_first_bits_only():
    table = rows("sparse_parity", num_bits=12, num_relevant_bits=3, num_examples=500)
    assert torch.equal(table[:, :3].sum(1) % 2, table[:, -1])
    assert table.shape == (500, 14)
    assert 0.3 < table[:, -1].float().mean() < 0.7


def test_the_defaults_are_the_papers_task():
    data = AlgorithmicData()
    data.setup("fit")
    assert (len(data._splits[0]), len(data._splits[1])) == (4656, 4656)
    assert len(data.train_dataloader()) == 10
    assert data.num_tokens == 99


def test_the_split_is_seeded_and_leaves_nothing_out():
    def split(seed):
        data = AlgorithmicData("add", modulus=11, train_fraction=0.3, seed=seed)
        data.setup()
        return [{tuple(row) for row in part.rows.tolist()} for part in data._splits]

    (train, val), again, other = split(0), split(0), split(1)
    assert [train, val] == again != other
    assert len(train) == 36
    assert not train & val
    assert len(train | val) == 121


def test_batches_hold_question_and_answer():
    data = AlgorithmicData("add", modulus=5, batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (4, 4)
    a, b = batch["input_ids"][:, 0], batch["input_ids"][:, 2]
    assert torch.equal(batch["target"], (a + b) % 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulus": 2}, r"`AlgorithmicData\(modulus=2\)` must be at least 3"),
        ({"operation": "divide", "modulus": 9}, r"modulus=9\)` must be a prime for operation='divide'"),
        ({"train_fraction": 1.0}, r"train_fraction=1.0\)` must be in \(0, 1\)"),
        ({"batch_size": 0}, r"batch_size=0\)` must be at least 1"),
        ({"num_relevant_bits": 50}, r"num_relevant_bits=50\)` must be in \[1, 40\]"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmicData(**options)


def test_an_empty_side_of_the_split_is_an_error():
    data = AlgorithmicData("add", modulus=3, train_fraction=0.01)
    with pytest.raises(MisconfigurationException, match="leaves one side of the split empty: there are 9 examples"):
        data.setup()
