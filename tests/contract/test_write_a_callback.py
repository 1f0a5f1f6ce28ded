"""The two callbacks of `docs/write_a_callback.md` keep every promise of the contract."""

import re
import sys
import types
from pathlib import Path

import pytest

from tests.contract.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "write_a_callback.md"


def page_module():
    """The classes and contract lines of the page, without the fits between them, importable by worker processes."""
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    module = types.ModuleType("write_a_callback_page")
    sys.modules[module.__name__] = module
    for block in blocks:
        if "trainer.fit" not in block:
            exec(compile(block, str(PAGE), "exec"), module.__dict__)
    return module


CASES = page_module().CASES


def test_page_has_both_kinds():
    assert [case.id for case in CASES] == ["confidence-penalty", "norm-floor"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_promise(case, row, tmp_path):
    if row.__name__ in case.exempt:
        pytest.skip(case.exempt[row.__name__])
    row(case, tmp_path)
