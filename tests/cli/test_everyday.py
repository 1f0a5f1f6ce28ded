"""What people expect of a command line: a version, a run that goes on, classes beside the config, a schedule."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from forge_lightning import __version__
from forge_lightning.cli import forge_cli
from forge_lightning.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of the averaging in the recipe
QUICK = ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"forge-lightning {__version__}\n"


def last(folder):
    (path,) = folder.rglob("last.ckpt")
    return torch.load(path, weights_only=True)


def test_resume_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])
    fit = ["fit", "--config", "grokking_fast.yaml", *QUICK]
    assert main([*fit, "--trainer.max_steps=20"]) == 0
    straight = last(tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs")
    assert main([*fit, "--trainer.max_steps=10"]) == 0
    run = next((tmp_path / "runs").rglob("config.yaml")).parent.rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "runs")
    assert main(["resume", str(run), "--trainer.max_steps=20"]) == 0
    resumed = last(tmp_path / "runs")
    assert resumed["global_step"] == straight["global_step"] == 20
    for name, weight in straight["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    shutil.rmtree(run / "checkpoints")
    for arguments, message in (
        ([], "name the run's directory"),
        (["absent"], "`absent` holds no config.yaml"),
        ([str(run)], "holds no checkpoint"),
    ):
        assert main(["resume", *arguments]) == 2
        assert message in capsys.readouterr().err


MINE = """
from forge_lightning.models import AlgorithmicModule

class Mine(AlgorithmicModule):
    pass
"""


@pytest.mark.parametrize("beside", ["the working directory", "the config"])
def test_a_class_in_a_file_beside_is_found(beside, tmp_path, monkeypatch, capsys):
    folder, here = tmp_path / "project", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    name = "mine_of_" + beside.replace(" ", "_")
    (folder / f"{name}.py").write_text(MINE)
    config = {"model": {"class_path": f"{name}.Mine"}, "data": {"class_path": "AlgorithmicData"}}
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", [path for path in before if path])
    monkeypatch.chdir(folder if beside == "the working directory" else here)
    assert main(["check", "own.yaml" if beside == "the working directory" else str(folder / "own.yaml")]) == 0
    assert "valid. Mine on AlgorithmicData" in capsys.readouterr().out
    assert sys.path[: len(before) - before.count("")] == [path for path in before if path], "behind what is installed"


def test_a_schedule_from_yaml_lasts_as_long_as_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])
    text = {"class_path": "WarmupCosine", "init_args": {"warmup": 0.2, "end": 0.5}}
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"lr_scheduler": text}}}))
    config = ["--config", "grokking_fast.yaml", "--config", "schedule.yaml"]
    assert main(["fit", *config, *QUICK, "--trainer.max_steps=10"]) == 0
    saved = last(tmp_path / "runs")
    (schedule,) = saved["lr_schedulers"]
    assert (schedule["total_steps"], schedule["last_epoch"]) == (10, 10)
    assert schedule["_last_lr"] == pytest.approx([0.5 * rate for rate in schedule["base_lrs"]])


@pytest.mark.parametrize(("max_epochs", "shown"), [(-1, "Epoch 3"), (8, "Epoch 3/7")])
def test_a_progress_bar_names_no_negative_epoch(tmp_path, monkeypatch, max_epochs, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])
    bars = []
    mended = forge_cli._without_last_epoch
    monkeypatch.setattr(forge_cli, "_without_last_epoch", lambda bar: (bars.append(bar), mended(bar)))
    fit = ["fit", "--config", "grokfast_modular", "--data.modulus=11", "--model.dim=16", "--model.num_heads=2"]
    assert main([*fit, "--trainer.fast_dev_run=1", "--trainer.callbacks=RichProgressBar"]) == 0
    bars[0]._trainer = SimpleNamespace(max_epochs=max_epochs)
    assert bars[0]._get_train_description(3).strip() == shown
