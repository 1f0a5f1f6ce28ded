import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.callbacks import RunSummary
from forge_lightning.reports.learning_curves import read_metrics, split_of
from forge_lightning.run import run_summary
from tests.contract.modules import LossOnly, Plain, RaisesAtStep
from tests.contract.rows import fit


def summarised(tmp_path, module=LossOnly, threshold=0.6, **kwargs):
    options = {"monitor": "val/loss", "mode": "min", "threshold": threshold}
    fit([RunSummary(**options)], module, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2, **kwargs)
    return json.loads((tmp_path / "summary.json").read_text())


def test_summary_says_when_the_threshold_was_reached(tmp_path, capsys):
    summary = summarised(tmp_path, max_epochs=12, limit_val_batches=8)
    steps, values = read_metrics(tmp_path / "metrics.csv")["val/loss"]
    first = next(step for step, value in zip(steps, values, strict=True) if value <= 0.6)
    assert summary["steps_to_threshold"] == first + 1
    assert summary["best"] == pytest.approx(min(values))
    assert values[steps.index(summary["best_step"] - 1)] == pytest.approx(min(values))
    assert summary["steps"] == 96
    assert summary["status"] == "finished"
    assert summary["seconds"]["wall"] > 0
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "steps to val/loss ≤ 0.6" in shown
    assert f"at step {summary['best_step']}" in shown


def test_a_threshold_not_reached_is_said_so(tmp_path, capsys):
    summary = summarised(tmp_path, threshold=0.0)
    assert summary["steps_to_threshold"] is None
    assert "not reached" in capsys.readouterr().out


def test_a_failed_run_leaves_a_summary(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="on purpose"):
        summarised(tmp_path, RaisesAtStep)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed: RuntimeError: raised on purpose"
    shown = capsys.readouterr().out
    assert "Run failed: RuntimeError" in shown
    assert "on purpose" not in shown  # the error says it


def test_what_failed_before_it_began_leaves_nothing(tmp_path, capsys):
    class NoOptimizer(LossOnly):
        def configure_optimizers(self):
            raise RuntimeError("no optimizer")

    logger = CSVLogger(tmp_path, name="mine", version="version_0")
    with pytest.raises(RuntimeError, match="no optimizer"):
        fit([RunSummary()], NoOptimizer, logger=logger)
    assert "Run failed" not in capsys.readouterr().out
    model, trainer = fit([RunSummary()], logger=logger)
    model.prepare_data = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    summary = json.loads((tmp_path / "mine" / "version_0" / "summary.json").read_text())
    assert summary["status"] == "finished"


def test_a_resume_with_nothing_left_says_so(tmp_path, capsys):
    fit([RunSummary(), ModelCheckpoint(tmp_path, filename="last")], enable_checkpointing=True)
    assert "Nothing was trained" not in capsys.readouterr().out
    fit([RunSummary()], ckpt_path=tmp_path / "last.ckpt")
    assert "Nothing was trained: at step 8 this run is at its end already." in capsys.readouterr().out


def test_a_fit_that_goes_on_in_the_same_file_is_not_called_resumed(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(run_summary, "plot_learning_curves", lambda *_, title, **__: titles.append(title) or True)
    logger = CSVLogger(tmp_path, name="mine", version="version_0")
    model, trainer = fit([RunSummary(monitor="val/loss")], logger=logger, log_every_n_steps=2)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert trainer.global_step == 16
    assert titles == 2 * ["mine/version_0"]


def test_what_was_reached_before_a_resume_stays_reached(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(run_summary, "plot_learning_curves", lambda *_, title, **__: titles.append(title) or True)
    options = {"monitor": "val/loss", "mode": "min", "threshold": 10.0}
    logger = {"logger": CSVLogger(tmp_path, name="mine", version="version_0")}
    fit([RunSummary(**options), ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True, **logger)
    callback = RunSummary(**options)
    logger = {"logger": CSVLogger(tmp_path, name="mine", version="version_1")}
    fit([callback], max_epochs=2, ckpt_path=tmp_path / "last.ckpt", **logger)
    assert titles == ["mine/version_0", "mine/version_1, resumed after step 8"]
    assert callback.reached_at == 8
    again = RunSummary(**options)
    again.load_state_dict(callback.state_dict())
    assert again.state_dict()["best_at"] == callback._best_at > 8
    assert callback.seconds()["wall"] > callback._seconds_before["wall"] > 0


def test_nothing_is_written_without_a_logger_or_in_a_dev_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit([RunSummary()])
    fit([RunSummary()], logger=CSVLogger(tmp_path), fast_dev_run=1)
    assert not list(tmp_path.iterdir())


def test_mode_is_checked():
    with pytest.raises(ValueError, match=r"`RunSummary\(mode='best'\)` must be 'max' or 'min'"):
        RunSummary(mode="best")


def test_a_file_that_is_no_metrics_file_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column 'step'"):
        read_metrics(tmp_path / "metrics.csv")


def test_what_ended_a_run_is_what_is_seen(tmp_path, monkeypatch):
    """Words in brackets are no markup, and a summary that cannot be written does not hide them."""

    class Brackets(LossOnly):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("[/tmp/pair.cc:553] connection closed")

    with pytest.raises(RuntimeError, match="connection closed"):
        summarised(tmp_path, Brackets)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with (
        pytest.warns(UserWarning, match="the summary could not be written: OSError: .*No space left"),
        pytest.raises(RuntimeError, match="connection closed"),
    ):
        summarised(tmp_path, Brackets)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/loss", ("train", "loss")),
        ("val_loss", ("val", "loss")),
        ("loss/valid", ("val", "loss")),
        ("acc.eval", ("val", "acc")),
        ("train_loss_step", ("train", "loss_step")),
        ("val/token_accuracy", ("val", "token_accuracy")),
        ("training", None),
        ("value/loss", None),
        ("forge/dream/val/loss", None),
    ],
)
def test_split_of_a_metric(name, split):
    assert split_of(name) == split


def test_a_last_checkpoint_that_is_older_than_the_end_is_told(tmp_path, capsys):
    kwargs = {"max_steps": 7, "max_epochs": -1, "logger": CSVLogger(tmp_path, name="", version="")}
    checkpoint = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=3)
    fit([RunSummary(monitor="val_loss", mode="min"), checkpoint], LossOnly, enable_checkpointing=True, **kwargs)
    shown = capsys.readouterr().out
    assert "kept.ckpt, 1 steps before the end" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["last_checkpoint_step"], summary["steps"]) == (6, 7)
    others = [checkpoint, ModelCheckpoint(tmp_path, filename="whole", every_n_train_steps=7)]
    fit([RunSummary(), *others], LossOnly, enable_checkpointing=True, **kwargs)
    assert "last checkpoint" not in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["last_checkpoint"].endswith("whole.ckpt")


def test_usual_names_of_the_monitored_are_known(tmp_path, capsys):
    class Usual(LossOnly):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

    summary = summarised(tmp_path, Usual)
    assert summary["monitor"] == "val_loss"
    assert summary["best"] > 0
    assert "last val_loss" in capsys.readouterr().out


class Named(LossOnly):
    names = ("loss", "loss/val")

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log(self.names[0], loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(self.names[1], self.loss(batch))


def test_metrics_of_other_names_are_drawn_and_where_none_are_it_says_so(tmp_path, capsys):
    summary = summarised(tmp_path / "named", Named)
    assert (tmp_path / "named" / "learning_curves.png").exists()
    assert "not logged; close: loss, loss/val" in capsys.readouterr().out
    assert (summary["best"], summary["best_checkpoint"], summary["last_checkpoint"]) == (None, None, None)
    summarised(tmp_path / "unvalidated", limit_val_batches=0)
    assert "not measured: no validation has run" in capsys.readouterr().out
    Named.names = ("one", "two")
    with pytest.warns(UserWarning, match="no metric is called `train/...` or `val/...`, and there are no learning"):
        summarised(tmp_path / "none", Named)
    assert not (tmp_path / "none" / "learning_curves.png").exists()


def test_the_best_checkpoint_is_that_of_what_is_monitored(tmp_path):
    last = ModelCheckpoint(tmp_path / "last", filename="last")
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", mode="max", filename="{epoch}")
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [last, best, RunSummary(monitor="val/loss", mode="min")]
    fit(callbacks, logger=logger, max_epochs=3, enable_checkpointing=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_checkpoint"] == str(tmp_path / "best" / "epoch=0.ckpt")
    assert summary["last_checkpoint"] == str(tmp_path / "last" / "last.ckpt")


def test_tensorboard_gets_the_picture_and_the_summary(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="board", version="")]
    fit([RunSummary(monitor="val/loss", mode="min")], Plain, logger=loggers, log_every_n_steps=1, max_epochs=2)
    loggers[1].experiment.close()
    found = EventAccumulator(str(tmp_path / "board"))
    found.Reload()
    assert found.Tags()["images"] == ["learning_curves"]
    (image,) = found.Images("learning_curves")
    assert image.step == 16
    assert image.width > 300
    (text,) = found.Tensors("summary/text_summary")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert f"| best | {summary['best']} |" in text.tensor_proto.string_val[0].decode()


class WandbLogger(CSVLogger):
    """Of the name of Lightning's, without the service."""

    def __init__(self, folder):
        super().__init__(folder, name="", version="")
        self.images, self.summary = {}, {}
        self.writer = super().experiment

    @property
    def experiment(self):
        return type("Run", (), {"summary": self.summary, "metrics": self.writer.metrics})

    def log_metrics(self, metrics, step=None):
        self.writer.log_metrics(metrics, step)

    def save(self):
        self.writer.save()

    def log_image(self, key, images):
        self.images[key] = images


def test_wandb_gets_the_picture_and_the_summary(tmp_path):
    logger = WandbLogger(tmp_path)
    fit([RunSummary(monitor="val/loss", mode="min")], Plain, logger=logger, log_every_n_steps=1, max_epochs=2)
    assert logger.images == {"learning_curves": [str(tmp_path / "learning_curves.png")]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert logger.summary["summary/best"] == summary["best"]
    assert logger.summary["summary/status"] == "finished"


def test_a_run_without_a_validation_is_told_at_its_start():
    summary = RunSummary(monitor="val/loss", mode="min")
    with pytest.warns(UserWarning, match="no validation will run: the first is due after 8 batches"):
        fit([summary], Plain, max_steps=3, max_epochs=None)
    with pytest.warns(UserWarning, match="the first is due after 24 batches, and the run ends after 8"):
        fit([RunSummary(monitor="val/loss", mode="min")], Plain, max_steps=8, check_val_every_n_epoch=3)
    fit([RunSummary(monitor="val/loss", mode="min")], Plain, max_steps=8, max_epochs=None)
