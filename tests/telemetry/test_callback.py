import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler, PyTorchProfiler, SimpleProfiler

from forge_lightning.callbacks import GeometryProbe, Grokfast, StageClassifier, Telemetry
from forge_lightning.core.callback import is_logging_step
from forge_lightning.core.trace import read_rows
from forge_lightning.data import AlgorithmicData
from forge_lightning.models import AlgorithmicModule
from forge_lightning.telemetry import step_timer
from forge_lightning.telemetry.callback import _Record
from tests.accelerator import ACCELERATOR
from tests.contract.modules import LossOnly, Plain, RaisesAtStep, Stateful, TwoOptimizers
from tests.contract.rows import fit


def observed(folder, module=Plain, callbacks=(), **kwargs):
    options = {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1}
    fit([*callbacks, Telemetry()], module, **options | kwargs)
    return list(read_rows(folder / "trace.jsonl"))


def steps(rows):
    return [row["step"] for row in rows if row["kind"] == "step"]


def values(rows, name):
    key = f"forge/telemetry/{name}"
    return [float(row["metrics"][key]) for row in rows if key in row.get("metrics", {})]


CLOCK = SimpleNamespace(now=0.0)


def busy(seconds):
    """Lets the clock of the step timer go on, where a test has put this one in."""
    CLOCK.now += seconds


def test_a_record_for_every_step_and_a_row_for_every_validation(tmp_path):
    rows = observed(tmp_path, max_epochs=2)
    assert rows[0]["kind"] == "header"
    assert steps(rows) == list(range(1, 17))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [8, 16]
    for row in rows:
        if row["kind"] == "validation":
            assert list(row["metrics"]) == ["val/loss"]


def test_every_validation_has_its_own_metrics(tmp_path):
    """Also where a value happens to be the same as before."""

    class Constant(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(1.0))

    rows = observed(tmp_path, Constant, max_epochs=20)
    found = [row["metrics"] for row in rows if row["kind"] == "validation"]
    assert found == [{"val/loss": 1.0}] * 20


def test_loss_is_that_of_the_step(tmp_path):
    observed(tmp_path)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ours = [float(row["forge/telemetry/loss"]) for row in rows if row["forge/telemetry/loss"]]
    theirs = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert ours == pytest.approx(theirs)
    assert len(ours) == 8


def test_accumulated_batches_are_one_record_with_their_mean(tmp_path):
    seen = []

    class Losses(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.item())
            return loss

    rows = observed(tmp_path, Losses, accumulate_grad_batches=4)
    assert steps(rows) == [1, 2]
    assert values(rows, "loss") == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4])


def test_a_module_of_ours_tells_success_perplexity_and_tokens(tmp_path):
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator=ACCELERATOR, devices=1, max_steps=3, log_every_n_steps=1,
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[Telemetry()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(AlgorithmicModule(dim=16, num_heads=2), AlgorithmicData(modulus=11, batch_size=20))
    rows = list(read_rows(tmp_path / "trace.jsonl"))
    for loss, perplexity in zip(values(rows, "loss"), values(rows, "perplexity"), strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert all(0 <= success <= 1 for success in values(rows, "success"))
    for tokens, examples in zip(values(rows, "tokens_per_second"), values(rows, "examples_per_second"), strict=True):
        assert tokens == pytest.approx(4 * examples)


def test_padding_is_not_counted_as_tokens():
    record, mask = _Record(), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    record.count({"input_ids": torch.ones(2, 5), "attention_mask": mask})
    assert (int(record.tokens), record.examples) == (7, 2)


def test_norms_before_and_after_clipping(tmp_path):
    rows = observed(tmp_path, gradient_clip_val=0.05)
    before, after = values(rows, "grad_norm_before"), values(rows, "grad_norm_after")
    assert min(before) > 0.06
    assert after == pytest.approx([0.05] * 8, rel=1e-4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_norms_before_and_after_the_filter(tmp_path, order):
    """Whether it stands before or behind `Telemetry`."""
    logger = CSVLogger(tmp_path, name="", version="")
    pair = [Grokfast(alpha=0.5, lamb=2.0, schedule="constant"), Telemetry()]
    fit([pair[i] for i in order], Plain, logger=logger, log_every_n_steps=1, gradient_clip_val=1e9)
    rows = list(read_rows(tmp_path / "trace.jsonl"))
    inner = [row["metrics"] for row in rows if row["kind"] == "step"]
    before, after = values(rows, "grad_norm_before"), values(rows, "grad_norm_after")
    assert all(b < a for b, a in zip(before, after, strict=True))
    assert before == pytest.approx([m["forge/grokfast/grad_norm_before"] for m in inner])
    assert after == pytest.approx([m["forge/grokfast/grad_norm_after"] for m in inner], rel=1e-4)


@pytest.mark.parametrize(("every", "log_every"), [(1, 4), (2, 3)])
def test_the_filter_is_measured_where_telemetry_records(tmp_path, every, log_every):
    """Also between the steps of ``log_every_n_steps``, and no longer once the fit is over."""
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"logger": logger, "log_every_n_steps": log_every}
    _, trainer = fit(
        [Grokfast(alpha=0.5, lamb=5.0, schedule="constant"), Telemetry(every_n_steps=every)], Plain, **options
    )
    rows = [r["metrics"] for r in read_rows(tmp_path / "trace.jsonl") if r["kind"] == "step"]
    recorded = [metrics for metrics in rows if "forge/telemetry/loss" in metrics]
    assert len(recorded) == 8 // every
    for metrics in recorded:
        assert metrics["forge/telemetry/grad_norm_before"] == metrics["forge/grokfast/grad_norm_before"]
        assert metrics["forge/telemetry/grad_norm_before"] < metrics["forge/telemetry/grad_norm_after"]
    trainer.fit_loop.epoch_loop._batches_that_stepped = 0
    assert is_logging_step(trainer) == (log_every == 1)


class Cleans(TwoOptimizers):
    """Clears the gradients after each step, and returns no loss, but something of the examples."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.manual_backward(self.loss(batch))
            optimizer.step()
            self.zero_grad()
        return {"example_loss": torch.ones(len(batch[0]))}


def test_what_a_manual_module_does_not_tell_is_not_logged(tmp_path):
    (first, *_) = [row["metrics"] for row in observed(tmp_path, Cleans) if row["kind"] == "step"]
    assert "forge/telemetry/grad_norm_before" in first
    assert not {f"forge/telemetry/{key}" for key in ("grad_norm_after", "loss", "perplexity")} & first.keys()


def test_a_loss_that_is_none_has_no_perplexity(tmp_path):
    class Loses(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss * math.nan, "example_loss": torch.full((8,), math.nan)}

    assert all(math.isnan(p) for p in values(observed(tmp_path, Loses), "perplexity"))


class Slow(Callback):
    """A callback of somebody else that takes its time."""

    def on_before_optimizer_step(self, *_):
        busy(0.01)

    def on_validation_epoch_start(self, *_):
        busy(0.2)


class SlowModule(Plain):
    def training_step(self, batch, batch_idx):
        busy(0.02)
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, *args, **kwargs):
        busy(0.005)
        super().optimizer_step(*args, **kwargs)

    def train_dataloader(self):
        class Loader:
            def __len__(inner):
                return 8

            def __iter__(inner):
                for batch in super(SlowModule, self).train_dataloader():
                    busy(0.008)
                    yield batch

        return Loader()


def test_times_have_their_causes_and_add_up(tmp_path, monkeypatch):
    """On a clock that goes on only where something takes its time; the validation's 0.2 s are not a step's."""
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
    rows = observed(tmp_path, SlowModule, [Slow()], max_epochs=2, log_every_n_steps=4)
    expected = {"data": 0.008, "forward_backward": 0.02, "optimizer": 0.005, "callbacks": 0.01, "other": 0.0}
    for part, seconds in expected.items():
        assert values(rows, f"{part}_seconds") == pytest.approx([seconds] * 4), part
    assert values(rows, "step_seconds") == pytest.approx([sum(expected.values())] * 4)
    assert values(rows, "examples_per_second") == pytest.approx([8 / sum(expected.values())] * 4)


def test_the_profiler_of_the_user_still_works_and_is_put_back(tmp_path):
    profiler = SimpleProfiler()
    _, trainer = fit([Telemetry()], Plain, profiler=profiler)
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["run_training_batch"]) == 8


def test_the_profiler_is_put_back_after_an_exception(tmp_path):
    trainers = []

    class Remembers(RaisesAtStep):
        def on_train_start(self):
            trainers.append(self.trainer)

    with pytest.raises(RuntimeError, match="on purpose"):
        observed(tmp_path, Remembers)
    assert isinstance(trainers[0].profiler, PassThroughProfiler)
    assert steps(read_rows(tmp_path / "trace.jsonl")) == [1, 2, 3]


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("at", [8, 11])
def test_a_resumed_trace_has_no_gap_and_no_repetition(tmp_path, same_folder, at):
    """The first run goes on after its checkpoint, as a run does that is killed later."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=at, filename="at", save_top_k=-1)
    straight = observed(tmp_path / "straight", Stateful, max_epochs=3)
    first = tmp_path / "first"
    observed(first, Stateful, [checkpoint], max_epochs=2, enable_checkpointing=True)
    with open(first / "trace.jsonl", "a") as file:
        file.write('{"kind":"step","step":17,"met')  # cut by the kill
    second = first if same_folder else tmp_path / "second"
    rows = observed(second, Stateful, max_epochs=3, ckpt_path=tmp_path / "at.ckpt")
    assert steps(rows) == list(range(1, 25)) == steps(straight)
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [8, 16, 24]
    assert sum(row["kind"] == "header" for row in rows) == 2, "the facts of each part"
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    assert seconds == sorted(seconds)


def test_events_and_sparse_values_are_in_the_trace_once(tmp_path):
    class Finds(Callback):
        state_key = "Finds"

        def __init__(self):
            self.events = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step in (3, 5):
                self.events.append({"kind": "found", "step": trainer.global_step})

    probe = GeometryProbe(every_n_steps=4, num_points=8, estimators=("two_nn",), max_overhead=None)
    rows = observed(tmp_path, Plain, [Finds(), probe], max_epochs=2, log_every_n_steps=3)
    assert [(r["event"], r["step"]) for r in rows if r["kind"] == "event"] == [("found", 3), ("found", 5)]
    probed = [r["step"] for r in rows if any("geometry" in key for key in r.get("metrics", {}))]
    assert probed == [4, 8, 12, 16]
    assert steps(rows) == sorted({*range(3, 17, 3), *probed})


def test_an_event_that_a_resumed_run_finds_again_is_in_the_trace_once(tmp_path):
    """Lightning saves at an epoch's end before the validation there, and does not repeat that validation."""

    class Finds(Callback):
        state_key = "Finds"

        def __init__(self):
            self.events = []

        def on_validation_end(self, trainer, *_):
            self.events = [{"kind": "found", "step": trainer.global_step}]

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="{step}", save_top_k=-1)
    rows = observed(tmp_path / "run", Stateful, [Finds(), checkpoint], max_epochs=2, enable_checkpointing=True)
    assert [r["step"] for r in rows if r["kind"] == "event"] == [8, 16]
    rows = observed(tmp_path / "run", Stateful, [Finds()], max_epochs=2, ckpt_path=tmp_path / "step=8.ckpt")
    assert [r["step"] for r in rows if r["kind"] == "event"] == [16]
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [8, 16]
    assert steps(rows) == list(range(1, 17))


def test_the_stage_is_in_every_row(tmp_path):
    rows = observed(tmp_path, Plain, [StageClassifier()])
    assert {row["stage"] for row in rows if row["kind"] == "step"} == {"unknown"}


def test_two_instances_write_two_traces(tmp_path):
    observed(tmp_path, Plain, [Telemetry(name="coarse", every_n_steps=4)])
    assert steps(read_rows(tmp_path / "trace.jsonl")) == list(range(1, 9))
    coarse = list(read_rows(tmp_path / "trace_coarse.jsonl"))
    assert steps(coarse) == [4, 8]
    assert {key for row in coarse for key in row.get("metrics", {}) if key.endswith("/loss")} == {
        "forge/telemetry/coarse/loss", "val/loss",
    }  # fmt: skip


def test_nothing_is_written_without_a_logger_or_in_a_dev_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit([Telemetry()])
    fit([Telemetry()], logger=CSVLogger(tmp_path), fast_dev_run=1)
    fit([Telemetry(trace=False)], LossOnly, logger=CSVLogger(tmp_path, name="", version=""))
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv"}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Telemetry(every_n_steps=0)
    with pytest.raises(ValueError, match="max_rows=0"):
        Telemetry(max_rows=0)


def test_a_logger_without_a_folder_for_each_run_gets_one(tmp_path):
    class Shared(CSVLogger):
        """As `WandbLogger` is."""

        log_dir = None

        @property
        def save_dir(self):
            return str(tmp_path)

        @property
        def experiment(self):
            return self

        def log_metrics(self, *args, **kwargs):
            pass

        save = log_hparams = finalize = log_metrics

    fit([Telemetry()], Plain, logger=Shared(tmp_path, name="project", version="abc"), log_every_n_steps=1)
    assert (tmp_path / "project" / "abc" / "trace.jsonl").exists()


def test_the_profiler_of_torch_is_not_torn_down_early(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="profile", export_to_chrome=False)
    fit([Telemetry()], Plain, profiler=profiler, max_steps=2)
    assert list(tmp_path.iterdir())


def test_sparse_gradients_have_a_norm(tmp_path):
    class Embeds(Plain):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(4, 8, sparse=True)

        def loss(self, batch):
            return super().loss((batch[0] + self.table(batch[1]), batch[1]))

    assert min(values(observed(tmp_path, Embeds), "grad_norm_before")) > 0


def test_callbacks_of_others_may_have_events_and_stages_of_their_own(tmp_path):
    class Other(Callback):
        events, stage = ["x"], torch.tensor(1)

    rows = observed(tmp_path, Plain, [Other(), StageClassifier()])
    assert steps(rows) == list(range(1, 9))
    assert {row["stage"] for row in rows if row["kind"] == "step"} == {"unknown"}


class Lazy(Plain):
    """Its first layer learns its size from the first batch."""

    def __init__(self):
        super().__init__()
        self.more = torch.nn.LazyLinear(3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + 0 * self.more(batch[0]).sum()


def test_facts_of_the_run_end_no_fit(tmp_path, monkeypatch):
    fit(
        [Telemetry()],
        Lazy,
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    header = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])
    assert header["module"] == "Lazy"
    assert header["parameters"] == header["trained_parameters"] > 0
    assert header["total_steps"] == 8
    monkeypatch.setattr("forge_lightning.telemetry.callback.run_facts", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="the facts of the run are unknown: ZeroDivisionError"):
        fit([Telemetry()], Plain, logger=CSVLogger(tmp_path / "b", name="", version=""), log_every_n_steps=1)
    assert json.loads((tmp_path / "b" / "trace.jsonl").read_text().splitlines()[0])["module"] == "Plain"
