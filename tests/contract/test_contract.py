"""Every public callback keeps the same promises. A new callback needs one line in `cases.py`."""

import pytest
import torch
from lightning.pytorch import Callback

from forge_lightning import callbacks
from tests.contract import distributed, naive
from tests.contract.cases import CASES, Case
from tests.contract.modules import FOREIGN
from tests.contract.rows import ADAPT, ROWS


def test_every_public_callback_has_a_case():
    public = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert public == {type(case.build()).__name__ for case in CASES}


def test_exemptions_name_rows():
    rows = {row.__name__ for row in (*ROWS, *distributed.ROWS)}
    modules = {f"foreign_modules: {module.__name__}" for module in FOREIGN}
    assert {row for case in CASES for row in case.exempt} <= rows | modules | {"ddp", "fsdp2"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_promise(case, row, tmp_path):
    if row.__name__ in case.exempt:
        pytest.skip(case.exempt[row.__name__])
    token = ADAPT.set(case.adapt)
    try:
        row(case, tmp_path)
    finally:
        ADAPT.reset(token)


NAIVE = Case(build=lambda: naive.NaiveGrokfast(alpha=0.9, lamb=2.0), id="naive")


@pytest.mark.parametrize("row", naive.MUST_FAIL)
def test_the_naive_way_breaks(row, tmp_path):
    """Negative control: the matrix sees what is wrong with the published recipe dropped into the obvious hook."""
    with pytest.raises((AssertionError, KeyError)):
        next(r for r in ROWS if r.__name__ == row)(NAIVE, tmp_path)
    assert torch.is_grad_enabled()
