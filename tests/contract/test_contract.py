"""Every public callback keeps the same promises. A new callback needs one line in `cases.py`."""

import pytest
import torch
from lightning.pytorch import Callback

from forge_lightning import callbacks
from tests.contract import distributed
from tests.contract.bad import MUST_FAIL
from tests.contract.cases import CASES
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


@pytest.mark.parametrize(("row", "case"), MUST_FAIL, ids=lambda part: str(part))
@pytest.mark.filterwarnings("ignore")
def test_a_bad_callback_is_caught(row, case, tmp_path):
    """Negative control: each row sees what breaks its promise."""
    with pytest.raises((AssertionError, AttributeError, KeyError, RuntimeError, TypeError)):
        next(r for r in ROWS if r.__name__ == row)(case, tmp_path)
    assert torch.is_grad_enabled()


def test_every_row_has_a_bad_callback():
    assert {row.__name__ for row in ROWS} == {row for row, _ in MUST_FAIL}
