"""Callbacks in the Trainer of the package `pytorch_lightning`, whose classes are not those of `lightning`."""

import json
import types

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from forge_lightning import callbacks
from tests.contract.modules import examples

pl = pytest.importorskip("pytorch_lightning", minversion="2.6", reason="pytorch-lightning is not installed")

OBSERVERS = {
    "Calibration": lambda: callbacks.Calibration(),
    "GeometryProbe": lambda: callbacks.GeometryProbe(
        every_n_steps=2, num_points=8, estimators=["two_nn"], max_overhead=None
    ),
    "InterruptCheckpoint": lambda: callbacks.InterruptCheckpoint(),
    "RNGState": lambda: callbacks.RNGState(),
    "RunSummary": lambda: callbacks.RunSummary(monitor="val/loss", mode="min"),
    "StageClassifier": lambda: callbacks.StageClassifier(cross_entropy=True),
    "Telemetry": lambda: callbacks.Telemetry(),
}
ACT = {
    "DreamReplay": lambda: callbacks.DreamReplay(schedule=callbacks.Mix(0.5)),
    "Grokfast": lambda: callbacks.Grokfast(schedule="constant"),
    "SelfModel": lambda: callbacks.SelfModel(warmup_steps=0),
    "TemperatureCurriculum": lambda: callbacks.TemperatureCurriculum(warmup_steps=0),
}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(examples(), batch_size=8)

    val_dataloader = train_dataloader


def fit(*used, **options):
    pl.seed_everything(0, verbose=False)
    module = Module()
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(**defaults | options, callbacks=list(used))
    trainer.fit(module)
    return torch.cat([p.detach().flatten() for p in module.net.parameters()]), trainer


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_run_and_change_nothing(name):
    callback = OBSERVERS[name]()
    assert torch.equal(fit(callback)[0], fit()[0])


@pytest.mark.parametrize("name", ACT)
def test_callbacks_that_act_do_so(name):
    assert not torch.equal(fit(ACT[name]())[0], fit()[0])


@pytest.mark.parametrize("name", ACT)
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_are_refused(name, strategy):
    kind = getattr(pl.strategies, strategy)
    trainer = types.SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])
    with pytest.raises(MisconfigurationException, match="cannot work with (FSDP|DeepSpeed)"):
        ACT[name]().setup(trainer, Module(), "fit")


def test_run_summary_knows_the_checkpoints(tmp_path):
    save = pl.callbacks.ModelCheckpoint(monitor="val/loss", save_last=True)
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    fit(callbacks.RunSummary(monitor="val/loss", mode="min"), save, logger=logger, enable_checkpointing=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_checkpoint"] == save.best_model_path
    assert summary["last_checkpoint"] == save.last_model_path
    assert (tmp_path / "learning_curves.png").exists()
