import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from forge_lightning.callbacks import Grokfast, InterruptCheckpoint, RNGState
from tests.contract.modules import Stateful
from tests.contract.rows import fit, weights


class Signals(Callback):
    """Sends itself a signal in the middle of a step: after the backward pass of the first micro-batch of a window."""

    def __init__(self, number, at=3, times=1):
        self.number, self.at, self.times = number, at, times

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.total_batch_idx == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, SystemExit), (signal.SIGTERM, SIGTERMException)], ids=["ctrl-c", "sigterm"]
)
def test_an_interrupted_run_resumes_bit_by_bit(tmp_path, number, error):
    kwargs = {"max_epochs": 2, "accumulate_grad_batches": 3}
    straight, _ = fit([Grokfast(schedule="constant"), RNGState()], Stateful, **kwargs)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        fit(
            [InterruptCheckpoint(str(tmp_path)), Grokfast(schedule="constant"), RNGState(), Signals(number)],
            Stateful,
            **kwargs,
        )
    signal.signal(signal.SIGINT, before[0])  # Lightning ignores further Ctrl-C while the process winds down
    assert signal.getsignal(signal.SIGTERM) == before[1]
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2, "the step that was running was finished, and no other begun"
    resumed, _ = fit(
        [Grokfast(schedule="constant"), RNGState()], Stateful, ckpt_path=tmp_path / "interrupted.ckpt", **kwargs
    )
    assert torch.equal(weights(straight), weights(resumed))


def test_a_signal_behind_the_last_step_leaves_its_checkpoint_too(tmp_path, capsys):
    class Late(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    model, trainer = fit([InterruptCheckpoint(str(tmp_path)), Late()], Stateful, max_epochs=1)
    assert trainer.state.finished
    assert signal.getsignal(signal.SIGTERM) == before
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert checkpoint["global_step"] == trainer.global_step == 8
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in checkpoint["state_dict"].items())


def test_a_second_signal_stops_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit([InterruptCheckpoint(str(tmp_path)), Signals(signal.SIGINT, times=2)], Stateful)
    signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit([InterruptCheckpoint(str(tmp_path))], Stateful)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class OnRankOne:
    """What rank 1 of two sees of a strategy on which reads wait; rank 0 gets a signal at the third step."""

    root_device = torch.device("cpu")

    def __init__(self):
        self.steps = 0

    def reduce(self, value, reduce_op):
        self.steps += 1
        return value + (self.steps >= 3)


def test_on_accelerators_all_ranks_stop_a_step_later(monkeypatch):
    monkeypatch.setattr("forge_lightning.run.interrupt_checkpoint.reads_are_free", lambda device: False)
    trainer = SimpleNamespace(strategy=OnRankOne(), world_size=2)
    callback, written = InterruptCheckpoint(), []
    monkeypatch.setattr(callback, "_write", written.append)
    for _ in range(3):
        callback.on_step_end(trainer, None, None, None)
    assert not written
    with pytest.raises(KeyboardInterrupt):
        callback.on_step_end(trainer, None, None, None)
    assert written == [trainer]
