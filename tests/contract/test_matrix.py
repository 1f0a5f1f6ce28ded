"""Every combination of `matrix.py`: one process with the rest of the tests, several with `make test-full`."""

import json
from pathlib import Path

import pytest

from forge_lightning import callbacks
from tests import processes
from tests.contract import matrix
from tests.contract.bad import NAIVE
from tests.contract.cases import CASES, Case

ROOT = Path(__file__).parents[2]


def launch(*arguments):
    return processes.run_module("tests.contract.matrix", *arguments, cwd=ROOT)


@pytest.mark.parametrize("kind", ["single", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp2"))])
def test_resumes_in_every_combination(kind, tmp_path):
    for case in CASES if kind != "single" else []:
        if kind not in case.exempt:
            victim = launch(kind, tmp_path, "--kill", case.id)
            assert victim.returncode != 0, f"{case.id} was not killed"
            assert not (tmp_path / f"{kind}.json").exists()
    process = launch(kind, tmp_path)
    report = tmp_path / f"{kind}.json"
    assert report.exists(), process.stderr[-3000:]
    results = json.loads(report.read_text())
    combinations = len(matrix.PRECISIONS) * len(matrix.ACCUMULATE)
    assert len(results) == sum(1 if kind in case.exempt else combinations for case in CASES)
    wrong = {name: result for name, result in results.items() if not result.startswith(("passed", "exempt: "))}
    assert not wrong, "\n".join(f"{name}: {result}" for name, result in wrong.items())


def test_the_naive_way_does_not_resume(tmp_path):
    with pytest.raises(AssertionError, match="end"):
        matrix.check("single", NAIVE, "32", 3, tmp_path)


class Forgetful(callbacks.SelfModel):
    """It begins its running means anew after a resume, which no weight shows."""

    def load_state_dict(self, state_dict):
        pass


def test_what_no_weight_shows_is_seen(tmp_path):
    build = lambda: Forgetful(form="forward", layers=["net.0", "net.2"], warmup_steps=3, watch_every_n_steps=3)  # noqa: E731
    with pytest.raises(AssertionError, match="top_ranks"):
        matrix.check("single", Case(build, id="forgetful"), "32", 1, tmp_path)


def test_a_torn_checkpoint_does_not_count(tmp_path):
    matrix.train("single", NAIVE, "32", 1, tmp_path)
    last, before = (tmp_path / f"step={step}.ckpt" for step in (16, 15))
    assert matrix.last_checkpoint(tmp_path) == last
    last.write_bytes(last.read_bytes()[:1000])
    assert matrix.last_checkpoint(tmp_path) == before
