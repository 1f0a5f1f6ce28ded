"""Which examples count as barely right or barely wrong."""

import math

import numpy as np
import pytest

from forge_lightning.dream.frontier import Frontier, LossQuantiles

RIGHT, WRONG, UNKNOWN = 1.0, 0.0, math.nan


def quantiles(right=(), wrong=(), unknown=()):
    one = LossQuantiles()
    for losses, success in ((right, RIGHT), (wrong, WRONG), (unknown, UNKNOWN)):
        for loss in losses:
            one.add(loss, success)
    one.refresh()
    return one


EASY, HARD = np.linspace(0, 1, 31), np.linspace(1, 4, 31)


def test_bounds_are_quantiles_of_right_wrong_and_all():
    _, _, bounds = quantiles(EASY, HARD).state()
    both = np.concatenate([EASY, HARD])
    expected = [np.quantile(HARD, 1 / 3), np.quantile(EASY, 2 / 3), np.quantile(both, 0.1), np.quantile(both, 0.9)]
    assert bounds == pytest.approx(expected)


def test_categories_begin_at_their_bounds():
    one = quantiles(EASY, HARD)
    near_failure, near_success, low, high = one.state()[2]
    assert one.category(near_success, RIGHT) == 1
    assert one.category(near_success - 1e-9, RIGHT) == 0
    assert one.category(high, RIGHT) == 3
    assert one.category(high - 1e-9, RIGHT) == 1
    assert one.category(near_failure, WRONG) == 2
    assert one.category(near_failure + 1e-9, WRONG) == 0
    assert one.category(low, WRONG) == 3
    assert one.category(low + 1e-9, WRONG) == 2
    assert one.category(near_success, 0.5) == 1, "half right counts as right"
    assert one.category(near_success, UNKNOWN) == 0
    assert one.category(math.nan, RIGHT) == one.category(math.nan, WRONG) == 0


@pytest.mark.parametrize(("count", "known"), [(23, False), (24, True)])
def test_a_quantile_takes_24_losses(count, known):
    one = quantiles(np.linspace(0, 1, count))
    assert math.isnan(one.state()[2][1]) != known
    assert math.isnan(one.threshold) != known


def test_only_the_last_512_losses_count():
    one = quantiles(np.full(512, 5.0))
    for _ in range(512):
        one.add(1.0, RIGHT)
    one.refresh()
    assert one.state()[2][1] == 1.0
    one.add(9.0, RIGHT)
    assert sorted(one.state()[0][1].tolist())[-2:] == [1.0, 9.0]


def test_losses_that_are_not_finite_are_left_out():
    one = quantiles(EASY)
    before = one.state()[1]
    one.add(math.inf, RIGHT)
    one.add(math.nan, WRONG)
    assert one.state()[1] == before == [0, 31, 31]


def test_threshold_and_scale():
    one = quantiles(EASY, HARD)
    near_failure, near_success, low, high = one.state()[2]
    assert one.threshold == pytest.approx((near_failure + near_success) / 2)
    assert one.scale == pytest.approx((high - low) / 4)
    assert quantiles(EASY).threshold == pytest.approx(np.quantile(EASY, 2 / 3))
    assert math.isnan(LossQuantiles().threshold)
    assert LossQuantiles().scale == 1.0
    assert quantiles(np.linspace(0, 1e-6, 30)).scale == 1e-3


def test_quantiles_are_restored():
    one, two = quantiles(EASY, HARD), LossQuantiles()
    two.load(*one.state())
    assert two.threshold == one.threshold
    two.add(7.0, RIGHT)
    assert one.state()[1] == [31, 31, 62]


class Held:
    def __init__(self, quota, byte_quota=1000, length=10):
        self.length = length
        self.frontier = Frontier(quota, byte_quota, 40, lambda slot: self.length)
        self.priorities = np.arange(40.0)
        self.rng = np.random.default_rng(0)

    def offer(self, slot, category, priority):
        left = []

        def evict(gone):
            left.append(gone)
            self.frontier.leave(gone, category)

        enters = self.frontier.make_room(category, priority, self.length, self.priorities, self.rng, evict)
        if enters:
            self.frontier.join(slot, category)
        return enters, left


def test_the_weakest_leaves_for_a_more_important_example():
    held = Held(quota=3)
    assert [held.offer(slot, 2, slot) for slot in (4, 5, 6)] == [(True, [])] * 3
    assert held.offer(3, 2, 3.0) == (False, [])
    assert held.offer(7, 2, 7.0) == (True, [4])
    assert held.offer(8, 2, 5.0) == (True, [5]), "as important is enough"
    assert sorted(held.frontier.parts[1]) == [6, 7, 8]
    assert held.frontier.parts[0] == held.frontier.parts[2] == []


@pytest.mark.parametrize(
    ("quota", "byte_quota", "enters"), [(0, 1000, 0), (3, 9, 0), (3, 10, 1), (3, 20, 2), (2, 90, 2)]
)
def test_quotas_of_examples_and_bytes(quota, byte_quota, enters):
    held = Held(quota, byte_quota)
    for slot in range(4, 0, -1):
        held.offer(slot, 1, slot)
    assert len(held.frontier.parts[0]) == enters
    assert held.frontier.has_room(1, 10) == (quota > enters and byte_quota >= 10 * (enters + 1))


def test_parts_are_restored_and_counted_anew():
    held = Held(quota=5)
    for slot in range(4):
        held.offer(slot, 3, slot)
    other = Held(quota=5, byte_quota=60)
    other.frontier.load(held.frontier.parts)
    assert other.frontier.parts == held.frontier.parts
    assert other.frontier.has_room(3, 20)
    assert not other.frontier.has_room(3, 21)
    other.frontier.leave(1, 3)
    assert sorted(other.frontier.parts[2]) == [0, 2, 3]
    other.length = 16
    other.frontier.recount()
    assert other.frontier.has_room(3, 12)
    assert not other.frontier.has_room(3, 13)


def test_half_right_is_right():
    one = LossQuantiles()
    for success in (0.5, 0.49, math.nan):
        one.add(1.0, success)
    _, counts, _ = one.state()
    assert counts == [1, 1, 3]
