"""The two-process rows, one launch for all cases. See `distributed.py`."""

import json
from pathlib import Path

import pytest

from tests import processes
from tests.contract import distributed
from tests.contract.cases import CASES

ROOT = Path(__file__).parents[2]


KINDS = [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("ddp", "fsdp2")]


@pytest.fixture(scope="module", params=KINDS)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    process = processes.run_module("tests.contract.distributed", request.param, folder, cwd=ROOT)
    report = folder / f"{request.param}.json"
    assert report.exists(), process.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("row", distributed.ROWS, ids=lambda row: row.__name__)
def test_every_case_on_two_processes(results, row):
    for case in CASES:
        result = results[f"{case.id}-{row.__name__}"]
        assert result == "passed" or result.startswith("exempt: "), f"{case.id}: {result}"


def test_muon_on_two_processes(results):
    assert results["muon"] == "passed", results["muon"]


def test_two_processes_that_read_nothing_train_as_those_that_do(results):
    assert results["unread"] == "passed", results["unread"]


def test_numbers_of_one_rank_are_caught():
    """Negative control of `logs_agree`."""
    case = next(case for case in CASES if case.id == "calibration")
    same = {"forge/calibration/nll": 1.0, "forge/calibration/ece": float("nan")}
    distributed.check_logs(case, same, dict(same))
    with pytest.raises(AssertionError, match="forge/calibration/nll"):
        distributed.check_logs(case, same, same | {"forge/calibration/nll": 1.1})
    with pytest.raises(AssertionError, match="forge/calibration/ece"):
        distributed.check_logs(case, same, {"forge/calibration/nll": 1.0})
