from types import SimpleNamespace

import pytest

from forge_lightning.telemetry import step_timer
from forge_lightning.telemetry.step_timer import StepTimer, category_of


@pytest.fixture
def spend(monkeypatch):
    """Lets the timer's clock go on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(step_timer, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def go_on(seconds):
        clock.now += seconds

    return go_on


@pytest.mark.parametrize(
    ("action", "category"),
    [
        ("[Callback]Grokfast.on_before_optimizer_step", "callbacks"),
        ("[Strategy]DDPStrategy.training_step", "forward_backward"),
        ("[Strategy]SingleDeviceStrategy.backward", "forward_backward"),
        ("[LightningModule]Mine.optimizer_step", "optimizer"),
        ("optimizer_step", "optimizer"),
        ("[_TrainingEpochLoop].train_dataloader_next", "data"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "data"),
        ("run_training_batch", "other"),
    ],
)
def test_actions_have_a_category(action, category):
    assert category_of(action) == category


def test_inner_time_does_not_count_for_the_outer_action(spend):
    timer = StepTimer()
    timer.start("[LightningModule]Mine.optimizer_step")
    spend(0.01)
    timer.start("[Strategy]S.training_step")
    spend(0.03)
    timer.stop()
    timer.start("[Callback]C.on_before_optimizer_step")
    spend(0.02)
    timer.stop()
    timer.stop()
    timer.pause(True)
    spend(0.05)
    timer.pause(False)
    taken = timer.take()
    expected = {"optimizer": 0.01, "forward_backward": 0.03, "callbacks": 0.02, "data": 0.0, "other": 0.0}
    assert taken == pytest.approx(expected)
    assert sum(timer.take().values()) == 0
