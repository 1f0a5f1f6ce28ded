import csv
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from forge_lightning.callbacks import EdgeController
from forge_lightning.data import DifficultySampler, GeneratedTasks
from tests.accelerator import ACCELERATOR, QUIET
from tests.contract.modules import LossOnly, Plain, TwoOptimizers, examples, with_choices
from tests.contract.rows import fit


class Learner(Plain):
    """Succeeds as a learner of skill 7 would, on whatever comes; `difficulty` is 0 to 10."""

    loader = DataLoader
    skill = 7.0

    def training_step(self, batch, batch_idx):
        chance = torch.sigmoid(2 * (self.skill - batch[2]))
        success = (torch.rand(len(chance), generator=self.draws).to(self.device) < chance).float()
        return {"loss": super().training_step(batch[:2], batch_idx), "example_success": success}

    def train_dataloader(self):
        self.draws = torch.Generator().manual_seed(0)
        data = examples(2000)
        hard = 10 * torch.rand(2000, generator=torch.Generator().manual_seed(1))
        data.tensors += (hard,)
        sampler = DifficultySampler(data, hard, batch_size=32)
        return self.loader(data, batch_size=32, sampler=sampler)


class Collects(Callback):
    def __init__(self):
        self.success, self.difficulty = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.success.append(float(outputs["example_success"].mean()))
        self.difficulty.append(float(batch[2].mean()))


@pytest.mark.parametrize("policy", ["skill", "item", "auto"])
def test_success_comes_into_the_band_and_stays(policy):
    collects, controller = Collects(), EdgeController(policy=policy)
    fit([controller, collects], Learner, max_epochs=3)
    late = collects.success[60:]
    assert 0.55 < sum(late) / len(late) < 0.75
    before, _ = Collects(), None
    fit([before], Learner, max_epochs=1)
    assert abs(sum(before.difficulty) / len(before.difficulty) - 5) < 0.3
    assert 6 < sum(collects.difficulty[60:]) / len(late) < 7.5
    assert controller.success_rate == pytest.approx(sum(collects.success[-4:]) / 4, abs=0.1)


def test_it_logs_what_it_did(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    controller = EdgeController(policy="skill")
    fit([controller], Learner, max_epochs=3, logger=logger, log_every_n_steps=5)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["forge/edge/success_rate"]]
    final = {key.removeprefix("forge/edge/"): float(v) for key, v in rows[-1].items() if key.startswith("forge/edge")}
    assert final["skill"] == pytest.approx(7, abs=0.3)
    assert final["skill_se"] < 0.3
    assert final["in_band"] > 0.8
    assert final["difficulty_p10"] < final["difficulty"] < final["difficulty_p90"]
    assert final["expected_success"] == pytest.approx(0.65, abs=0.1)


def test_on_an_accelerator_it_learns_the_same_one_step_later(monkeypatch):
    def learned(lags):
        monkeypatch.setattr("forge_lightning.edge.callback.reads_are_free", lambda device: not lags)
        edge, found = EdgeController(policy="skill", steer=False), []
        monkeypatch.setattr(edge, "_learn", lambda arms, success: found.append((list(arms), list(success))))
        fit([edge], Learner, limit_train_batches=6)
        return edge, found

    at_once, later = learned(False), learned(True)
    assert len(at_once[1]) == 6
    assert later[1] == at_once[1][:5]
    last = later[0].state_dict()["unread"]
    assert (last["arms"], last["success"]) == at_once[1][5]
    assert at_once[0].state_dict()["unread"] is None


class Jumps(Learner):
    """Forgets half of what it can, all at once."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 100:
            self.skill = 3.5


def test_a_jump_of_skill_is_followed():
    collects = Collects()
    fit([EdgeController(policy="skill"), collects], Jumps, max_epochs=3)
    assert sum(collects.difficulty[90:100]) / 10 == pytest.approx(6.7, abs=0.5)
    assert sum(collects.difficulty[105:125]) / 20 == pytest.approx(3.2, abs=0.6)


def test_a_watcher_changes_nothing_and_tells():
    plain, watched = Collects(), Collects()
    fit([plain], Learner)
    controller = EdgeController(policy="skill", steer=False)
    fit([controller, watched], Learner)
    assert plain.difficulty == watched.difficulty
    assert controller._tracker.skill == pytest.approx(7, abs=0.5)


def test_losses_below_a_threshold_count_as_success():
    class Losses(Learner):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {"loss": outputs["loss"], "example_loss": batch[2]}

    controller = EdgeController(policy="skill", signal="example_loss", loss_threshold=6.0)
    fit([controller], Losses, max_epochs=2)
    assert controller._tracker.skill == pytest.approx(6, abs=0.5)


def test_a_bare_loss_counts_for_the_batch_whatever_is_accumulated():
    for accumulate in (1, 4):
        controller = EdgeController(policy="skill", loss_threshold=10.0)
        fit([controller], with_choices(LossOnly), accumulate_grad_batches=accumulate)
        assert controller.success_rate == 1
        controller = EdgeController(policy="skill", loss_threshold=0.25)
        fit([controller], with_choices(LossOnly), accumulate_grad_batches=accumulate)
        assert controller.success_rate == 0


def test_log_likelihoods_tell_more_than_right_and_wrong():
    class Likely(Learner):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            chance = torch.sigmoid(2 * (self.skill - batch[2]))
            return {"loss": outputs["loss"], "example_log_likelihood": chance.log(), "example_success": chance}

    collects = Collects()
    controller = EdgeController(policy="item", signal="example_log_likelihood", soft=True)
    fit([controller, collects], Likely, max_epochs=2)
    assert 0.55 < sum(collects.success[40:]) / len(collects.success[40:]) < 0.75


def test_outcomes_of_another_callback_are_taken_once():
    class Measures(Callback):
        outcomes = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % 20 == 0:
                self.outcomes = [
                    {"step": trainer.global_step, "example": i, "success": float(i < 1000)} for i in range(2000)
                ]

    controller = EdgeController(policy="item", signal="outcomes")
    fit([Measures(), controller], Learner, max_epochs=1)
    assert controller._seen == 2000 * 3
    chance = controller._tracker.expected(range(2000))
    assert chance[:1000].mean() > chance[1000:].mean() + 0.3


def test_features_of_the_datamodule_are_used_and_executed_programs_are_a_signal(small_mbpp, tmp_path):
    """As configs/edge_mbpp.yaml: what the model writes is run, and tells the controller."""
    from forge_lightning.callbacks import CodeEvaluation
    from forge_lightning.data import CodeTasks
    from forge_lightning.models import ForgeModule

    class Writes(ForgeModule):
        """Solves every second training problem."""

        def complete(self, prompts, **options):
            known = {p.prompt: (i, p.solution) for i, p in enumerate(self.trainer.datamodule.problems("train"))}
            return [known[prompt][1] if known[prompt][0] % 2 else "pass" for prompt in prompts]

    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 512}
    controller = EdgeController(policy="item", signal="outcomes")
    evaluation = CodeEvaluation(every_n_steps=2, limit_problems=8, batch_size=8)
    data = CodeTasks(path=small_mbpp, batch_size=8, difficulty="complexity")
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator=ACCELERATOR, devices=1, max_steps=9, max_epochs=-1, logger=CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        log_every_n_steps=1, callbacks=[controller, evaluation],
    )  # fmt: skip
    trainer.fit(Writes(config=config), data)
    assert controller._tracker._x.shape == (24, 7)
    assert controller._seen == 4 * 8
    chance = controller._tracker.expected(range(24))
    assert chance[1::2].min() > chance[0::2].max()
    with open(tmp_path / "metrics.csv") as file:
        rates = [row["forge/code_evaluation/pass_at_1"] for row in csv.DictReader(file)]
    assert len([rate for rate in rates if rate]) == 4


def test_generated_levels_follow_the_skill(tmp_path):
    class Guesses(LossOnly):
        """Right up to level 5, on average."""

        def training_step(self, batch, batch_idx):
            chance = torch.sigmoid(2 * (5 - batch["level"]))
            loss = self.net(torch.randn(4, 8).to(self.device)).square().mean()
            return {"loss": loss, "example_success": torch.bernoulli(chance)}

        train_dataloader = val_dataloader = None

    from lightning.pytorch import Trainer

    seen = []

    class Levels(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(batch["level"].float().mean().item())

    for families in (["addition"], ["addition", "expression"]):
        seen.clear()
        trainer = Trainer(
            **QUIET,
            max_steps=150,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[EdgeController(), Levels()],
        )
        trainer.fit(Guesses(), GeneratedTasks(families, max_level=10))
        assert sum(seen[-50:]) / 50 == pytest.approx(4.7, abs=0.6)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(examples())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda data: DataLoader(data, batch_size=8), r"no loader has a `DifficultySampler`.*two|Use `GeneratedTasks`"),
        (lambda data: DataLoader(Stream(), batch_size=8), "no loader has a `DifficultySampler`"),
        (
            lambda data: DataLoader(data, batch_size=8, sampler=DifficultySampler(data, batch_size=16)),
            "a loader of batch_size=8: its sampler draws batches of 16. Give `DifficultySampler` the loader's",
        ),
        (
            lambda data: DataLoader(data, batch_size=8, sampler=DifficultySampler(data, batch_size=8)),
            "policy='skill' on data without difficulties",
        ),
    ],
)
def test_data_that_cannot_be_chosen_from_is_refused_at_start(loader, message):
    class Has(LossOnly):
        def train_dataloader(self):
            return loader(examples())

    with pytest.raises(MisconfigurationException, match=message):
        fit([EdgeController(policy="skill", loss_threshold=1.0)], Has)


@pytest.mark.parametrize("module", [LossOnly, TwoOptimizers])
def test_a_signal_that_never_comes_is_refused_after_the_first_batch(module):
    class Silent(with_choices(module)):
        def training_step(self, batch, batch_idx):
            return module.training_step(self, batch, batch_idx)

    with pytest.raises(
        MisconfigurationException, match=r"`training_step` returned no such entry, only .*loss_threshold"
    ):
        fit([EdgeController()], Silent)


def test_a_signal_of_another_length_is_refused():
    class Short(Learner):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {"example_success": torch.ones(3)}

    with pytest.raises(MisconfigurationException, match="returned 3 numbers for a batch of 32 examples"):
        fit([EdgeController()], Short)


def test_outcomes_need_examples_and_somebody_who_measures_them():
    with pytest.raises(MisconfigurationException, match=r"Add `CodeEvaluation\(every_n_steps=...\)`"):
        fit([EdgeController(policy="item", signal="outcomes")], Learner)
    with pytest.raises(MisconfigurationException, match=r"signal='outcomes' and policy='skill'"):
        fit([EdgeController(policy="skill", signal="outcomes")], Learner)


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        (torch.full((32,), 77.0), {}, r"success is in \[0, 1\]; for a loss set `loss_threshold`"),
        (torch.ones(32), {"soft": True, "policy": "item"}, "log-likelihoods are at most 0"),
    ],
)
def test_a_signal_out_of_range_is_refused(returned, options, message):
    class Odd(Learner):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {"example_success": returned}

    with pytest.raises(MisconfigurationException, match=message):
        fit([EdgeController(**options)], Odd)


def test_a_signal_may_be_a_list_and_one_that_is_never_a_number_is_told():
    class Lists(Learner):
        def training_step(self, batch, batch_idx):
            returned = super().training_step(batch, batch_idx)
            return {"loss": returned["loss"], "example_success": returned["example_success"].tolist()}

    controller = EdgeController(policy="skill")
    fit([controller], Lists)
    assert controller._tracker.skill == pytest.approx(7, abs=1)

    class Nothing(Learner):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) | {
                "example_success": torch.full((len(batch[0]),), torch.nan)
            }

    with pytest.warns(UserWarning, match="`signal='example_success'` is NaN. Nothing is steered by it"):
        fit([EdgeController()], Nothing, log_every_n_steps=5)


@pytest.mark.parametrize(
    ("skill", "says"), [(30.0, "even the hardest examples are mastered"), (-20.0, "even the easiest")]
)
def test_where_there_is_no_edge_it_says_so_and_draws_all_alike(skill, says):
    """Also where one in twenty fails for no reason, as wrong labels do: that makes no hard example easy."""

    class Beyond(Learner):
        def training_step(self, batch, batch_idx):
            returned = super().training_step(batch, batch_idx)
            slips = torch.rand(len(batch[0]), generator=self.draws).to(self.device) < 0.05
            return returned | {
                "example_success": torch.where(slips, 1 - returned["example_success"], returned["example_success"])
            }

    Beyond.skill = skill
    collects = Collects()
    with pytest.warns(UserWarning, match=says):
        fit([EdgeController(policy="skill"), collects], Beyond, max_epochs=8, log_every_n_steps=5)
    end = sum(collects.difficulty[-50:]) / 50
    assert 4 < end < 6


@pytest.mark.parametrize("policy", ["skill", "item"])
def test_a_data_set_without_edge_is_drawn_alike(policy):
    """Not the same few examples, over and over, that are nearest to an edge out of reach."""

    class Knows(LossOnly):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch, batch_idx):
            self.seen += batch[0][:, 0].tolist()
            loss = self.net(batch[0].expand(-1, 8)).square().mean()
            return {"loss": loss, "example_success": torch.ones(len(batch[0]))}

        def train_dataloader(self):
            x = torch.arange(1000.0)[:, None]
            sampler = DifficultySampler(TensorDataset(x), x[:, 0], batch_size=20)
            return DataLoader(TensorDataset(x), batch_size=20, sampler=sampler)

    model = Knows()
    with pytest.warns(UserWarning, match="all are drawn alike" if policy == "skill" else "are mastered") as told:
        fit([EdgeController(policy=policy)], model, max_epochs=3, limit_val_batches=0, log_every_n_steps=1)
    assert len([w for w in told if "EdgeController" in str(w.message)]) == 1
    times = torch.bincount(torch.tensor(model.seen[-1000:]).long(), minlength=1000)
    assert times.max() <= 2
    assert (times > 0).sum() > 900


def test_an_example_without_labels_is_no_outcome():
    class Blank(LossOnly):
        def training_step(self, batch, batch_idx):
            values = torch.full((len(batch[0]),), -0.1)
            values[0] = torch.nan
            values[1] = -torch.inf
            return {"loss": super().training_step(batch, batch_idx), "log_likelihood": values}

    soft, loss = (
        EdgeController(policy="item", signal="log_likelihood", **more)
        for more in ({"soft": True}, {"loss_threshold": 0.0})
    )
    for controller in (soft, loss):
        fit([controller], with_choices(Blank), limit_val_batches=0)
    assert soft._seen == loss._seen == 7 * len(list(with_choices(Blank)().train_dataloader()))
    assert soft.success_rate == pytest.approx(6 / 7 * math.exp(-0.1), abs=0.01)
    assert loss.success_rate == pytest.approx(1.0)


def test_a_loader_that_is_made_anew_is_steered_too():
    collects, controller = Collects(), EdgeController(policy="skill")
    fit([controller, collects], Learner, max_epochs=4, reload_dataloaders_every_n_epochs=1)
    assert controller._seen == 2000 * 4
    assert 6 < sum(collects.difficulty[-60:]) / 60 < 7.5


def test_a_loss_as_signal_is_that_before_accumulation_divides_it():
    class Loss(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx) * 0 + 1.0}

    for options in ({"signal": "loss"}, {}):
        controller = EdgeController(policy="skill", loss_threshold=0.6, **options)
        fit([controller], with_choices(Loss), accumulate_grad_batches=4)
        assert controller.success_rate == 0


def test_a_sampler_of_another_data_set_or_in_the_wrong_place_is_refused():
    class Other(LossOnly):
        def train_dataloader(self):
            return DataLoader(examples(64), batch_size=8, sampler=DifficultySampler(examples(32), batch_size=8))

    class Misplaced(LossOnly):
        def train_dataloader(self):
            return DataLoader(examples(64), batch_sampler=DifficultySampler(examples(64), batch_size=1))

    with pytest.raises(MisconfigurationException, match="a loader of 64 examples: its sampler was made for 32"):
        fit([EdgeController(loss_threshold=1.0)], Other)
    with pytest.raises(MisconfigurationException, match="a `DifficultySampler` as `batch_sampler`.* as `sampler`"):
        fit([EdgeController(loss_threshold=1.0)], Misplaced)


def test_a_state_of_other_difficulties_is_refused():
    controller = EdgeController(policy="skill")
    fit([controller], Learner)
    other = EdgeController(policy="skill", loss_threshold=1.0)
    other.load_state_dict(controller.state_dict())
    with pytest.raises(MisconfigurationException, match="The state is of difficulties"):
        fit([other], with_choices(LossOnly))


def test_two_that_steer_are_refused():
    with pytest.raises(MisconfigurationException, match=r"another `EdgeController` steers: one must decide"):
        fit([EdgeController(), EdgeController(name="second")], Learner)


def test_a_state_of_another_data_set_is_refused(tmp_path):
    controller = EdgeController(policy="item")
    fit([controller], Learner)
    other = EdgeController(policy="item", loss_threshold=1.0)
    other.load_state_dict(controller.state_dict())
    with pytest.raises(MisconfigurationException, match="another policy or data set .*2000 items, and the data set 64"):
        fit([other], with_choices(LossOnly))


def test_a_data_set_that_is_mastered_is_told():
    class Knows(Learner):
        skill = 30.0

    with pytest.warns(UserWarning, match=r"% of the examples are mastered; there is little left to choose from"):
        fit([EdgeController(policy="item")], Knows, log_every_n_steps=5, logger=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_range": (0.75, 0.55)}, r"`EdgeController\(target_range=\(0.75, 0.55\)\)` must be low < high"),
        ({"target_range": (0.0, 0.5)}, r"within \(0, 1\)"),
        ({"policy": "random"}, r"`EdgeController\(policy='random'\)` must be"),
        ({"target_range": 0.65}, r"`EdgeController\(target_range=0.65\)` must be two numbers"),
        ({"signal": "loss"}, r"`EdgeController\(signal='loss'\)` needs `loss_threshold`: a loss at or below it"),
        ({"epsilon": 1.5}, r"`EdgeController\(epsilon=1.5\)` must be in \[0, 1\]"),
        ({"spread": -1.0}, r"`EdgeController\(spread=-1.0\)` must be at least 0"),
        ({"soft": True, "policy": "skill"}, r"`EdgeController\(soft=True\)` goes with policy='item'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EdgeController(**arguments)
