"""Schedules with a warm-up, against their formulas."""

import math

import pytest
import torch

from forge_lightning.optim import WarmupCosine, WarmupLinear
from tests.contract.modules import Plain
from tests.contract.rows import fit

KINDS = pytest.mark.parametrize("kind", [WarmupCosine, WarmupLinear])


def optimizer(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(schedule, count):
    found = []
    for _ in range(count):
        found.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_cosine_over_a_run():
    schedule = WarmupCosine(optimizer(2.0, 0.5), warmup=4, total_steps=20, end=0.1)
    expected = []
    for step in range(25):
        share = min(1.0, (step - 4) / 16)
        factor = (step + 1) / 4 if step < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        expected.append([2.0 * factor, 0.5 * factor])
    torch.testing.assert_close(torch.tensor(rates(schedule, 25)), torch.tensor(expected))


def test_a_line_over_a_run_with_a_share_of_it_as_warm_up():
    schedule = WarmupLinear(optimizer(1.0), warmup=0.25, total_steps=8)
    expected = [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0, 0.0]
    assert [rate for (rate,) in rates(schedule, 10)] == pytest.approx(expected)


@KINDS
def test_without_warm_up_and_over_one_step(kind):
    assert kind(optimizer(1.0), warmup=0, total_steps=1).factor(0) == 1.0
    assert kind(optimizer(1.0), warmup=0, total_steps=1).factor(1) == 0.0
    assert kind(optimizer(1.0), warmup=0, total_steps=4, end=1.0).factor(3) == 1.0


@KINDS
def test_the_length_may_come_later(kind):
    late, given = kind(optimizer(1.0), warmup=0.5), kind(optimizer(1.0), warmup=0.5, total_steps=8)
    late.bind(8.0)
    late.bind(3)  # it has one
    assert late.get_last_lr() == given.get_last_lr() == [0.25]
    assert rates(late, 10) == rates(given, 10)
    for unknown in (math.inf, 0):
        with pytest.raises(ValueError, match=f"`{kind.__name__}`: the Trainer does not know how many steps"):
            kind(optimizer(1.0)).bind(unknown)


@KINDS
def test_a_resume_goes_on_and_takes_a_new_length(kind):
    straight, first, second = (kind(optimizer(1.0), warmup=3, total_steps=12) for _ in range(3))
    expected = rates(straight, 12)
    rates(first, 5)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 7) == expected[5:]
    longer = kind(optimizer(1.0), warmup=3, total_steps=24)
    longer.load_state_dict(first.state_dict())
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == [longer.factor(6)] != [straight.factor(6)]


@KINDS
@pytest.mark.parametrize("arguments", [{"warmup": -1}, {"total_steps": 0}, {"end": 1.5}])
def test_bad_arguments_are_refused(kind, arguments):
    with pytest.raises(ValueError, match=rf"`{kind.__name__}\({next(iter(arguments))}="):
        kind(optimizer(1.0), **arguments)


def test_in_a_project_of_one_s_own():
    class Scheduled(Plain):
        def configure_optimizers(self):
            found = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = WarmupCosine(found, warmup=2, total_steps=self.trainer.estimated_stepping_batches)
            return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    _, trainer = fit([], Scheduled, max_epochs=2)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert schedule.total_steps == trainer.global_step
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0
