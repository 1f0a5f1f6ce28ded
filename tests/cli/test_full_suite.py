"""Every enhancement at once, from the command line, stopped in the middle of a sleep and taken up again."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from forge_lightning.cli.main import main

CONFIG = Path(__file__).parents[2] / "configs/full_suite_tiny.yaml"


class StopsInSleep(Callback):
    """Ends the run between two steps of a sleep, as a signal does, with a checkpoint.

    Args:
        path: Of the checkpoint.
        calls: How often it is asked before.
    """

    def __init__(self, path: str, calls: int) -> None:
        self.path, self.calls = path, calls

    def stop_if_asked(self, trainer):
        self.calls -= 1
        if self.calls == 0:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def suite(*more):
    """The shipped recipe, in nine steps: a sleep of three after each four, validation between.

    A validation that comes right after the step of a checkpoint is not repeated when Lightning resumes from it.
    """
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"]["batch_size"] = 2
    config["trainer"] |= {"max_steps": 9, "val_check_interval": 3, "limit_val_batches": 1}
    callbacks = [c for c in config["trainer"]["callbacks"] if c["class_path"] != "RichProgressBar"]
    config["trainer"] |= {"callbacks": [*callbacks, *more], "enable_progress_bar": False}
    for callback in callbacks:
        if callback["class_path"] == "DreamReplay":
            options = callback["init_args"]
            options["probe_size"] = 2
            options["schedule"]["init_args"] |= {"every_n_steps": 4, "num_steps": 3}
            options["programs"]["problems_per_cycle"] = 2
    Path("suite.yaml").write_text(yaml.safe_dump(config))


def last_weights():
    newest = max(Path("runs").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(newest, weights_only=True)["state_dict"]


@pytest.mark.filterwarnings("ignore")  # what short runs of tiny models give cause to
def test_the_full_suite_goes_on_bit_by_bit_from_the_middle_of_a_sleep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])
    monkeypatch.delenv("FORGE_MBPP", raising=False)
    suite()
    assert main(["fit", "--config=suite.yaml"]) == 0
    straight = last_weights()
    stops = {"path": "asleep.ckpt", "calls": 1}
    suite({"class_path": f"{__name__}.StopsInSleep", "init_args": stops})
    assert main(["fit", "--config=suite.yaml"]) == 130
    state = torch.load("asleep.ckpt", weights_only=True)["callbacks"]["DreamReplay"]["ranks"][0]
    assert state["counters"]["remaining"] == 2
    assert state["programs"]["augmenter"]["tried"]
    suite()
    assert main(["fit", "--config=suite.yaml", "--ckpt_path=asleep.ckpt"]) == 0
    resumed = last_weights()
    assert straight.keys() == resumed.keys()
    for name, weights in straight.items():
        assert torch.equal(weights, resumed[name]), name
