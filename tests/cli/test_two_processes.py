"""Recipes on two processes, as Lightning and as `torchrun` start them, with their progress bars."""

import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
LAUNCH = {
    "lightning": [sys.executable, "-m", "forge_lightning.cli"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "forge_lightning.cli"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCH.values(), ids=LAUNCH)
@pytest.mark.parametrize(("recipe", "steps"), [("grokking_fast", 10), ("full_suite_tiny", 60)])
def test_a_recipe_trains_on_two_processes(launch, recipe, steps, tmp_path):
    options = [f"--trainer.max_steps={steps}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [*launch, "fit", "--config", f"{recipe}.yaml", "--trainer.accelerator=cpu", *options]
    process = processes.run(command, cwd=tmp_path)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    assert list(tmp_path.rglob("*.ckpt"))
