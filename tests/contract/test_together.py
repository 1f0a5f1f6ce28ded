"""Callbacks that work alone must work together, in any order."""

import random
from itertools import combinations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.contract.cases import CASES
from tests.contract.modules import Stateful, with_choices
from tests.contract.rows import fit, weights


def run(cases, **kwargs):
    more = kwargs.pop("callbacks", [])
    model, _ = fit([*(case.build() for case in cases), *more], with_choices(Stateful), **kwargs)
    return weights(model)


def one_of_each():
    by_type = {type(case.build()): case for case in CASES}
    return list(by_type.values())


@pytest.mark.parametrize("seed", range(3))
def test_all_at_once_in_any_order(seed):
    """Observers change nothing, whoever else is there: only those that act decide the weights."""
    cases = one_of_each()
    random.Random(seed).shuffle(cases)
    acting = [case for case in cases if not case.observer]
    assert torch.equal(run(cases, max_epochs=2), run(acting, max_epochs=2))


def test_all_at_once_resume_inside_an_epoch(tmp_path):
    cases = one_of_each()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="five", save_top_k=-1)
    straight = run(cases, max_epochs=2, callbacks=[checkpoint], enable_checkpointing=True)
    torch.load(tmp_path / "five.ckpt", weights_only=True)
    assert torch.equal(run(cases, max_epochs=2, ckpt_path=tmp_path / "five.ckpt"), straight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GeometryProbe. no .* points are too few:UserWarning")  # one example, drawn often
@pytest.mark.parametrize("pair", list(combinations(CASES, 2)), ids=lambda pair: f"{pair[0]}+{pair[1]}")
def test_every_pair(pair):
    a, b = pair
    if type(a.build()) is type(b.build()):
        pytest.skip("two instances of one class: the row `two_instances`")
    acting = [case for case in pair if not case.observer]
    for order in (pair, pair[::-1]):
        assert torch.equal(run(order), run(acting))
