"""The two-process rows, one launch for all cases. See `distributed.py`."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.contract import distributed
from tests.contract.cases import CASES

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


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


def test_a_sleep_beside_a_head_on_two_processes(results):
    assert results["sleep_beside_a_head"] == "passed", results["sleep_beside_a_head"]


def test_two_processes_that_read_nothing_train_as_those_that_do(results):
    assert results["unread"] == "passed", results["unread"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_every_case_on_two_nodes(kind, tmp_path):
    """Two calls of `torchrun`, as on two machines, of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    script = ["-m", "tests.contract.distributed", kind, str(tmp_path)]
    commands = [[*TORCHRUN, *nodes, f"--node-rank={rank}", *script] for rank in (0, 1)]
    with processes.started(commands[1], cwd=ROOT, stderr=subprocess.DEVNULL):
        first = processes.run(commands[0], cwd=ROOT)
    report = tmp_path / f"{kind}.json"
    assert report.exists(), first.stderr[-3000:]
    wrong = {
        key: text for key, text in json.loads(report.read_text()).items() if not text.startswith(("passed", "exempt"))
    }
    assert not wrong, wrong


@pytest.mark.slow
def test_draws_and_replay_on_two_three_and_eight_ranks(tmp_path):
    for world in (2, 3, 8):
        options = ["--standalone", f"--nproc-per-node={world}"]
        process = processes.run([*TORCHRUN, *options, "-m", "tests.contract.ranks", str(tmp_path)], cwd=ROOT)
        assert (tmp_path / f"{world}.done").exists(), process.stderr[-3000:]


def test_numbers_of_one_rank_are_caught():
    """Negative control of `logs_agree`."""
    case = next(case for case in CASES if case.id == "calibration")
    same = {"forge/calibration/nll": 1.0, "forge/calibration/ece": float("nan")}
    distributed.check_logs(case, same, dict(same))
    with pytest.raises(AssertionError, match="forge/calibration/nll"):
        distributed.check_logs(case, same, same | {"forge/calibration/nll": 1.1})
    with pytest.raises(AssertionError, match="forge/calibration/ece"):
        distributed.check_logs(case, same, {"forge/calibration/nll": 1.0})
