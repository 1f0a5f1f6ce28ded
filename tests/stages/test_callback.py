import json
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.callbacks import GeometryProbe, Grokfast, StageClassifier, Telemetry, TrainingStage
from forge_lightning.core.trace import read_rows
from forge_lightning.data import AlgorithmicData
from forge_lightning.models import AlgorithmicModule
from forge_lightning.stages.classifier import replay
from tests.accelerator import ACCELERATOR
from tests.contract.modules import LossOnly, Plain, Stateful, TwoOptimizers
from tests.contract.rows import fit


class Scripted(LossOnly):
    """Says at every step what a run that groks would say: memorised at step 80, generalised at step 280."""

    def training_step(self, batch, batch_idx):
        step = self.global_step
        loss = super().loss(batch) * 0 + max(0.02, 4 * math.exp(-step / 30))
        right = min(1.0, step / 80)
        return {"loss": loss, "example_success": torch.full((len(batch[0]),), right)}

    def validation_step(self, batch, batch_idx):
        progress = min(1.0, max(0.0, (self.global_step - 120) / 160))
        self.log("val/loss", 5 * math.exp(-4 * progress))
        self.log("val/accuracy", progress)


def run(callbacks, module=Scripted, **kwargs):
    return fit(callbacks, module, **{"max_epochs": 40} | kwargs)


def test_the_stages_of_a_run_are_named_and_published():
    seen = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(int(trainer.callback_metrics["forge/stage/number"]))

    classifier = StageClassifier()
    run([classifier, Reads()])
    after = [event["after"] for event in classifier.events]
    assert after == ["memorisation", "onset", "generalisation", "consolidation"]
    assert classifier.current is TrainingStage.CONSOLIDATION
    assert classifier.stage == "consolidation"
    assert seen[0] == TrainingStage.UNKNOWN
    assert sorted(set(seen)) == [0, 1, 2, 3, 4]
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", [None, "second"])
def test_named_grokfast_is_evidence_as_the_unnamed_one_is(name):
    class Moves(Scripted):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return outputs | {"loss": outputs["loss"] + 1e-6 * self.loss(batch)}

    classifier = StageClassifier()
    run([Grokfast(name=name, schedule="constant"), classifier], Moves, log_every_n_steps=1)
    evidence = [event["evidence"] for event in classifier.events]
    assert evidence
    assert all(math.isfinite(each["cosine"]) and math.isfinite(each["grad_norm"]) for each in evidence)


def test_a_stage_drives_grokfast():
    """λ is that of the stage, from the step after it was declared."""
    lambs = {}

    class Collects(Callback):
        def on_train_batch_end(self, trainer, *_):
            if "forge/grokfast/lamb" in trainer.callback_metrics:
                lambs[trainer.global_step] = float(trainer.callback_metrics["forge/grokfast/lamb"])

    classifier = StageClassifier()
    grokfast = Grokfast(schedule="by_stage", lamb=3.0, stage_lambs={1: 1.5, 3: 3.0})
    run([classifier, grokfast, Collects()], log_every_n_steps=1)
    since = {event["after"]: event["step"] for event in classifier.events}
    assert lambs[since["memorisation"]] == 0
    assert lambs[since["memorisation"] + 1] == 1.5
    assert lambs[since["onset"] + 1] == 0
    assert lambs[since["generalisation"] + 1] == 3.0


@pytest.mark.parametrize("last", [True, False])
def test_a_fall_of_the_last_layers_dimension_is_evidence(last):
    class Falls(Callback):
        def __init__(self):
            self.events = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 110:
                self.events.append({"kind": "geometry", "step": 110, "direction": "down", "last_layer": last})

    classifier = StageClassifier()
    run([Falls(), classifier])
    onset = next(event for event in classifier.events if event["after"] == "onset")
    assert (onset["reason"] == "the dimension of the last layer has fallen") == last
    assert (onset["step"] <= 144) == last


def test_a_loss_that_breaks_is_seen_before_the_next_validation():
    class Breaks(Scripted):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            if self.global_step >= 12:
                outputs["loss"] = outputs["loss"] * math.nan
            return outputs

    classifier = StageClassifier()
    run([classifier], Breaks, max_steps=15, log_every_n_steps=1, check_val_every_n_epoch=100)
    assert classifier.events[-1]["after"] == "divergence"
    assert classifier.events[-1]["step"] == 13


def test_a_module_that_returns_no_loss_is_told_so():
    classifier = StageClassifier()
    with pytest.warns(UserWarning, match="`training_step` has returned no loss since the last validation"):
        run([classifier], TwoOptimizers, max_epochs=3)
    assert classifier.stage == "unknown"


@pytest.mark.parametrize("every", [20, 100, 203])
def test_resume_names_the_same_stages(tmp_path, every):
    """Inside an epoch: Lightning saves before the validation that ends one, and does not repeat it on a resume."""

    def stages(**kwargs):
        classifier = StageClassifier()
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=every, filename="{step}", save_top_k=-1)
        run([classifier, checkpoint], enable_checkpointing=True, **kwargs)
        return classifier

    straight = stages()
    resumed = stages(ckpt_path=tmp_path / f"step={every}.ckpt")
    assert [(e["step"], e["after"]) for e in resumed.events] == [(e["step"], e["after"]) for e in straight.events]


def test_what_was_found_online_is_found_again_in_the_trace(tmp_path):
    classifier = StageClassifier()
    trainer = Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        max_steps=300,
        max_epochs=-1,
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        callbacks=[
            GeometryProbe(every_n_steps=10, num_points=60, positions="last", max_overhead=None),
            classifier,
            Telemetry(),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(0)
    module = AlgorithmicModule(dim=32, num_heads=2, num_layers=1, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    trainer.fit(module, AlgorithmicData(modulus=13, batch_size=60))
    again = replay(read_rows(tmp_path / "trace.jsonl"))
    assert [(t.step, t.after.label) for t in again] == [(e["step"], e["after"]) for e in classifier.events]
    assert again
    recorded = [row for row in read_rows(tmp_path / "trace.jsonl") if row.get("event") == "stage"]
    assert json.loads(json.dumps(recorded[0]["evidence"])).keys() == again[0].evidence.keys()


def test_without_example_success_losses_are_compared():
    """A third-party module: `exp(-loss)`, which is no success, and is not called one."""
    classifier = StageClassifier(cross_entropy=True)
    fit([classifier], Plain, max_epochs=3, limit_val_batches=8)
    evidence = classifier._machine.evidence
    assert 0.3 < evidence["train_likelihood"] < 1
    assert "train_success" not in evidence
    assert abs(evidence["gap"]) < 0.1


@pytest.mark.parametrize("name", ["val_loss", "valid_loss", "validation_loss", "valid/loss", "eval_loss"])
def test_usual_names_of_the_loss_are_found(name):
    class Usual(LossOnly):
        def validation_step(self, batch, batch_idx):
            self.log(name, 2.5)

    classifier = StageClassifier(cross_entropy=True)
    fit([classifier], Usual, max_epochs=3, limit_val_batches=8)
    assert classifier._machine.evidence["val_likelihood"] == pytest.approx(math.exp(-2.5))


def test_a_logged_training_accuracy_is_success():
    class Logs(LossOnly):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", 0.9)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            self.log_dict({"val_loss": 1.0, "val_acc": 0.5})

    classifier = StageClassifier()
    fit([classifier], Logs, max_epochs=6)
    assert classifier._machine.evidence["train_success"] == pytest.approx(0.9)
    assert classifier._machine.evidence["gap"] == pytest.approx(0.4)


def test_a_loss_of_unknown_kind_says_what_it_leaves_out():
    with pytest.warns(UserWarning, match="only plateau and divergence are named. Return") as told:
        _, trainer = fit([StageClassifier()], Plain, max_epochs=4, limit_val_batches=8)
    assert sum("no success of both" in str(w.message) for w in told) == 1
    assert trainer.callback_metrics["forge/stage/gap"].isnan()


def test_a_success_that_nobody_logs_is_told():
    with pytest.warns(UserWarning, match=r"nothing logs `val_success='val/los'`.* Close: \['val/loss'"):
        fit([StageClassifier(val_success="val/los")], LossOnly, max_epochs=5)


class Misnamed(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val/mine", self.loss(batch))


def test_a_validation_without_the_metric_is_refused_in_the_sanity_check():
    with pytest.raises(MisconfigurationException, match=r"val_loss='val/loss'.*Logged so far: .*'val/mine'"):
        fit([StageClassifier()], Misnamed, num_sanity_val_steps=1)


def test_a_validation_without_the_metric_does_not_end_a_fit():
    classifier = StageClassifier()
    with pytest.warns(UserWarning, match="val_loss='val/loss'.*nothing logs this metric.*stays what it is"):
        _, trainer = fit([classifier], Misnamed, max_epochs=3)
    assert trainer.state.finished
    assert classifier.events == []


def test_no_validation_is_said_once():
    classifier = StageClassifier()
    with pytest.warns(UserWarning, match="there is no validation data") as caught:
        fit([classifier], Stateful, max_epochs=20, limit_val_batches=0)
    assert sum("no validation data" in str(w.message) for w in caught) == 1
    assert {event["after"] for event in classifier.events} <= {"plateau", "unknown"}


def test_validation_every_few_epochs_is_validation():
    classifier = StageClassifier()
    fit([classifier], Plain, max_epochs=4, check_val_every_n_epoch=4)
    assert classifier._machine.state_dict()["numbers"]["_count"] == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`StageClassifier`: `window=2`"):
        StageClassifier(window=2)
