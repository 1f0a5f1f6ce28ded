import contextlib
import csv
import math
import pickle
import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from forge_lightning.callbacks import DreamReplay, EdgeController, Grokfast, InterruptCheckpoint, RNGState, Sleep
from forge_lightning.components import DreamAugmenter
from forge_lightning.data import CodeTasks, GeneratedTasks, TextData
from forge_lightning.dream.code_augmentation import CodeExample
from forge_lightning.dream.memory import ReplayMemory
from forge_lightning.dream.options import MOVED, BatchFields, Mix, ProgramReplay, Storage
from forge_lightning.dream.progress import Progress
from forge_lightning.dream.session import ReplayStep
from forge_lightning.models import ForgeModule
from forge_lightning.sandbox import Sandbox
from tests.accelerator import ACCELERATOR, QUIET
from tests.cli.test_full_suite import StopsInSleep
from tests.contract.modules import LossOnly, Plain, Regression, Stateful, TwoOptimizers, examples, with_choices
from tests.contract.rows import fit, weights
from tests.dream.build import dream_replay

SLEEPS = {"mode": "cycle", "every_n_steps": 4, "num_steps": 3, "probe_size": 8, "batch_size": 8}
TINY = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 512}


class Watched(Plain):
    """Remembers the batches that it was trained on, and whether it was to log."""

    def __init__(self):
        super().__init__()
        self.batches, self.modes = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append([tensor.clone() for tensor in batch])
        self.modes.append(self.training)
        return super().training_step(batch, batch_idx)


class Outputs(Callback):
    def __init__(self):
        self.sizes = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sizes.append(len(outputs["example"]))


class Steps(Callback):
    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1


class PerExample(Plain):
    def training_step(self, batch, batch_idx):
        losses = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.log("train/loss", losses.mean())
        return {"loss": losses.mean(), "example": losses.detach(), "example_loss": losses.detach()}


def rows_in(tensor):
    return {tuple(row) for row in tensor.tolist()}


def test_mixed_batches_hold_what_was_seen_before_and_is_stored_exactly():
    replay = dream_replay(fraction=0.2, probe_size=8)
    model, _ = fit([replay], Watched, max_epochs=2)
    known = rows_in(model.batches[0][0])
    data = examples().tensors[0]
    total = 0
    for x, _ in model.batches[1:]:
        fresh, replayed = x[:8], x[8:]
        total += len(replayed)
        assert rows_in(replayed) <= known, "not what comes later"
        assert rows_in(replayed).isdisjoint(rows_in(data[:32:4])), "not the probe"
        known |= rows_in(fresh)
    assert total == pytest.approx(15 * 8 * 0.25, abs=1), "a fifth of the batch, on top; none while nothing is stored"
    assert len(replay.memory.buffer) == 64 - 8, "nothing is stored twice"
    assert replay.memory.buffer.num_seen == 2 * 64 - 2 * 8, "and what is replayed is not offered again"
    assert rows_in(replay.memory.buffer.read(replay.memory.buffer.slots()).rows["0"]) == rows_in(data) - rows_in(
        data[:32:4]
    )


def test_other_callbacks_see_the_fresh_rows_of_what_a_step_returns():
    outputs = Outputs()
    fit([dream_replay(fraction=0.5), outputs], PerExample)
    assert outputs.sizes == [8] * 8


def test_the_edge_controller_is_not_confused_by_replayed_rows():
    class Chosen(with_choices(PerExample)):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {"example_success": torch.ones(len(batch[0]))}

    edge = EdgeController(policy="item", target_range=(0.5, 0.9))
    fit([dream_replay(fraction=0.5), edge], Chosen)
    assert edge.success_rate == 1


def test_a_sleep_makes_the_steps_it_says_and_the_trainer_counts_none():
    seen = Steps()
    model, trainer = fit([dream_replay(**SLEEPS), seen], Watched, max_epochs=2)
    assert trainer.global_step == 16
    assert seen.steps == 16, "no other callback sees them"
    trained = [batch for batch, mode in zip(model.batches, model.modes, strict=True) if mode]
    assert len(trained) == 16 + 4 * 3
    measured = len(model.batches) - len(trained)
    assert measured == 4 * (2 * 8 + 1), "64 rows before and after each sleep, 8 of the probe after"


def test_learning_rates_and_schedules_are_left_alone():
    rates = []

    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    _, trainer = fit([dream_replay(**SLEEPS, lr_scale=0.1)], Scheduled)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**8)
    awake = [0.1 * 0.5**n for n in range(8)]
    asleep = [[0.1 * 0.1 * 0.5**n] * 3 for n in (4, 8)]
    assert rates == pytest.approx([*awake[:4], *asleep[0], *awake[4:], *asleep[1]])


def test_what_is_logged_is_of_the_loop_alone(tmp_path):
    def losses(callbacks, name):
        fit(callbacks, Plain, logger=CSVLogger(tmp_path, name=name, version=""), log_every_n_steps=1)
        with open(tmp_path / name / "metrics.csv") as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]

    plain = losses([], "plain")
    slept = losses([dream_replay(**SLEEPS)], "slept")
    assert slept[:4] == plain[:4], "the fourth is not that of a dream"
    assert len(slept) == len(plain) == 8


@pytest.mark.parametrize("with_callbacks", [False, True])
def test_whether_a_gradient_filter_sees_dreams_is_a_choice(with_callbacks):
    grokfast = Grokfast(alpha=0.9, lamb=2.0, schedule="constant")
    calls = []

    class Counting(Grokfast):
        def on_before_optimizer_step(self, *args):
            calls.append(1)
            super().on_before_optimizer_step(*args)

    grokfast.__class__ = Counting
    fit([dream_replay(**SLEEPS, with_callbacks=with_callbacks), grokfast], Plain)
    assert len(calls) == 8 + (6 if with_callbacks else 0)


def test_dropout_of_a_sleep_does_not_move_the_dropout_of_training():
    torch.manual_seed(0)
    fit([dream_replay(**SLEEPS)], LossOnly)
    after = torch.rand(1)
    fit([], LossOnly)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("strategy", ["uniform", "priority"])
@pytest.mark.parametrize("calls", [1, 3])
def test_a_run_stopped_in_the_middle_of_a_sleep_goes_on_bit_by_bit(strategy, calls, tmp_path):
    """In the first sleep, or the second; Grokfast comes after in the list of callbacks."""

    def made(*more):
        return [
            dream_replay(**SLEEPS, strategy=strategy, lr_scale=0.5),
            Grokfast(alpha=0.9, schedule="constant"),
            RNGState(),
            *more,
        ]

    straight, _ = fit(made(), Stateful, max_epochs=2)
    path = tmp_path / "asleep.ckpt"
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        fit(made(StopsInSleep(path, calls)), Stateful, max_epochs=2)
    saved = torch.load(path, weights_only=True)["callbacks"]["DreamReplay"]["ranks"][0]["counters"]
    assert saved["remaining"] == {1: 2, 3: 2}[calls]
    assert saved["replayed"][1] > 0  # whose losses the next log is to tell
    resumed, trainer = fit(made(), Stateful, max_epochs=2, ckpt_path=path)
    assert trainer.global_step == 16
    assert torch.equal(weights(resumed), weights(straight))


def test_ctrl_c_in_a_sleep_is_heard_between_its_steps(tmp_path):
    interrupt = InterruptCheckpoint(dirpath=str(tmp_path))

    class Impatient(Watched):
        def training_step(self, batch, batch_idx):
            if self.training and len(self.batches) == 4 + 8 + 1:  # 4 steps, 8 measured batches, in the second dream
                interrupt._receive(2, None)
            return super().training_step(batch, batch_idx)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit([dream_replay(**SLEEPS), interrupt], Impatient)
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert saved["callbacks"]["DreamReplay"]["ranks"][0]["counters"]["remaining"] == 1


@pytest.mark.filterwarnings("ignore:.*it will not sleep")
def test_state_of_two_processes_is_taken_over_by_one():
    first, second = dream_replay(**SLEEPS), dream_replay(**SLEEPS)
    fit([first], with_data(0))
    fit([second], with_data(1))
    one = dream_replay(**SLEEPS)
    one.load_state_dict({"ranks": [*first.state_dict()["ranks"], *second.state_dict()["ranks"]]})
    fit([one], Plain, max_steps=1)
    stored = rows_in(one.memory.buffer.read(one.memory.buffer.slots()).rows["0"])
    both = [rows_in(c.memory.buffer.read(c.memory.buffer.slots()).rows["0"]) for c in (first, second)]
    assert stored >= both[0] | both[1]


def with_data(seed):
    class Other(Plain):
        def train_dataloader(self):
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
            return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)

    return Other


@pytest.mark.filterwarnings("ignore:.*it will not sleep")
def test_without_the_buffer_in_checkpoints_a_resumed_run_begins_with_an_empty_one():
    replay = dream_replay(**SLEEPS, save_buffer=False)
    fit([replay], Plain)
    (state,) = replay.state_dict()["ranks"]
    assert set(state) == {"counters"}
    again = dream_replay(**SLEEPS, save_buffer=False)
    again.load_state_dict(replay.state_dict())
    fit([again], Plain, max_steps=1)
    assert again._progress.steps == 9


def test_intervals_follow_the_stage():
    class Staged(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            self.trainer.callback_metrics["forge/stage/number"] = torch.tensor(float(self.current_epoch))

    def cycles(by_stage):
        replay = dream_replay(**SLEEPS, every_n_steps_by_stage=by_stage)
        fit([replay], Staged, max_epochs=3)
        return replay._progress.cycles

    assert cycles({}) == 6
    assert cycles({1: 0}) == 4
    assert cycles({0: 0, 1: 2}) == 4 + 2
    assert cycles({0: 0, 1: 0, 2: 0}) == 0


def test_the_probe_is_kept_apart_and_forgetting_is_measured_on_it(tmp_path):
    """A second task undoes the first: the loss on the first examples rises over its lowest."""

    class Switch(Plain):
        def train_dataloader(self):
            x, y = examples(64).tensors
            return DataLoader(TensorDataset(x.repeat(4, 1), torch.cat([y, y, 1 - y, 1 - y])), batch_size=8)

    replay = dream_replay(fraction=0.01, capacity=4, every_n_steps=4, probe_size=16)
    logger = CSVLogger(tmp_path, name="", version="")
    fit([replay], Switch, logger=logger, log_every_n_steps=4)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["forge/dream/probe_loss"]]
    forgetting = [float(row["forge/dream/forgetting"]) for row in rows]
    assert forgetting[3] < 0.05
    assert forgetting[-1] > 0.1
    assert float(rows[-1]["forge/dream/probe_loss"]) - min(float(row["forge/dream/probe_loss"]) for row in rows) == (
        pytest.approx(forgetting[-1], abs=1e-5)
    )


class Told(Plain):
    """Loss and success of an example are known from its numbers, whatever the weights."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @staticmethod
    def outcomes(x):
        return x[:, 0].abs(), (x[:, 1] > 0).float()

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        loss, success = self.outcomes(batch[0])
        return {"loss": self.loss(batch), "example_loss": loss, "example_success": success}


def test_what_is_logged_of_replayed_rows_is_theirs():
    logged = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append({k.rsplit("/", 1)[1]: float(v) for k, v in trainer.callback_metrics.items() if "dream" in k})

    replay = dream_replay(fraction=0.5, probe_size=0)
    model, _ = fit([replay, Reads()], Told, log_every_n_steps=1)
    sizes = [len(x) for x in model.seen]
    assert sizes[0] == 8
    assert max(sizes) > 8
    for step, (x, found) in enumerate(zip(model.seen, logged, strict=True), start=1):
        assert found["share"] == pytest.approx(1 - 8 * step / sum(sizes[:step]))
        loss, success = (value[8:].mean().item() for value in model.outcomes(x))
        assert found["replay_loss"] == pytest.approx(loss, rel=1e-5, nan_ok=True)
        assert found["replay_success"] == pytest.approx(success, rel=1e-5, nan_ok=True)
    assert 0 < logged[-1]["frontier"] < logged[-1]["stored"] == len(replay.memory.buffer)


def test_what_is_logged_before_and_after_a_sleep_is_of_the_watched_rows():
    seen = {}

    class Reads(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({key: float(value) for key, value in trainer.callback_metrics.items()})
            seen["x"] = next(iter(replay.memory.watched.read(replay.memory.watched.slots()).rows.values()))

    replay = dream_replay(**SLEEPS | {"num_steps": 1, "every_n_steps": 8})
    fit([replay, Reads()], Told)
    loss, success = (float(value.mean()) for value in Told.outcomes(seen["x"]))
    assert 0 < success < 1
    for when in ("before", "after"):
        assert seen[f"forge/dream/loss_{when}"] == pytest.approx(loss, rel=1e-5)
        assert seen[f"forge/dream/success_{when}"] == pytest.approx(success, rel=1e-5)


def test_sleeping_on_stored_rows_lowers_their_loss():
    replay = dream_replay(**SLEEPS | {"num_steps": 30, "every_n_steps": 8})
    seen = {}

    class Reads(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    fit([replay, Reads()], Plain)
    assert seen["forge/dream/loss_after"] < seen["forge/dream/loss_before"] - 0.05
    assert seen["forge/dream/success_after"] >= seen["forge/dream/success_before"]
    fresh, replayed = replay._progress.computed
    assert (fresh, replayed) == (8 * 8 * 8, 30 * 8 * 8)


def test_manual_optimization_sleeps_too_and_says_that_nothing_is_measured():
    replay = dream_replay(**SLEEPS)
    seen = {}

    class Reads(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    _, trainer = fit([replay, Reads()], TwoOptimizers)
    assert trainer.global_step == 16
    assert replay._progress.cycles == 2
    assert math.isnan(seen["forge/dream/loss_before"])


@pytest.mark.parametrize("mode", ["mix", "cycle"])
@pytest.mark.filterwarnings("ignore:DreamReplay. the loss of single examples is unknown")
def test_a_manual_step_that_returns_nothing_is_stored(mode):
    """Also if no submodule is known to return logits."""

    class Manual(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            logits = self.second(self.first(batch[0]))
            self.manual_backward(torch.nn.functional.cross_entropy(logits, batch[1]))
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return DataLoader(examples(), batch_size=8)

    replay = dream_replay(mode=mode, every_n_steps=4, num_steps=1, probe_size=8)
    fit([replay], Manual, limit_val_batches=0)
    assert len(replay.memory.buffer) == 56
    if mode == "mix":
        assert replay._progress.computed[1] > 0


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_scores_from_logits_are_those_that_the_module_returns(offline, monkeypatch):
    seen = []

    def both(step, outputs):
        bare = {"loss": outputs["loss"]}
        count = len(outputs["example_loss"])
        seen.append((*step.scores.read(outputs, count), *step.scores.read(bare, count)))
        return returned(step, outputs)

    returned = ReplayStep.returned
    monkeypatch.setattr(ReplayStep, "returned", both)

    data = CodeTasks(generated=True, batch_size=4, max_length=400)
    fit_model([dream_replay(fraction=0.2)], data, max_steps=3)
    assert len(seen) == 3
    for loss, success, other_loss, other_success in seen:
        torch.testing.assert_close(loss, other_loss)
        assert torch.equal(success, other_success)


def fit_model(callbacks, data, config=TINY, ckpt_path=None, **kwargs):
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(0, verbose=False)
    defaults = {**QUIET, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = Trainer(**defaults | {"callbacks": callbacks} | kwargs)
    model = ForgeModule(config=config)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("FORGE_MBPP", raising=False)


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
@pytest.mark.parametrize("mode", ["mix", "cycle"])
def test_variants_of_programs_are_run_stored_and_trained_on(mode, offline):
    data = CodeTasks(generated=True, batch_size=4, max_length=400)
    augmenter = DreamAugmenter(per_problem=2)
    options = SLEEPS | {"mode": mode, "batch_size": 4, "fraction": 0.5}
    replay = dream_replay(**options, augmenter=augmenter, problems_per_cycle=4)
    seen = []

    class Remembers(ForgeModule):
        def training_step(self, batch, batch_idx):
            seen.append(batch["input_ids"].clone())
            return super().training_step(batch, batch_idx)

    from lightning.pytorch import Trainer, seed_everything

    seed_everything(0, verbose=False)
    trainer = Trainer(callbacks=[replay], max_steps=12, limit_val_batches=0, enable_model_summary=False, **QUIET)
    model = Remembers(config=TINY)
    trainer.fit(model, datamodule=data)
    assert len(replay.memory.programs) >= 4
    assert sum(augmenter.kept.values()) == sum(augmenter.tried.values()) >= len(replay.memory.programs)
    stored = replay.memory.programs.read(replay.memory.programs.slots()).rows
    assert stored["input_ids"].shape[1] <= 400
    known = {data.tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in data._sets["train"].examples}
    texts = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in stored["input_ids"]]
    assert not known & set(texts), "each is new"
    trained = {data.tokenizer.decode(ids, skip_special_tokens=True) for batch in seen for ids in batch}
    assert trained & set(texts)
    assert float(trainer.callback_metrics["forge/dream/yield"]) == 1


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_programs_of_the_models_own_are_stored_where_they_pass(offline):
    """It writes the given program, the same in other words, and a wrong one."""
    data = CodeTasks(generated=True, batch_size=4, max_length=400)
    asked = []

    class Writes(ForgeModule):
        def complete(self, prompts, *, temperature, **options):
            asked.append(temperature)
            right = {p.prompt: p.solution for p in data.problems("train")}
            written = {0.2: "{}", 0.6: "{}\n\nhelper = 1", 1.0: "# {}"}[temperature]
            return [written.format(right[prompt]).replace("# def", "def g(): pass\n# def") for prompt in prompts]

    from lightning.pytorch import Trainer, seed_everything

    seed_everything(0, verbose=False)
    options = SLEEPS | {"batch_size": 4, "temperatures": [0.2, 0.6, 1.0], "problems_per_cycle": 2}
    replay = dream_replay(**options)
    trainer = Trainer(callbacks=[replay], max_steps=8, limit_val_batches=0, enable_model_summary=False, **QUIET)
    trainer.fit(Writes(config=TINY), datamodule=data)
    assert asked == [0.2, 0.6, 1.0] * 2
    rows = replay.memory.programs.read(replay.memory.programs.slots()).rows
    texts = [data.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"]]
    assert texts
    assert all("helper = 1" in text for text in texts)
    seen = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert seen["forge/dream/sampled_yield"] == pytest.approx(1 / 3)
    assert seen["forge/dream/sampled"] == 4


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_variants_of_generated_tasks_fit_the_model():
    data = GeneratedTasks(families=("python", "addition"), max_level=2, batch_size=8)
    replay = dream_replay(**SLEEPS, augmenter=DreamAugmenter(["repair", "shift_context"]), problems_per_cycle=8)
    fit_model([replay], data, TINY | {"n_positions": 256}, max_steps=12)
    rows = replay.memory.programs.read(replay.memory.programs.slots()).rows
    assert len(replay.memory.programs) >= 1
    assert rows["input_ids"].shape[1] <= 256


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_a_problem_is_found_by_its_row_and_made_into_one(offline):
    data = CodeTasks(generated=True, max_length=400)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for i in range(len(batch["input_ids"])):
        problem = data.problem_of({name: tensor[i] for name, tensor in batch.items()})
        row = data.row_of(problem.prompt, problem.solution)
        length = row["input_ids"].shape[1]
        for name, tensor in row.items():
            assert torch.equal(tensor[0], batch[name][i, :length]), name
    assert data.row_of("x" * 400, "y") is None
    with Sandbox() as box:
        for problem in data.problems("train")[:5]:
            assert box.run_many([problem.task(problem.solution)])[0].passed


def test_logits_are_stored_for_rows_that_were_right_and_kept_to():
    replay = dream_replay(fraction=0.5, probe_size=0, distillation=1.0)
    fit([replay], Plain, max_epochs=3)
    lengths = [
        len(values) for values in replay.memory.buffer.read(replay.memory.buffer.slots()).extras["stored_values"]
    ]
    assert set(lengths) == {0, 1}
    without, _ = fit([dream_replay(fraction=0.5, probe_size=0)], Plain, max_epochs=3)
    with_it, _ = fit([dream_replay(fraction=0.5, probe_size=0, distillation=1.0)], Plain, max_epochs=3)
    assert not torch.equal(weights(without), weights(with_it))


@pytest.fixture
def added(monkeypatch):
    """Distillation losses that were added, with the step's examples, by training step."""
    terms, inner = {}, ReplayStep.added

    def noted(step, loss):
        term = inner(step, loss)
        if term is not None:
            stored = sum(len(values) > 0 for values in step.drawn.stored.extras["stored_values"])
            terms[step.trainer.global_step] = term.item(), stored, len(step.drawn.stored)
        return term

    monkeypatch.setattr(ReplayStep, "added", noted)
    return terms


def test_keeping_to_logits_of_weights_that_have_not_moved_adds_nothing(added):
    class Still(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit([dream_replay(fraction=0.5, probe_size=0, distillation=1.0)], Still, max_epochs=2)
    assert len(added) > 5
    assert max(term for term, _, _ in added.values()) < 1e-5, "half-precision of what was stored"


def test_moved_logits_are_drawn_back_by_their_squared_distance(added):
    """One logit of two has moved by 0.3 since they were stored: 0.3² / 2 for each stored row, of all rows."""

    class Jumps(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    self.net[-1].bias[0] += 0.3

    fit([dream_replay(fraction=0.5, probe_size=0, distillation=2.0, top_k=2)], Jumps)
    term, stored, drawn = added[5]
    assert stored > 0
    assert term == pytest.approx(2.0 * stored * 0.045 / (8 + drawn), rel=1e-2)
    assert added[4][0] < 1e-5


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_a_language_model_keeps_to_the_logits_of_its_top_tokens(offline, added, monkeypatch):
    def all_right(step, outputs):
        return returned(step, outputs | {"example_success": torch.ones_like(outputs["example_success"])})

    returned = ReplayStep.returned
    monkeypatch.setattr(ReplayStep, "returned", all_right)
    data = CodeTasks(generated=True, batch_size=4, max_length=400)
    replay = dream_replay(fraction=0.5, distillation=0.5, top_k=4, probe_size=0)
    fit_model([replay], data, max_steps=5)
    assert len(added) == 4
    assert all(math.isfinite(term) and term >= 0 for term, _, _ in added.values())
    extras = replay.memory.buffer.read(replay.memory.buffer.slots()[:1]).extras
    assert extras["stored_values"][0].shape[1] == 4
    assert extras["stored_values"][0].dtype == torch.float16


def test_a_module_of_which_nothing_tells_success_is_replayed_without_a_frontier():
    replay = dream_replay(fraction=0.5, strategy="near_threshold")
    with pytest.warns(UserWarning, match="the loss of single examples is unknown .* none counts as near the threshold"):
        fit([replay], Regression)
    assert sum(replay.memory.buffer.categories.values()) == 0
    assert len(replay.memory.buffer) > 0
    assert replay.memory.buffer.column("loss").isnan().all()


@pytest.mark.filterwarnings("ignore:DreamReplay. the loss of single examples is unknown")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_of_a_regression_are_those_of_its_steps(accumulate):
    seen = {}

    class OfStep(Regression):
        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch)}

    class Reads(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                seen["probe"] = list(replay.memory.probe.read(replay.memory.probe.slots()).rows.values())

        def on_train_end(self, trainer, pl_module):
            seen.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    replay = dream_replay("cycle", every_n_steps=4, num_steps=1, probe_size=16, batch_size=64, lr_scale=1e-9)
    options = {"max_epochs": -1, "accumulate_grad_batches": accumulate, "log_every_n_steps": 1}
    at_sleep, _ = fit([], OfStep, max_steps=4, **options)
    fit([replay, Reads()], OfStep, max_steps=5, **options)
    with torch.no_grad():
        loss = at_sleep.eval().loss(seen["probe"]).item()
    assert seen["forge/dream/probe_loss"] == pytest.approx(loss, rel=1e-4)
    assert seen["forge/dream/loss_after"] == pytest.approx(seen["forge/dream/loss_before"], rel=1e-4)
    assert seen["forge/dream/replay_loss"] == pytest.approx(seen["forge/dream/loss_before"], rel=1e-4)
    assert math.isnan(seen["forge/dream/success_before"])
    assert len(replay.memory.buffer) > 0
    assert replay.memory.buffer.column("loss").isnan().all()


@pytest.mark.parametrize(("ignore_index", "pad"), [(None, -100), (0, 0)])
def test_shorter_rows_are_filled_up_with_the_label_that_the_loss_ignores(ignore_index, pad):
    replay = dream_replay(ignore_index=ignore_index)
    buffer = replay.memory.buffer
    for length in (3, 5):
        ones = torch.ones(1, length, dtype=torch.long)
        buffer.push({"input_ids": ones, "attention_mask": ones, "labels": ones}, torch.zeros(1), torch.zeros(1))
    assert buffer.read(buffer.slots()).rows["labels"].tolist() == [[1, 1, 1, pad, pad], [1] * 5]


def test_dictionaries_and_named_tuples_stay_what_they_are():
    from collections import namedtuple

    Pair = namedtuple("Pair", ["x", "y"])
    kinds = []

    class Named(Plain):
        def train_dataloader(self):
            x, y = examples().tensors
            return DataLoader(
                TensorDataset(x, y),
                batch_size=8,
                collate_fn=lambda rows: Pair(*map(torch.stack, zip(*rows, strict=True))),
            )

        def training_step(self, batch, batch_idx):
            kinds.append(type(batch))
            return self.loss((batch.x, batch.y))

    fit([dream_replay(fraction=0.5)], Named)
    assert set(kinds) == {Pair}


def test_one_that_mixes_and_one_that_sleeps_store_only_what_is_fresh():
    for turned in (False, True):
        mixes = dream_replay(fraction=0.5, probe_size=0)
        sleeps = dream_replay(**SLEEPS | {"probe_size": 0}, name="second", with_callbacks=True)
        fit([sleeps, mixes] if turned else [mixes, sleeps], Plain, max_epochs=2)
        assert mixes.memory.buffer.num_seen == sleeps.memory.buffer.num_seen == 2 * 64
        assert len(mixes.memory.buffer) == len(sleeps.memory.buffer) == 64
    with pytest.raises(MisconfigurationException, match=r"work with another `DreamReplay\(schedule=Mix\(...\)\)`"):
        fit([mixes, dream_replay(fraction=0.1, name="second")], Plain)


def test_a_run_too_short_for_a_sleep_is_told():
    with pytest.warns(UserWarning, match="every_n_steps=1000 is more than the run's 8 steps: it will not sleep"):
        fit([dream_replay(mode="cycle")], Plain)


def test_fast_dev_run_sleeps_once():
    replay = dream_replay(mode="cycle", probe_size=2)
    model, _ = fit([replay], Watched, fast_dev_run=2)
    assert replay._progress.cycles == 2
    assert sum(model.modes) == 4


@pytest.mark.parametrize(
    "options", [{"fraction": 0.8}, {"fraction": 0.5, "capacity": 4}, {"fraction": 0.5, "batch_size": 3}]
)
def test_fewer_stored_rows_than_asked_for_are_no_harm(options):
    outputs = Outputs()
    replay = dream_replay(**options, probe_size=0, frontier=0.0)
    fit([replay, outputs], PerExample, max_epochs=2)
    assert outputs.sizes == [8] * 16
    assert replay.memory.buffer.num_seen == 128


class Indexed(Plain):
    """The last of the batch's tensors are no classes."""

    def train_dataloader(self):
        x, y = examples().tensors
        return DataLoader(TensorDataset(x, y, torch.arange(100, 164)), batch_size=8)

    def loss(self, batch):
        return super().loss(batch[:2])


class OneLogit(Plain):
    def __init__(self):
        super().__init__()
        self.net[3] = nn.Linear(16, 1)

    def loss(self, batch):
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(x)[:, 0], y.float())


def test_labels_that_are_no_classes_are_not_scored():
    replay = dream_replay(fraction=0.5, probe_size=0)
    with pytest.warns(UserWarning, match="the loss of single examples is unknown .the labels are no classes below"):
        fit([replay], Indexed)
    assert replay.memory.buffer.column("loss").isnan().all()


def test_one_logit_is_scored_as_two_classes():
    replay = dream_replay(fraction=0.0001, probe_size=8)
    model, _ = fit([replay], OneLogit, max_epochs=4)
    rows = replay.memory.probe.read(replay.memory.probe.slots()).rows
    assert replay.memory.buffer.column("success").unique().tolist() == [0, 1]
    with torch.no_grad():
        loss = model.eval().loss((rows["0"], rows["1"]))
    assert replay.memory.buffer.column("loss").mean() == pytest.approx(float(loss), rel=0.5)


@pytest.mark.parametrize("mode", ["mix", "cycle"])
def test_a_step_may_take_things_out_of_its_batch(mode):
    class Pops(Plain):
        def train_dataloader(self):
            x, y = examples().tensors
            return DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=8)

        val_dataloader = train_dataloader

        def loss(self, batch):
            labels = batch.pop("labels")
            batch["x"] = batch["x"] * 2
            return nn.functional.cross_entropy(self.net(batch["x"]), labels)

    replay = dream_replay(**SLEEPS | {"mode": mode, "fraction": 0.5, "probe_size": 0})
    fit([replay], Pops)
    rows = replay.memory.buffer.read(replay.memory.buffer.slots()).rows
    assert rows_in(rows["x"]) == rows_in(examples().tensors[0]), "what came, not what was made of it"
    assert not replay.memory.buffer.column("loss").isnan().any()


def test_ragged_batches_without_a_mask_are_refused():
    class Ragged(Plain):
        def train_dataloader(self):
            return DataLoader([(torch.ones(4, n), torch.zeros(4, dtype=torch.long)) for n in (9, 7)], batch_size=None)

        def loss(self, batch):
            return self.net(torch.ones(4, 8, device=self.device)).square().mean() * batch[0].mean()

    with pytest.raises(
        MisconfigurationException, match="'0' has length 7, and stored examples 9. Where lengths differ"
    ):
        fit([dream_replay(fraction=0.5, probe_size=0)], Ragged)


def test_a_batch_that_somebody_else_moves_in_a_step_is_left_alone():
    sizes = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(len(trainer.strategy.batch_to_device([torch.zeros(8, 8), torch.zeros(8)])[0]))

    with_it, _ = fit([dream_replay(fraction=0.5), Looks()], Plain)
    without, _ = fit([dream_replay(fraction=0.5)], Plain)
    assert sizes == [8] * 8
    assert torch.equal(weights(with_it), weights(without))


def test_a_sleep_that_is_finished_after_a_resume_is_not_stopped_again(tmp_path):
    """The next batch has been handed out by then, and would be lost."""
    path = tmp_path / "asleep.ckpt"
    made = lambda *more: [dream_replay(**SLEEPS), RNGState(), *more]  # noqa: E731
    straight, _ = fit(made(), Stateful, max_epochs=2)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            start = path if path.exists() else None
            fit(made(StopsInSleep(path, 1)), Stateful, max_epochs=2, ckpt_path=start)
    resumed, trainer = fit(made(), Stateful, max_epochs=2, ckpt_path=path)
    assert trainer.global_step == 16
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.filterwarnings("ignore:.*generated functions take", "ignore:.*are longer than max_length")
def test_variants_that_were_due_when_a_checkpoint_was_written_are_made_after_it(offline, tmp_path):
    def run(**more):
        data = CodeTasks(generated=True, batch_size=4, max_length=400)
        augmenter = DreamAugmenter(["rename_variables"])
        options = {
            "fraction": 0.5,
            "every_n_steps": 3,
            "problems_per_cycle": 2,
            "augmenter": augmenter,
            "probe_size": 4,
        }
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        callbacks = [dream_replay(**options), RNGState(), checkpoint]
        return fit_model(callbacks, data, max_steps=5, enable_checkpointing=True, **more)[0]

    straight = run()
    resumed = run(ckpt_path=tmp_path / "step=3.ckpt")
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_fitted_again_it_keeps_what_it_has_stored():
    replay = dream_replay(fraction=0.5, probe_size=0)
    fit([replay], with_data(0))
    fit([replay], with_data(1))
    assert len(replay.memory.buffer) == 128


def test_a_data_set_smaller_than_the_probe_is_replayed_all_the_same():
    replay = dream_replay(fraction=0.5)
    fit([replay], Plain, max_epochs=2)
    assert len(replay.memory.probe) == 16
    assert len(replay.memory.buffer) == 48


def test_variants_come_also_where_one_row_is_drawn_at_a_time():
    memory = ReplayMemory(Storage(), BatchFields(), "uniform", probe_size=0, program_fraction=0.5, seed=0)
    for store in (memory.buffer, memory.programs):
        store.push({"x": torch.arange(8)})
    progress = Progress()
    assert sum(memory.draw(1, progress).num_programs for _ in range(10)) == 5


def test_a_buffer_that_was_stored_otherwise_is_explained():
    replay = dream_replay(fraction=0.5)
    fit([replay], Plain)
    other = dream_replay(fraction=0.5, distillation=1.0)
    other.load_state_dict(replay.state_dict())
    with pytest.raises(
        MisconfigurationException, match=r"the checkpoint's examples were stored without logits. Use the same settings"
    ):
        fit([other], Plain)


def test_numpys_random_numbers_are_not_moved_by_a_sleep():
    class Draws(Plain):
        def training_step(self, batch, batch_idx):
            np.random.rand()
            random.random()
            return super().training_step(batch, batch_idx)

    fit([dream_replay(**SLEEPS)], Draws)
    after = np.random.rand(), random.random()
    fit([], Draws)
    assert after == (np.random.rand(), random.random())


def test_it_can_be_pickled():
    replay = pickle.loads(pickle.dumps(dream_replay(**SLEEPS, augmenter=DreamAugmenter())))
    fit([dream_replay(fraction=0.5)], Plain)
    assert replay.schedule == Sleep(every_n_steps=4, num_steps=3, batch_size=8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            lambda x, y: {"x": x, "names": ["a"] * len(x)},
            r"entry 'names' of the batch is a list; only tensors \(B, ...\) can be stored",
        ),
        (lambda x, y: {"x": x, "scale": torch.tensor(1.0)}, r"entry 'scale' of the batch is a number"),
        (lambda x, y: (x, y[:3]), r"differ in their number of examples: \{'0': 8, '1': 3\}"),
        (lambda x, y: "text", r"the batch is a str, and must be a mapping or tuple of tensors"),
    ],
)
def test_batches_that_are_no_rows_are_refused(batch, message):
    class Odd(Plain):
        def train_dataloader(self):
            x, y = examples().tensors
            return DataLoader([batch(x[:8], y[:8])] * 3, batch_size=None)

        def training_step(self, batch, batch_idx):
            return self.net(torch.ones(1, 8)).sum()

    with pytest.raises(MisconfigurationException, match=message):
        fit([dream_replay(fraction=0.5)], Odd)


def test_what_cannot_be_served_is_refused():
    class TwoParts(Plain):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(2, 2)
            self.first, self.net = self.net, None

        def loss(self, batch):
            return self.first(batch[0]).sum() * 0 + self.other(torch.ones(1, 2)).sum()

    with pytest.raises(
        MisconfigurationException,
        match=r"`BatchFields\(network=None\)`: cannot infer which submodule .*candidates: 'other', 'first'",
    ):
        fit([dream_replay(distillation=0.5)], TwoParts)
    with pytest.raises(MisconfigurationException, match=r"`BatchFields\(network='nett'\)`: no submodule is called"):
        fit([dream_replay(network="nett")], Plain)
    with pytest.raises(MisconfigurationException, match=r"`BatchFields\(family='kind'\)`: the batch has no integers"):
        fit([dream_replay(family="kind")], Plain)
    with pytest.raises(MisconfigurationException, match="cannot work with `ProgramReplay` and this data: "):
        fit([dream_replay(augmenter=DreamAugmenter())], Plain)

    with pytest.raises(MisconfigurationException, match="cannot work with RandomModule: it has no method `complete"):
        fit([dream_replay(temperatures=[1.0])], type("RandomModule", (Plain,), {"complete": None}))
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    trainer = type("T", (), {"strategy": strategy})()
    with pytest.raises(MisconfigurationException, match="`DreamReplay` cannot work with DeepSpeedStrategy"):
        dream_replay().setup(trainer, LossOnly(), "fit")


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({"every_n_steps": 0}, r"every_n_steps=0\)` must be at least 1"),
        ({"mode": "cycle", "num_steps": -1}, r"num_steps=-1\)` must be at least 0"),
        ({"fraction": 1.0}, r"fraction=1.0\)` must be in \[0, 1\)"),
        ({"strategy": "best"}, r"strategy='best'\)` must be one of \['uniform'"),
        ({"capacity": 0}, r"`Storage\(capacity=0\)` must be at least 1"),
        ({"mode": "cycle", "batch_size": 0}, r"batch_size=0\)` must be at least 1"),
        ({"distillation": -1}, r"distillation=-1\)` must be at least 0"),
        ({"top_k": 0}, r"top_k=0\)` must be at least 1"),
        ({"mode": "cycle", "lr_scale": 0}, r"lr_scale=0\)` must be above 0"),
        ({"probe_size": -1}, r"probe_size=-1\)` must be at least 0"),
        ({"temperatures": [0.0]}, r"temperatures=\[0.0\]\)` must be above 0 each"),
        ({"temperatures": [1.0], "max_new_tokens": 0}, r"max_new_tokens=0\)` must be at least 1"),
        ({"temperatures": [1.0], "augmented_fraction": 2}, r"`ProgramReplay\(fraction=2\)` must be in \[0, 1\]"),
        ({"temperatures": [1.0], "problems_per_cycle": 0}, r"problems_per_cycle=0\)` must be at least 1"),
        ({"temperatures": [1.0], "timeout": 0}, r"timeout=0\)` must be above 0"),
        ({"mode": "cycle", "every_n_steps_by_stage": {1: -1}}, r"must be at least 0 for each stage"),
        ({"allow_weaker": True}, r"`ProgramReplay` needs `augmenter` \(for variants\) or `temperatures`"),
    ):
        with pytest.raises(ValueError, match=message):
            dream_replay(**arguments)


def test_options_that_have_moved_are_refused_with_their_new_place():
    moved = set(MOVED)
    taken = {name for kind in (Mix, Sleep, Storage, ProgramReplay, BatchFields) for name in kind.__annotations__}
    assert moved - {"mode", "save_buffer", "augmented_fraction"} == taken - {"in_checkpoints"}
    message = r"`DreamReplay\(fraction=...\)` is now `schedule=Mix\(fraction=...\)`"
    with pytest.raises(TypeError, match=message):
        DreamReplay(fraction=0.2)
    with pytest.raises(ValueError, match=r"`DreamReplay\(schedule='mix'\)` must be `Mix\(...\)` or `Sleep\(...\)`"):
        DreamReplay("mix")


def test_examples_of_problems_carry_everything_that_is_needed_to_run_them(offline):
    data = CodeTasks(generated=True)
    with pytest.warns(UserWarning, match="generated functions take MBPP's place"):
        problem = data.problems("val")[0]
    example = CodeExample.of(problem)
    assert example.program.strip() == problem.solution.strip()
    assert example.entry_point == problem.entry_point


def test_second_fit_knows_examples_by_number_and_content(tmp_path):
    """Data sets all number their examples from 0: those of another one are others, those of the same are the same."""
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 16 * 60)
    module = ForgeModule(config={"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32})
    callback, stored = dream_replay(probe_size=0, capacity=1000), []
    for letter in "aba":
        data = TextData(str(tmp_path / f"{letter}.txt"), block_size=16, batch_size=6)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "accelerator": ACCELERATOR,
            "devices": 1,
            "max_epochs": 1,
        }
        Trainer(callbacks=[callback], **options).fit(module, datamodule=data)
        first = callback.memory.buffer.read(callback.memory.buffer.slots()).rows["input_ids"][:, 0]
        stored.append([int((first == ord(letter) + 3).sum()) for letter in "ab"])
    assert stored == [[54, 0], [54, 54], [54, 54]]
