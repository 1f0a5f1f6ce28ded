from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from forge_lightning.callbacks import Grokfast, Telemetry
from forge_lightning.core.callback import last_logged
from forge_lightning.functional import ema_filter
from forge_lightning.optim import GrokfastAdamW
from tests.contract.modules import LossOnly, Plain, TwoOptimizers
from tests.contract.rows import fit, weights
from tests.contract.waiting import no_free_reads


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_a_loop_written_by_hand(accumulate, clip):
    """Backward over the window, filter, clip, step: what a reader of the paper would write."""
    model, _ = fit(
        [Grokfast(alpha=0.9, lamb=2.0, schedule="constant")],
        Plain,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    torch.manual_seed(0)
    hand = fit((), Plain, max_steps=0)[0]
    optimizer, emas = hand.configure_optimizers(), {}
    for _ in range(2):
        batches = list(hand.train_dataloader())
        for start in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for batch in batches[start : start + accumulate]:
                (hand.loss(batch) / accumulate).backward()
            for name, param in hand.named_parameters():
                param.grad, emas[name] = ema_filter(param.grad, emas.get(name), alpha=0.9, lamb=2.0)
            if clip:
                torch.nn.utils.clip_grad_norm_(hand.parameters(), clip)
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(hand), atol=1e-7, rtol=1e-6)


def names_filtered(**kwargs):
    callback = Grokfast(**kwargs)
    fit([callback], fast_dev_run=1)
    return set(callback.state_dict()["filters"][0]["buffers"])


def test_include_and_exclude_choose_by_name():
    everything = {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"}
    assert names_filtered() == everything
    assert names_filtered(include=["net.0.*"]) == {"net.0.weight", "net.0.bias"}
    assert names_filtered(exclude=["*.bias"]) == {"net.0.weight", "net.3.weight"}
    assert names_filtered(include=["net.0.*"], exclude=["*.bias"]) == {"net.0.weight"}
    with pytest.raises(MisconfigurationException, match=r"`Grokfast\(include=\['head.*'\].*leaves no parameter"):
        names_filtered(include=["head.*"])


def test_names_survive_compilation():
    class Compiled(LossOnly):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    callback = Grokfast(schedule="constant")
    fit([callback], Compiled, fast_dev_run=1)
    assert "net.0.weight" in callback.state_dict()["filters"][0]["buffers"]


def test_each_optimizer_has_its_own_filter_and_schedule():
    callback = Grokfast(schedule="linear_warmup", warmup_steps=100)
    fit([callback], TwoOptimizers)
    filters = callback.state_dict()["filters"]
    assert {index: set(f["buffers"]) for index, f in filters.items()} == {
        0: {"net.0.weight", "net.0.bias"},
        1: {"net.3.weight", "net.3.bias"},
    }
    assert [f["steps"] for f in filters.values()] == [8, 8]


def test_stage_is_read_from_a_monitored_metric_and_kept():
    class Stages(LossOnly):
        def training_step(self, batch, batch_idx):
            self.log("my/stage", float(batch_idx >= 4))
            return super().training_step(batch, batch_idx)

    class Watch(Callback):
        lambs = []

        def on_train_batch_end(self, trainer, *args):
            self.lambs.append(trainer.callback_metrics["forge/grokfast/lamb"].item())

    callback = Grokfast(schedule="by_stage", stage_monitor="my/stage", stage_lambs={0: 0.0, 1: 1.5}, lamb_init=0.5)
    fit([callback, Watch()], Stages, log_every_n_steps=1, logger=False)
    assert Watch.lambs == [0.0] * 4 + [1.5] * 4
    assert callback.state_dict()["stage"] == 1


def test_a_stage_that_nothing_logs_is_an_error_that_lists_what_is_logged():
    callback = Grokfast(schedule="by_stage", stage_monitor="no/stage", stage_lambs={1: 1.0})
    with pytest.raises(MisconfigurationException, match=r"`Grokfast\(stage_monitor='no/stage'\)`.*'train/loss'"):
        fit([callback])


def test_lbfgs_is_refused():
    class Newton(LossOnly):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match=r"`Grokfast` cannot work with LBFGS.*first-order"):
        fit([Grokfast(schedule="constant")], Newton)


def test_a_fused_optimizer_under_a_scaler_is_refused_and_without_one_is_not():
    class Fused(LossOnly):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=True)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"fused optimizer in 16-mixed.*`fused=False`"):
        fit([Grokfast(schedule="constant")], Fused, plugins=[plugin])
    fit([Grokfast(schedule="constant")], Fused)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_without_usable_gradients_are_refused(strategy):
    callback = Grokfast(schedule="constant")

    class FakeTrainer:
        pass

    trainer = FakeTrainer()
    trainer.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=r"`Grokfast` cannot work with .*ModelParallelStrategy"):
        callback.setup(trainer, LossOnly(), "fit")
    trainer.strategy = SingleDeviceStrategy.__new__(SingleDeviceStrategy)
    callback.setup(trainer, LossOnly(), "fit")


class Poisoned(Plain):
    """The gradients of two steps are not finite, and cleared behind the filter."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx in (2, 3) else loss

    def on_before_optimizer_step(self, optimizer):
        for param in self.parameters():
            param.grad.nan_to_num_(0, 0, 0)


@pytest.mark.parametrize("saves", [False, True])
def test_on_an_accelerator_skipped_steps_are_told_where_steps_are_logged(saves):
    """A checkpoint in between, which reads the counter, does not swallow the warning."""

    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if saves and batch_idx == 4:
                callback.state_dict()

    callback = Grokfast(schedule="constant")
    with no_free_reads(), pytest.warns(UserWarning, match="not finite at or before step 5"):
        fit([callback, Saves()], Poisoned, log_every_n_steps=6)
    assert callback.skipped_steps == 2


def test_skipped_steps_are_counted_and_logged():
    callback = Grokfast(schedule="constant")
    with pytest.warns(UserWarning, match="not finite at step 2"):
        _, trainer = fit([callback], Poisoned, log_every_n_steps=1)
    assert callback.skipped_steps == 2
    assert trainer.callback_metrics["forge/grokfast/skipped_steps"] == 2


def test_state_can_be_left_out_of_checkpoints():
    callback = Grokfast(save_state=False, schedule="constant")
    fit([callback])
    assert callback.state_dict() == {}


def test_a_name_tells_the_metrics_of_two_instances_apart():
    callback = Grokfast(name="head", include=["net.3.*"], schedule="constant")
    _, trainer = fit([Grokfast(exclude=["net.3.*"], schedule="constant"), callback], log_every_n_steps=1)
    assert {"forge/grokfast/lamb", "forge/grokfast/head/lamb"} <= set(trainer.callback_metrics)


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
def test_optimizers_that_lightning_does_not_see_are_refused():
    """Nothing would be filtered, in silence."""

    class Own(TwoOptimizers):
        def configure_optimizers(self):
            self.own = torch.optim.SGD(self.parameters(), 0.1)

        def optimizers(self, *args, **kwargs):
            return [self.own]

    class Raw(TwoOptimizers):
        def optimizers(self, *args, **kwargs):
            return super().optimizers(use_pl_optimizer=False)

    for module in (Own, Raw):
        with pytest.raises(MisconfigurationException, match=r"stepped past Lightning.*step `self.optimizers\(\)`"):
            fit([Grokfast(schedule="constant")], module)


def test_an_optimizer_with_the_filter_built_in_is_refused():
    class Twice(LossOnly):
        def configure_optimizers(self):
            return GrokfastAdamW(self.parameters(), schedule="constant")

    with pytest.raises(MisconfigurationException, match=r"cannot work with GrokfastAdamW: .* filtered twice"):
        fit([Grokfast(schedule="constant")], Twice)
    fit((), Twice)


class SteppedElsewhere(LossOnly):
    """Trains with an optimizer of its own; Lightning's has a parameter that never has a gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.own = torch.optim.Adam(self.net.parameters())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.own.zero_grad()
        loss.backward()
        self.own.step()
        self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([self.unused])


def test_an_optimizer_without_a_gradient_is_refused_after_an_epoch():
    with pytest.raises(MisconfigurationException, match="no parameter that they step and it filters had a gradient"):
        fit([Grokfast(schedule="constant")], SteppedElsewhere)


def test_frozen_parameters_are_waited_for():
    class Frozen(LossOnly):
        def on_train_epoch_start(self):
            self.net[0].weight.requires_grad_(self.current_epoch > 0)

    callback = Grokfast(include=["net.0.weight"], schedule="constant")
    fit([callback], Frozen, max_epochs=2)
    assert callback._filters[0].steps == 8


def test_norms_are_those_of_all_optimizers_of_a_step():

    class Two(LossOnly):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = torch.nn.Linear(8, 2)
            self.norms = []

        def training_step(self, batch, batch_idx):
            grads = []
            for net, optimizer, scale in zip((self.net, self.other), self.optimizers(), (10.0, 1.0), strict=True):
                loss = scale * torch.nn.functional.cross_entropy(net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                grads += [p.grad.clone() for p in net.parameters()]
                optimizer.step()
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

        def configure_optimizers(self):
            return [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (self.net, self.other)]

    for callbacks in (
        [Grokfast(schedule="constant")],
        [Grokfast(include=["net.0.weight"], schedule="constant"), Telemetry()],
        [Grokfast(schedule="constant"), Telemetry()],
    ):
        model, trainer = fit(callbacks, Two, log_every_n_steps=1)
        who = "telemetry" if len(callbacks) > 1 else "grokfast"
        logged = last_logged(trainer, f"forge/{who}/grad_norm_before")
        assert logged == pytest.approx(model.norms[-1], rel=1e-4)


@pytest.mark.parametrize("build", [Grokfast, partial(GrokfastAdamW, [torch.nn.Parameter(torch.ones(2))])])
def test_by_default_the_filter_turns_itself_off_where_gradients_do_not_agree(build):
    """The paper's constant λ is asked for by name."""
    made = build()
    kept = made._new_filter() if isinstance(made, Grokfast) else made._filter
    assert kept.schedule == "cosine_similarity"
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # noise, of which nothing is slow
        grads = {"w": torch.randn(400, generator=generator)}
        given = grads["w"].clone()
        kept(grads)
        assert (grads["w"] - given).norm() < 0.05 * given.norm()
