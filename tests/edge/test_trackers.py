"""Closed loops with simulated learners; more of them, and other controllers: benchmarks/edge.py."""

import math

import numpy as np
import pytest

from benchmarks.edge import BAND, WORLDS, Feedback, Ours, Thompson, finite, hold
from forge_lightning.edge import trackers
from forge_lightning.edge.trackers import ItemTracker, SkillTracker


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("world", WORLDS)
def test_success_is_held_in_the_band_through_drift_and_jumps(world, size):
    shares, back, _ = np.mean([hold(Ours, world, seed, size) for seed in range(3)], axis=0)
    assert shares > 0.88
    assert back < 4


def test_other_controllers_hold_it_less():
    """Negative control: the worlds are not easy."""
    ours, thompson, feedback = (
        np.mean([hold(make, "steep", seed, 32)[0] for seed in range(2)])
        for make in (Ours, Thompson, lambda *args: Feedback(*args, rate=5.0))
    )
    assert feedback < thompson < ours - 0.1


def test_skill_and_slope_are_found():
    rng, tracker = np.random.default_rng(0), SkillTracker(0, 100, drift=0.0, epsilon=0.0, spread=1.5)
    for _ in range(300):
        d = tracker.propose(32)
        tracker.update(d, rng.random(32) < sigmoid(0.15 * (42 - d)))
    assert abs(tracker.skill - 42) < 4 * tracker.skill_error < 4
    assert tracker.expected([42.0, 52.0]) == pytest.approx([0.5, sigmoid(-1.5)], abs=0.05)


def test_proposals_together_aim_at_the_target_whatever_was_drawn():
    tracker = SkillTracker(0, 10, target=0.7, epsilon=0.1)
    tracker._cov *= 0.01
    for count in (8, 32):
        means = [tracker.expected(tracker.propose(count)).mean() for _ in range(50)]
        assert np.abs(np.array(means) - 0.7).mean() < 0.03


def test_every_difficulty_stays_alive():
    tracker = SkillTracker(0, 1, epsilon=0.1)
    tracker._cov *= 0.01
    drawn = np.concatenate([tracker.propose(100) for _ in range(100)])
    assert (drawn >= 0).all()
    assert (drawn <= 1).all()
    for low in np.arange(0, 1, 0.1):
        assert ((drawn >= low) & (drawn < low + 0.1)).mean() > 0.005
    surely = SkillTracker(0, 1, epsilon=0.0)
    surely._cov *= 1e-4
    assert (surely.propose(10_000) > 0.9).mean() < 0.001  # negative control: without the share some never come


def test_outcomes_between_and_missing_outcomes():
    one, other = SkillTracker(0, 10), SkillTracker(0, 10)
    one.update([3.0, 4.0], [0.5, 1.0])
    other.update([3.0, 4.0, 5.0], [0.5, 1.0, np.nan])
    assert one.state_dict() == other.state_dict()
    before = one.state_dict()
    one.update([], [])
    assert one.state_dict() == before


@pytest.mark.parametrize("make", [lambda: SkillTracker(0, 10, seed=3), lambda: ItemTracker(np.arange(40.0), seed=3)])
def test_state_goes_on_where_it_was(make):
    import io

    import torch

    def run(tracker, rounds, begin=0):
        found = []
        for k in range(begin, begin + rounds):
            arms = tracker.propose(8)
            tracker.update(arms, (np.asarray(arms) + k) % 2)
            found.append(np.asarray(arms).tolist())
        return found

    straight = run(make(), 20)
    first, second = make(), make()
    begin = run(first, 9)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert begin + run(second, 11, begin=9) == straight


@pytest.mark.parametrize("correlation", [0.3, 0.6])
def test_items_of_a_data_set_are_drawn_where_they_teach(correlation):
    """Success is at its target of 0.65 in the mean, which uniform sampling misses, and more of the items teach."""
    found = {
        kind: np.mean([finite(kind, seed, correlation) for seed in range(4)], axis=0)
        for kind in ("uniform", "right or wrong", "soft")
    }
    assert found["uniform"][0] < 0.5
    for kind in ("right or wrong", "soft"):
        assert found[kind][0] == pytest.approx(0.65, abs=0.04)
    assert found["soft"][1] > found["uniform"][1] + 0.03


@pytest.mark.parametrize("soft", [True, False])
def test_items_are_drawn_at_the_target_wherever_most_of_them_are(soft):
    """A skill that rises from below nearly all items to above most of them; batches of 8."""
    means = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        hard = rng.normal(0, 1.5, 374)
        tracker = ItemTracker(hard, seed=seed)
        for step in range(1200):
            arms = tracker.propose(8)
            p = sigmoid(-3 + 0.004 * step - hard[arms])
            means.append(p.mean())
            tracker.update(arms, p if soft else rng.random(8) < p, soft)
    for quarter in np.split(np.array(means).reshape(4, 1200).mean(0), 4):
        assert quarter.mean() == pytest.approx(0.65, abs=0.06)


@pytest.mark.parametrize("nats", [(1, 12), (20, 200)])
def test_soft_outcomes_tell_items_apart_however_unlikely(nats):
    rng = np.random.default_rng(0)
    loss = rng.uniform(*nats, 100)
    for is_log in (True, False):
        tracker = ItemTracker(np.zeros((100, 0)), seed=0)
        for _ in range(500):
            arms = tracker.propose(8)
            tracker.update(arms, -loss[arms] if is_log else np.exp(-loss[arms]), soft=True, is_log=is_log)
        ranks = [np.argsort(np.argsort(x)) for x in (tracker._logits(), -loss)]
        assert np.corrcoef(*ranks)[0, 1] > 0.85


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("odd", [-1e4, -np.inf])
def test_one_answer_that_is_all_but_impossible_tells_of_its_item_alone(odd, size):
    rng = np.random.default_rng(0)
    loss = rng.uniform(0.02, 3, 200)
    tracker, means = ItemTracker(np.zeros((200, 0)), seed=0), []
    for step in range(400):
        arms = tracker.propose(size)
        found = -loss[arms]
        if step == 100:
            skill, before, found[0] = tracker.skill, tracker._logits()[arms[0]], odd
        tracker.update(arms, found, soft=True, is_log=True)
        if step == 100:
            assert tracker.skill == pytest.approx(skill, abs=4), "not by 100"
            assert tracker._logits()[arms[0]] < before - 1
        means.append(np.exp(-loss[arms]).mean())
    assert np.mean(means[101:]) == pytest.approx(0.65, abs=0.06)


def test_soft_outcomes_that_are_all_unlikely_move_the_skill():
    rng = np.random.default_rng(0)
    tracker = ItemTracker(np.zeros((100, 0)), seed=0)
    for _ in range(20):
        arms = tracker.propose(8)
        tracker.update(arms, -3000 + rng.normal(size=8), soft=True, is_log=True)
    assert tracker.skill == pytest.approx(-3000, abs=300)


def test_features_get_their_weights():
    """The second of two features is what makes items hard, and low values of it do."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    tracker = ItemTracker(x, item_std=0.3)
    for _ in range(150):
        i = tracker.propose(16)
        tracker.update(i, rng.random(16) < sigmoid(0.5 + 2 * x[i, 1]))
    weights = tracker._mean[1:] / x.std(0)
    assert abs(weights[0]) < 0.4
    assert weights[1] == pytest.approx(2, abs=0.6)


def test_arms_without_an_order_are_found():
    """Three families, one in the band."""
    rng, tracker, chance = (
        np.random.default_rng(0),
        ItemTracker(np.zeros((3, 0)), replace=True, item_std=4.0),
        [0.05, 0.65, 0.99],
    )
    for _ in range(60):
        arms = tracker.propose(16)
        tracker.update(arms, rng.random(16) < np.array(chance)[arms])
    counts = np.bincount(tracker.propose(1000), minlength=3)
    assert counts[1] > 700
    assert min(counts) > 5
    assert tracker.expected([0, 1, 2]) == pytest.approx(chance, abs=0.12)


def test_a_batch_holds_an_item_once():
    tracker = ItemTracker(np.zeros((20, 0)), epsilon=0.5)
    for _ in range(20):
        assert sorted(tracker.propose(20).tolist()) == list(range(20))
        assert len(set(tracker.propose(7).tolist())) == 7
    with pytest.raises(ValueError, match="21 different items were asked for, and there are 20"):
        tracker.propose(21)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkillTracker(1, 1), "`low=1` must be below `high=1`"),
        (lambda: SkillTracker(0, 1, target=1.0), r"`target=1.0` must be in \(0, 1\)"),
        (lambda: SkillTracker(0, 1, epsilon=2.0), r"`epsilon=2.0` must be in \[0, 1\]"),
        (lambda: ItemTracker([1.0, float("nan")]), "`features` must be finite numbers"),
        (lambda: ItemTracker([1.0, 2.0], temperature=0.0), "`temperature=0.0` must be above 0"),
        (
            lambda: ItemTracker([1.0] * 3).load_state_dict(ItemTracker([1.0] * 4).state_dict()),
            "has 4 items, and the data set 3",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_band_is_the_callbacks():
    assert BAND == (0.55, 0.75)


@pytest.mark.parametrize("p", [1e-5, 0.2, 0.5, 0.65, 0.999])
def test_the_two_ways_to_a_logit_undo_the_sigmoid(p):
    assert trackers._logit(p) == pytest.approx(math.log(p) - math.log1p(-p))
    assert trackers._logit_of_log(np.array([math.log(p)]))[0] == pytest.approx(trackers._logit(p))
    assert trackers._sigmoid(np.array([trackers._logit(p)]))[0] == pytest.approx(p)


def test_what_is_all_but_certain_has_a_finite_logit():
    assert trackers._logit_of_log(np.array([0.0]))[0] == pytest.approx(math.log(1e6), rel=1e-3)
    assert trackers._sigmoid(np.array([-1e9, 1e9])).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
