"""Callbacks that break a promise, each so that one row of the matrix must see it."""

import torch
from lightning.pytorch import Callback

from tests.contract.cases import Case


class NaiveGrokfast(Callback):
    """The published filter in the obvious hook: after every backward, by out-of-place arithmetic, never saved."""

    def __init__(self, alpha=0.9, lamb=2.0):
        self.alpha, self.lamb, self.emas = alpha, lamb, None

    @torch.no_grad()
    def on_after_backward(self, trainer, pl_module):
        grads = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        if self.emas is None:
            self.emas = dict(grads)
        for name, param in pl_module.named_parameters():
            if param.grad is not None:
                self.emas[name] = self.emas[name] * self.alpha + param.grad * (1 - self.alpha)
                param.grad = param.grad + self.emas[name] * self.lamb


class Silent(Callback):
    """Does nothing."""


class Scales(Callback):
    """Makes gradients larger, whatever its settings."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for param in pl_module.parameters():
            if param.grad is not None:
                param.grad.mul_(2)
                param.grad.add_(0.01)


class ReadsTheLoss(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = outputs["loss"].item()


class ChoosesRows(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count = len(batch[0][batch[1] == 1])


class ScalesIn32Bits(Scales):
    """Does nothing in other precisions."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.precision == "32-true":
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


class ScalesAfterClipping(Scales):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def on_train_start(self, trainer, pl_module):
        of_module = pl_module.configure_gradient_clipping

        def clip(optimizer, *args, **kwargs):
            of_module(optimizer, *args, **kwargs)
            super(ScalesAfterClipping, self).on_before_optimizer_step(trainer, pl_module, optimizer)

        pl_module.configure_gradient_clipping = clip


class Draws(Callback):
    def on_train_batch_end(self, *_):
        torch.rand(1)


class WantsTuples(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].float()


class KeepsAView(Callback):
    """Its state is a part of a larger tensor."""

    def state_dict(self):
        return {"mean": torch.zeros(100)[:1]}

    def load_state_dict(self, state_dict):
        pass


class ForgetsState(Callback):
    steps = 0.0

    def on_train_batch_end(self, *_):
        self.steps += 1

    def state_dict(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state_dict):
        pass


class AddsWeights(Callback):
    """Puts into the module's weights what only it knows."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"]["extra"] = torch.zeros(1)


class SharesAKey(ForgetsState):
    @property
    def state_key(self):
        return "ours"


class MovesInValidation(Callback):
    def on_validation_start(self, trainer, pl_module):
        with torch.no_grad():
            next(pl_module.parameters()).mul_(1.01)


class NeedsAFit(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.known = True

    def on_test_start(self, trainer, pl_module):
        assert self.known


class WrapsTheStrategy(Callback):
    def on_fit_start(self, trainer, pl_module):
        of_strategy = trainer.strategy.batch_to_device
        trainer.strategy.batch_to_device = lambda *args, **kwargs: of_strategy(*args, **kwargs)


class AddsACallback(Callback):
    def on_fit_start(self, trainer, pl_module):
        trainer.callbacks = [*trainer.callbacks, Silent()]


class PatchesForward(Callback):
    def on_fit_start(self, trainer, pl_module):
        of_layer = pl_module.net[0].forward
        pl_module.net[0].forward = lambda *args: of_layer(*args)


class LeavesAHook(Callback):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].register_forward_hook(lambda *_: None)


class KeepsBatches(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([tensor.clone() for tensor in batch])


class KeepsGraphs(Callback):
    def __init__(self):
        self.losses = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses.append(loss)


class LogsMore(Callback):
    """Documents forge/bad/one."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for key in ("one", "two"):
            pl_module.log(f"forge/bad/{key}", float(batch_idx))


class LogsAConstant(Callback):
    """Documents bad/one."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("forge/bad/one", 1.0)


def case(build, **kwargs):
    return Case(build=build, id=build.__name__, twin=build, inert=build, **kwargs)


NAIVE = case(NaiveGrokfast)
_LOGS = frozenset({"forge/bad/one"})
MUST_FAIL = [
    ("off_is_off", case(Scales)),
    ("off_is_off", case(Scales, observer=True)),
    ("acts", case(Silent)),
    ("random_stream_untouched", case(Draws)),
    ("foreign_modules", NAIVE),
    ("shapes_of_others", case(WantsTuples)),
    ("precisions", case(ScalesIn32Bits)),
    ("fp16_overflow", NAIVE),
    ("accumulation", NAIVE),
    ("clipping", case(ScalesAfterClipping)),
    ("resume_at_epoch_end", NAIVE),
    ("resume_twice", NAIVE),
    ("resume_after_max_steps", NAIVE),
    ("resume_with_short_epochs", NAIVE),
    ("resume_mid_epoch", NAIVE),
    ("state_round_trip", case(KeepsAView)),
    ("state_round_trip", case(ForgetsState)),
    ("checkpoints_cross", case(AddsWeights)),
    ("checkpoints_cross", case(Silent)),
    ("two_instances", case(SharesAKey)),
    ("other_stages", case(MovesInValidation)),
    ("other_stages", case(NeedsAFit)),
    ("nothing_left_behind", case(WrapsTheStrategy)),
    ("nothing_left_behind", case(AddsACallback)),
    ("nothing_left_behind", case(PatchesForward)),
    ("nothing_left_behind", case(LeavesAHook)),
    ("memory_is_bounded", case(KeepsBatches)),
    ("memory_is_bounded", case(KeepsGraphs)),
    ("no_waiting", case(ReadsTheLoss)),
    ("no_waiting", case(ChoosesRows)),
    ("logs", case(LogsMore, logs=_LOGS)),
    ("logs", case(LogsAConstant, logs=_LOGS)),
]
