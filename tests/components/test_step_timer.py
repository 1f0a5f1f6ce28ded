import time

import pytest

from forge_lightning.components.step_timer import StepTimer, category_of


def spend(seconds=0.01):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


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


def test_inner_time_does_not_count_for_the_outer_action():
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
    assert taken["optimizer"] == pytest.approx(0.01, abs=0.005)
    assert taken["forward_backward"] == pytest.approx(0.03, abs=0.005)
    assert taken["callbacks"] == pytest.approx(0.02, abs=0.005)
    assert taken["data"] == 0
    assert sum(timer.take().values()) < 0.005
