import json
import time

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.callbacks import CodeEvaluation
from tests.contract.modules import LossOnly, Problem
from tests.contract.rows import fit


class Answers(LossOnly):
    """Solves problem "a" always, "b" in every second sample, "c" never, and loops forever on "d"."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def problems(self, split):
        return [Problem(name, prompt=name) for name in "abcd"]

    def complete(self, prompts, **options):
        out = []
        for prompt in prompts:
            self.calls += 1
            right = prompt == "a" or (prompt == "b" and self.calls % 2)
            out.append("while True: pass" if prompt == "d" else f"epoch = {int(right)}")
        return out


def test_pass_at_k_is_measured_by_execution(tmp_path):
    callback = CodeEvaluation(k=[1, 2], num_samples=2, temperature=1.0, timeout=1.0, batch_size=3)
    _, trainer = fit([callback], Answers, logger=CSVLogger(tmp_path, name="", version=""))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert metrics["forge/code_evaluation/pass_at_1"] == pytest.approx((1 + 0.5) / 4)
    assert metrics["forge/code_evaluation/pass_at_2"] == pytest.approx((1 + 1) / 4)
    assert metrics["forge/code_evaluation/timeout_rate"] == pytest.approx(2 / 8)
    lines = [json.loads(line) for line in (tmp_path / "programs.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == list("aabbccdd")
    assert [line["status"] for line in lines if line["task_id"] in "ad"] == ["passed"] * 2 + ["timeout"] * 2


def test_testing_compares_temperatures(tmp_path):
    """A model that is right more often the cooler it samples."""

    class Cooler(Answers):
        def complete(self, prompts, temperature, **options):
            return [f"epoch = {int('abcd'.index(prompt) < 1 / temperature)}" for prompt in prompts]

    callback = CodeEvaluation(k=[1, 2], num_samples=2, temperatures=[1.0, 0.5])
    model, trainer = fit([callback], Cooler, max_steps=0, logger=CSVLogger(tmp_path, name="", version=""))
    (result,) = trainer.test(model, verbose=False)
    assert result["forge/code_evaluation/at_0.5/pass_at_1"] == pytest.approx(2 / 4)
    assert result["forge/code_evaluation/at_1/pass_at_2"] == pytest.approx(1 / 4)
    study = json.loads((tmp_path / "temperature_study.json").read_text())
    assert [(row["temperature"], row["k"], row["pass_at_k"]) for row in study] == [
        (0.5, 1, 0.5), (0.5, 2, 0.5), (1.0, 1, 0.25), (1.0, 2, 0.25),
    ]  # fmt: skip
    assert study[0]["standard_error"] == pytest.approx((1 / 3) ** 0.5 / 2)
    lines = [json.loads(line) for line in (tmp_path / "programs.jsonl").read_text().splitlines()]
    assert [line["temperature"] for line in lines] == [0.5] * 8 + [1.0] * 8


def test_intervals_and_limits():
    model = Answers()
    fit([CodeEvaluation(every_n_validations=2, limit_problems=1)], model, max_epochs=4)
    assert model.calls == 2


def test_testing_takes_all_problems(tmp_path):
    model = Answers()
    callback = CodeEvaluation(limit_problems=1, timeout=0.5)
    _, trainer = fit([callback], model, max_steps=0)
    trainer.test(model, verbose=False)
    assert model.calls == 4


def test_a_module_that_cannot_complete_and_data_without_problems_are_refused():
    class Mute(LightningModule):
        train_dataloader = LossOnly.train_dataloader
        configure_optimizers = LossOnly.configure_optimizers

        def __init__(self):
            super().__init__()
            self.net = LossOnly().net

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).mean()

    class NoProblems(Mute):
        complete = LossOnly.complete

    with pytest.raises(MisconfigurationException, match=r"`CodeEvaluation` cannot work with Mute.*ForgeModule"):
        fit([CodeEvaluation()], Mute)
    with pytest.raises(MisconfigurationException, match=r"neither datamodule nor module has `problems\(split\)`"):
        fit([CodeEvaluation()], NoProblems)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": [2]}, r"`CodeEvaluation\(k=\[2\]\)` must be in \[1, num_samples=1\]"),
        ({"num_samples": 2}, r"temperature=0.0\)` must be above 0"),
        ({"temperatures": [0.0, 1.0]}, r"temperatures=\[0.0, 1.0\]\)` must be above 0 each"),
        ({"temperatures": [1.0, 1.0]}, "different from each other"),
        ({"timeout": 0}, r"timeout=0\)` must be above 0"),
        ({"limit_problems": 0}, r"limit_problems=0\)` must be at least 1"),
        ({"memory_mb": 1}, r"memory_mb=1\)` must be at least 64"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CodeEvaluation(**options)


def test_training_problems_are_evaluated_in_turn_every_n_steps(tmp_path):
    model = Answers()
    callback = CodeEvaluation(every_n_steps=4, limit_problems=3, timeout=0.5)
    seen = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer, *_):
            if callback.outcomes and callback.outcomes not in seen:
                seen.append(callback.outcomes)

    fit([callback, Watches()], model, max_epochs=2)
    assert [outcome[0]["step"] for outcome in seen] == [4, 8, 12, 16]
    assert sorted(o["example"] for outcome in seen for o in outcome) == sorted([*range(4)] * 3)
    assert {o["example"]: o["success"] for outcome in seen for o in outcome}[0] == 1
    other = CodeEvaluation(every_n_steps=4, limit_problems=3)
    other.load_state_dict(callback.state_dict())
    assert other._next_problem == callback._next_problem == 0


def test_a_time_for_all_leaves_problems_out():
    class Slow(Answers):
        def complete(self, prompts, **options):
            time.sleep(0.3)
            return super().complete(prompts, **options)

    callback = CodeEvaluation(batch_size=1, max_seconds=0.8, timeout=1.0)
    _, trainer = fit([callback], Slow())
    assert 1 <= float(trainer.callback_metrics["forge/code_evaluation/num_problems"]) <= 3
    assert float(trainer.callback_metrics["forge/code_evaluation/pass_at_1"]) > 0


def test_a_system_that_cannot_confine_is_refused_at_start(monkeypatch):
    from forge_lightning.sandbox import Capabilities, Sandbox

    monkeypatch.setattr(Sandbox, "_try_out", lambda self: Capabilities(0, False, False))
    with pytest.raises(
        MisconfigurationException, match=r"`CodeEvaluation`: .* Missing: landlock .*`allow_weaker: true`"
    ):
        fit([CodeEvaluation()], Answers)


def test_samples_have_the_same_seeds_whatever_the_batch():
    """A module that writes down which seed each sample gets: that of the call, counted on for equal prompts."""

    class Seeds(Answers):
        def complete(self, prompts, seed, **options):
            for place, prompt in enumerate(prompts):
                self.given.setdefault(prompt, []).append(seed + prompts[:place].count(prompt))
            return ["epoch = 1"] * len(prompts)

    found = []
    for batch_size in (1, 3, 5, 7, 100):
        model = Seeds()
        model.given = {}
        fit([CodeEvaluation(num_samples=5, temperature=1.0, batch_size=batch_size, seed=9)], model)
        found.append({prompt: seeds[:5] for prompt, seeds in model.given.items()})
    assert all(given == {prompt: [9, 10, 11, 12, 13] for prompt in "abcd"} for given in found)


def test_reference_solutions_that_fail_are_counted_in_a_warning():
    class Broken(Answers):
        def problems(self, split):
            return [Problem("a"), Problem("b", solution="epoch = 0"), Problem("c", solution="import no_such_module")]

        def complete(self, prompts, **options):
            return ["epoch = 1"] * len(prompts)

    with pytest.warns(UserWarning, match=r"solutions of 2 of 3 val problems do not pass .* b: failed, AssertionError"):
        fit([CodeEvaluation()], Broken, max_epochs=2)

    class Without(Broken):
        def problems(self, split):
            return [Problem("a", solution=None)]

    with pytest.warns(UserWarning, match="1 of 1 val problems have no reference solution"):
        fit([CodeEvaluation()], Without)
