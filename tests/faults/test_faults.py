"""What goes wrong in a long run ends it with a clear message, and the last checkpoint goes on bit by bit."""

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.faults.victim import AT

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("faults")  # one straight run for all


def run(folder, fault, checkpoint=None):
    folder.mkdir(exist_ok=True)
    return processes.run_module("tests.faults.victim", folder, fault, *([checkpoint] if checkpoint else []), cwd=ROOT)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("straight")
    result = run(folder, "none")
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "weights.pt", weights_only=True)


def goes_on(folder, checkpoint, step, straight):
    assert torch.load(checkpoint, weights_only=True)["global_step"] == step
    result = run(folder / "again", "none", checkpoint)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(folder / "again" / "weights.pt", weights_only=True), straight)


def test_sigterm(tmp_path, straight):
    result = run(tmp_path, "sigterm")
    assert not (tmp_path / "weights.pt").exists()
    assert "Stopping after this optimizer step" in result.stderr + result.stdout
    # Bit by bit also where it stands: the step that was running was finished.
    (checkpoint,) = tmp_path.rglob("interrupted.ckpt")
    goes_on(tmp_path, checkpoint, AT + 1, straight)


def test_sigkill(tmp_path, straight):
    result = run(tmp_path, "sigkill")
    assert result.returncode == -9
    goes_on(tmp_path, tmp_path / "last.ckpt", AT, straight)


def test_full_disk(tmp_path, straight):
    """The checkpoint that could not be written has not taken the place of the one before."""
    result = run(tmp_path, "full disk")
    assert result.returncode != 0
    assert "File too large" in result.stderr
    goes_on(tmp_path, tmp_path / "last.ckpt", AT, straight)


def test_a_data_worker_that_dies(tmp_path):
    result = run(tmp_path, "worker dies")
    assert result.returncode not in (0, -9)
    assert "DataLoader worker" in result.stderr
    # Which of torch's two messages comes depends on whether the signal or the empty queue is noticed first.
    assert "killed by signal" in result.stderr or "exited unexpectedly" in result.stderr
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] > 0


def test_a_nan_batch(tmp_path, straight):
    result = run(tmp_path, "nan")
    assert f"Grokfast: gradients are not finite at step {AT}" in result.stderr
    assert not torch.load(tmp_path / "weights.pt", weights_only=True).isfinite().all()
    goes_on(tmp_path, tmp_path / f"step={AT}.ckpt", AT, straight)


def test_a_rank_that_raises(tmp_path):
    result = run(tmp_path, "rank raises")
    assert result.returncode != 0
    assert "this rank gives up" in result.stderr
