"""Calibration measured on LightningModules; what holds for every callback is in tests/contract."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from forge_lightning.callbacks import Calibration, DreamReplay, Mix, TemperatureCurriculum
from forge_lightning.models import ForgeModule
from tests.accelerator import ACCELERATOR
from tests.contract.modules import LossOnly
from tests.contract.rows import fit
from tests.self_model.test_callback import GPT2, train
from tests.self_model.test_callback import text as text  # a fixture


class Sharp(LossOnly):
    """Labels drawn from known probabilities; the network's logits are four times as large."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(4 * torch.eye(3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = 2 * torch.randn(4096, 3, generator=generator)
        y = torch.multinomial(x.softmax(-1), 1, generator=generator).squeeze(1)
        return DataLoader(TensorDataset(x, y), batch_size=512)

    val_dataloader = test_dataloader = train_dataloader


def all_of(model):
    with torch.no_grad():
        batches = [(model.net(x), y) for x, y in model.val_dataloader()]
    return (torch.cat(parts) for parts in zip(*batches, strict=True))


def test_overconfident_model_gets_its_temperature_and_is_mended_by_it(tmp_path):
    callback = Calibration(max_rows=None)
    logger = CSVLogger(tmp_path, name="", version="")
    model, trainer = fit([callback], Sharp, max_epochs=2, limit_val_batches=None, logger=logger)
    found = {k.rsplit("/", 1)[1]: float(v) for k, v in trainer.callback_metrics.items() if "calibration" in k}
    assert found["temperature"] == pytest.approx(4.0, rel=0.05)
    assert found["ece_fitted"] < 0.2 * found["ece"]
    assert found["nll_fitted"] < found["nll"]
    logits, y = all_of(model)
    expected = MulticlassCalibrationError(3, n_bins=15, norm="l1")(logits.softmax(-1), y)
    assert found["ece"] == pytest.approx(float(expected), abs=1e-5)  # summed in fp32 there
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == y).float().mean()))
    (result,) = trainer.test(model, verbose=False)
    assert result["forge/calibration/ece_fitted"] == pytest.approx(found["ece_fitted"], rel=1e-3)
    kept = json.loads((tmp_path / "calibration.json").read_text())
    assert set(kept) == {"val", "test"}
    bins = kept["val"]["bins"]
    assert sum(bins["as it is"]["total"]) == sum(bins["fitted"]["total"]) == 4096
    assert kept["val"]["fitted"] == kept["test"]["measured_at"] == pytest.approx(found["temperature"])


def test_first_validation_has_nothing_fitted_before():
    _, trainer = fit([Calibration()], Sharp, max_epochs=1)
    assert math.isnan(trainer.callback_metrics["forge/calibration/ece_fitted"])
    assert math.isfinite(trainer.callback_metrics["forge/calibration/ece"])


def test_temperature_travels_with_checkpoint_and_export(text, tmp_path):
    from transformers import AutoConfig

    checkpoint = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    callback = Calibration()
    module, trainer = train(
        ForgeModule(config=GPT2), text(), [callback, checkpoint], enable_checkpointing=True, max_steps=20
    )
    trainer.validate(module, datamodule=text(), verbose=False)
    fitted = callback.fitted_temperature
    assert module.fitted_temperature == fitted > 0
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    module.export(tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").fitted_temperature == pytest.approx(fitted)
    fresh = Calibration()
    again = ForgeModule(config=GPT2)
    _, trainer = train(again, text(), [fresh], max_steps=0)
    trainer.test(again, datamodule=text(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert fresh.fitted_temperature == again.fitted_temperature == fitted


def test_tokens_of_a_language_model_are_shifted_as_it_shifts_them(text):
    _, trainer = train(ForgeModule(config=GPT2), text(), [Calibration()], limit_val_batches=None)
    trainer.validate(_, datamodule=text(), verbose=False)
    metrics = trainer.callback_metrics
    assert float(metrics["forge/calibration/nll"]) == pytest.approx(float(metrics["val/loss"]), rel=1e-4)
    assert float(metrics["forge/calibration/accuracy"]) == pytest.approx(float(metrics["val/token_accuracy"]), rel=1e-5)


class Causal(LossOnly):
    """Tokens that repeat with period three; the loss shifts the labels, which are the tokens themselves."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(3, 16), nn.Linear(16, 3))

    def loss(self, batch):
        logits = self.net(batch["x"])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def train_dataloader(self):
        rows = [{"x": x, "labels": x} for x in (torch.arange(start, start + 9) % 3 for start in range(64))]
        return DataLoader(rows, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.parametrize("make", [Calibration, lambda: TemperatureCurriculum(weight=0.1)])
def test_labels_that_fit_better_shifted_are_told(make):
    with pytest.warns(UserWarning, match="the labels fit the positions before them much better.*`shift=True`"):
        fit([make()], Causal, max_epochs=4)


def test_shift_by_hand():
    _, trainer = fit([Calibration(shift=True)], Causal, max_epochs=4)
    metrics = trainer.callback_metrics
    assert float(metrics["forge/calibration/accuracy"]) == 1.0
    assert float(metrics["forge/calibration/nll"]) == pytest.approx(float(metrics["val/loss"]), rel=1e-3)


class TokensAlone(LossOnly):
    """A causal language model whose batches have no labels: they are the tokens."""

    def __init__(self):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        options = {key: value for key, value in GPT2.items() if key != "model_type"}
        self.net = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=11, **options))

    def loss(self, batch):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return self.net(**batch, labels=labels).loss

    def train_dataloader(self):
        lengths = (torch.arange(9) < length for length in (9, 6, 4, 9) * 8)
        generator = torch.Generator().manual_seed(0)
        rows = [
            {"input_ids": torch.randint(11, (9,), generator=generator), "attention_mask": mask.long()}
            for mask in lengths
        ]
        return DataLoader(rows, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def test_tokens_are_the_labels_where_a_causal_model_has_no_others(recwarn):
    callbacks = [TemperatureCurriculum(), Calibration(), DreamReplay(schedule=Mix(0.5, every_n_steps=2))]
    _, trainer = fit(callbacks, TokensAlone, log_every_n_steps=1)
    metrics = trainer.callback_metrics
    assert float(metrics["forge/calibration/nll"]) == pytest.approx(float(metrics["val/loss"]), rel=1e-4)
    assert any(key.startswith("forge/temperature/") and key.endswith("/nll") for key in metrics)
    assert not [str(w.message) for w in recwarn if "labels" in str(w.message)]  # DreamReplay scored its rows too


def test_temperature_at_the_end_of_its_range_is_told():
    class Sure(Sharp):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net.weight.copy_(200 * torch.eye(3))

    with pytest.warns(UserWarning, match="the fitted temperature is 10, and the search goes from 0.1 to 10"):
        fit([Calibration()], Sure)


def test_label_that_the_batch_has_not():
    """Without a sanity check, the fit goes on: what only reports does not end it."""
    with (
        pytest.warns(UserWarning, match="nothing is measured on val data: `labels='label'`: the batch"),
        pytest.warns(UserWarning, match="It is a list. That is a training batch; if those of validation are alike"),
    ):
        _, trainer = fit([Calibration(labels="label")])
    assert trainer.state.finished


def test_label_that_the_batch_has_not_stops_the_sanity_check():
    class Stepped(pl.Callback):
        steps = 0

        def on_train_batch_start(self, *args):
            Stepped.steps += 1

    with pytest.raises(MisconfigurationException, match=r"`labels='label'`: the batch has no such entry"):
        fit([Calibration(labels="label"), Stepped()], num_sanity_val_steps=1)
    assert Stepped.steps == 0


def test_a_sanity_check_measures_nothing():
    _, trainer = fit([Calibration()], Sharp, max_epochs=1, num_sanity_val_steps=2)
    assert math.isnan(trainer.callback_metrics["forge/calibration/ece_fitted"])
    assert math.isfinite(trainer.callback_metrics["forge/calibration/ece"])


def test_no_labels_that_fit():
    with pytest.warns(UserWarning, match="nothing is measured on val data: the labels are float32 numbers: no classes"):
        _, trainer = fit([Calibration(labels=0)])
    assert not any("calibration" in key for key in trainer.callback_metrics)


class OneOutput(LossOnly):
    """A network with one output, rising from batch to batch; the last batch is short."""

    def __init__(self, probability=False, logs=True):
        super().__init__()
        self.probability, self.logs = probability, logs
        self.net = nn.Sequential(nn.Linear(1, 1, bias=False), *([nn.Sigmoid()] if probability else []))
        nn.init.ones_(self.net[0].weight)

    def loss(self, batch):
        of = nn.functional
        loss = of.binary_cross_entropy if self.probability else of.binary_cross_entropy_with_logits
        return loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.logs:
            self.log("val/loss", loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self):
        x = torch.linspace(-2, 2, 43)[:, None]
        return DataLoader(TensorDataset(x, (torch.arange(43) % 3 > 0).float()[:, None]), batch_size=8)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize("probability", [True, False])
def test_all_batches_say_what_one_output_is(probability, logs):
    model, trainer = fit([Calibration()], OneOutput(probability, logs), limit_val_batches=None)
    x, y = model.val_dataloader().dataset.tensors
    expected = nn.functional.binary_cross_entropy_with_logits(x, y)
    assert float(trainer.callback_metrics["forge/calibration/nll"]) == pytest.approx(float(expected), rel=1e-5)
    accuracy = ((x > 0) == (y > 0)).float().mean()
    assert float(trainer.callback_metrics["forge/calibration/accuracy"]) == pytest.approx(float(accuracy))


def test_the_logged_loss_says_what_one_output_between_0_and_1_is():
    model = OneOutput()
    nn.init.constant_(model.net[0].weight, 0.25)
    model.net.insert(0, nn.ReLU())
    _, trainer = fit([Calibration()], model, limit_val_batches=None)
    assert float(trainer.callback_metrics["forge/calibration/nll"]) == pytest.approx(
        float(trainer.callback_metrics["val/loss"]), rel=1e-5
    )


class Weak(OneOutput):
    """All logits lie between 0 and 1; nothing says what the loss is."""

    where = None

    def __init__(self):
        super().__init__(logs=False)
        nn.init.constant_(self.net[0].weight, 0.25)
        self.net.insert(0, nn.ReLU())

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.where == "logged":
            self.log("valid/bce", loss)
        return loss if self.where == "returned" else None

    test_step = validation_step


@pytest.mark.parametrize("where", ["training", "logged", "returned"])
def test_what_one_output_is_where_all_are_between_0_and_1(where):
    model = Weak()
    model.where = where
    options = {"logger": False, "enable_progress_bar": False, "accelerator": ACCELERATOR, "devices": 1}
    trainer = pl.Trainer(max_epochs=1, callbacks=[Calibration()], enable_checkpointing=False, **options)
    if where == "training":
        trainer.fit(model)
    x, y = model.val_dataloader().dataset.tensors
    expected = float(nn.functional.binary_cross_entropy_with_logits(model.net(x), y).detach())
    model.test_dataloader = model.val_dataloader
    trainer.test(model, verbose=False)
    assert float(trainer.callback_metrics["forge/calibration/nll"]) == pytest.approx(expected, rel=1e-5)


def test_classes_counted_from_1_are_not_measured():
    class FromOne(Sharp):
        def loss(self, batch):
            return super().loss((batch[0], batch[1] - 1))

        def train_dataloader(self):
            x, y = super().train_dataloader().dataset.tensors
            return DataLoader(TensorDataset(x, y + 1), batch_size=4)

        val_dataloader = train_dataloader

    with pytest.warns(UserWarning, match="nothing is measured on val data: the labels hold 3 and never 0"):
        fit([Calibration()], FromOne(), limit_val_batches=5, limit_train_batches=2)


class SomeOdd(Sharp):
    """The second batch has labels that are none."""

    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            batch[1].copy_(torch.arange(len(batch[1])))
            self.net(batch[0])
        else:
            super().validation_step(batch, batch_idx)


def test_batches_left_out_are_told():
    with pytest.warns(UserWarning, match="batches of val data left out: 1, the last because the labels are no"):
        fit([Calibration()], SomeOdd(), limit_val_batches=3)


def test_bad_arguments_and_networks():
    with pytest.raises(ValueError, match=r"`Calibration\(num_bins=0\)` must be at least 1"):
        Calibration(num_bins=0)
    with pytest.raises(ValueError, match=r"`Calibration\(max_rows=0\)` must be at least 1, or None"):
        Calibration(max_rows=0)
    with pytest.raises(MisconfigurationException, match=r"`Calibration\(network='x'\)`: no submodule is called 'x'"):
        fit([Calibration(network="x")])

    class Flat(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 2), nn.Flatten(0))

        def loss(self, batch):
            return self.net(batch[0]).square().mean()

    with pytest.raises(MisconfigurationException, match=r"`Calibration`: the network returns \(16,\) for labels"):
        fit([Calibration()], Flat, num_sanity_val_steps=1)
