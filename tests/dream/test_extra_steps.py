"""Extra steps outside the loop: not counted, not logged, with their own random generator."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from forge_lightning.core.loss_terms import add_loss_term, remove_loss_term
from forge_lightning.dream.extra_steps import apart, extra_evaluation, extra_step, scaled_lr
from tests.contract.modules import Plain, examples
from tests.contract.rows import fit, weights


class Constant:
    """A loss term of a fixed size."""

    def __init__(self):
        self.calls = 0

    def begin(self, batch):
        pass

    def added(self, loss):
        self.calls += 1
        return 0 * loss

    def end(self):
        pass


class Inside(Callback):
    """Runs a function in the first training step."""

    def __init__(self, act):
        self.act, self.seen = act, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            self.act(trainer, pl_module, self)

    def on_before_optimizer_step(self, *args):
        self.seen.append("step")


def batch():
    x, y = examples(8).tensors
    return [x, y]


def inside(act, **options):
    callback = Inside(act)
    model, trainer = fit([callback], Plain, limit_train_batches=1, limit_val_batches=0, **options)
    return callback, model, trainer


def test_extra_step_moves_weights_and_is_not_counted():
    moved = []

    def act(trainer, module, callback):
        before, steps = weights(module), trainer.global_step
        extra_step(trainer, module, batch())
        moved.append((not torch.equal(before, weights(module)), trainer.global_step == steps))
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())

    inside(act)
    assert moved == [(True, True)]


def test_extra_evaluation_changes_nothing_and_restores_modes():
    def act(trainer, module, callback):
        module.net[1].eval()
        before, modes = weights(module), [part.training for part in module.modules()]
        extra_evaluation(trainer, module, batch())
        assert torch.equal(before, weights(module))
        assert [part.training for part in module.modules()] == modes

    inside(act)


@pytest.mark.parametrize("with_callbacks", [False, True])
def test_apart_hides_steps_from_callbacks_and_random_generators(with_callbacks):
    own, other = Constant(), Constant()

    def act(trainer, module, callback):
        for term in (own, other):
            add_loss_term(module, term)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        callback.seen.clear()
        callbacks = trainer.callbacks
        with apart(trainer, module, own, seed=3, with_callbacks=with_callbacks):
            first = torch.rand(1), random.random(), np.random.rand()
            extra_step(trainer, module, batch())
        with apart(trainer, module, own, seed=3, with_callbacks=with_callbacks):
            assert (torch.rand(1), random.random(), np.random.rand()) == first
        assert trainer.callbacks is callbacks
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        for term in (own, other):
            remove_loss_term(module, term)

    callback, *_ = inside(act)
    assert own.calls == 1
    assert other.calls == with_callbacks
    assert callback.seen == ["step"] * with_callbacks


def test_scaled_lr_is_undone_also_after_an_error():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.3}])

    def scaled(scale):
        with scaled_lr([optimizer], scale):
            yield optimizer.param_groups[0]["lr"]
            raise ValueError

    for scale in (0.5, 1.0):
        steps = scaled(scale)
        assert next(steps) == pytest.approx(0.3 * scale)
        with pytest.raises(ValueError, match="^$"):
            next(steps)
        assert optimizer.param_groups[0]["lr"] == 0.3
