"""Synthetic series with known changes. Rates on recorded runs: test_stage_classifier and benchmarks/stages.md."""

import math
import random

import pytest

from forge_lightning.geometry.change_detector import ChangeDetector, LossHealth, trend_confidence

LENGTH, CHANGE_AT = 200, 120


def series(seed, noise, factor, memory=0.5):
    """A plateau with autocorrelated noise, and from ``CHANGE_AT`` on, over 20 values, a plateau ``factor`` as high."""
    rng, drift, values = random.Random(seed), 0.0, []
    for t in range(LENGTH):
        drift = memory * drift + noise * rng.gauss(0, 1)
        progress = min(1.0, max(0.0, (t - CHANGE_AT) / 20))
        values.append(20 * (1 + (factor - 1) * progress) * math.exp(drift))
    return values


def found(values, **options):
    detector = ChangeDetector(**options)
    return [c for step, v in enumerate(values) if (c := detector.update(step, v)) is not None]


def rate(noise, factor, direction=None, count=100):
    hits = [found(series(seed, noise, factor)) for seed in range(count)]
    return sum(any(direction is None or c.direction == direction for c in changes) for changes in hits) / count


@pytest.mark.parametrize(("factor", "direction"), [(0.3, "down"), (0.6, "down"), (2.0, "up"), (3.0, "up")])
def test_lasting_changes_are_found_and_named(factor, direction):
    assert rate(0.03, factor, direction) == 1.0
    for seed in range(20):
        (change, *_) = found(series(seed, 0.03, factor))
        assert CHANGE_AT < change.step <= CHANGE_AT + 25
        assert change.direction == direction
        assert change.confidence > 0.95
        assert (change.after < change.before) == (direction == "down")


@pytest.mark.parametrize(("noise", "most"), [(0.03, 0.0), (0.08, 0.03)])
def test_false_alarms_are_as_rare_as_documented(noise, most):
    """Of 200 values with noise of 3 %: none in 100 series; of 8 %: 1 % (3 in 300), here at most 3."""
    assert rate(noise, 1.0) <= most


@pytest.mark.parametrize(("memory", "documented"), [(0.0, 0), (0.5, 0), (0.9, 76), (0.98, 21)])
def test_false_alarms_under_noise_that_lasts(memory, documented):
    """Noise of 8 % altogether, by how much of it a value keeps from the one before, in 300 series."""
    noise = 0.08 * math.sqrt(1 - memory**2)
    alarms = sum(bool(found(series(seed, noise, 1.0, memory))) for seed in range(300))
    assert abs(alarms - documented) <= math.sqrt(documented)
    assert not any(found(series(seed, noise, 1.0, memory), relative_change=0.35) for seed in range(300))


def test_small_changes_are_not_reported():
    assert rate(0.03, 0.85) == 0


def test_one_change_is_reported_once_and_the_next_one_again():
    values = [20.0] * 50 + [10.0] * 60 + [5.0] * 60
    assert [c.direction for c in found(values)] == ["down", "down"]
    assert [c.step >= 50 for c in found(values)] == [True, True]


def test_unhealthy_and_missing_values_do_not_enter():
    detector = ChangeDetector()
    values = [20.0] * 40
    for step, value in enumerate(values):
        assert detector.update(step, value) is None
    before = detector.state_dict()
    for step in range(40, 60):
        assert detector.update(step, 2.0, healthy=False) is None
        assert detector.update(step, math.nan) is None
    assert detector.state_dict() == before


def test_state_goes_on_where_it_was():
    values = series(0, 0.05, 0.4)
    straight = found(values)
    for cut in (5, 60, CHANGE_AT + 4, CHANGE_AT + 30):
        first, second = ChangeDetector(), ChangeDetector()
        changes = [c for t, v in enumerate(values[:cut]) if (c := first.update(t, v))]
        second.load_state_dict(first.state_dict())
        changes += [c for t, v in enumerate(values[cut:], cut) if (c := second.update(t, v))]
        assert changes == straight


def test_confidence_is_that_of_mann_kendall():
    """Fifteen falling values: z = 104 / sqrt(15 · 14 · 35 / 18)."""
    falling = [float(-t) for t in range(15)]
    z = 104 / math.sqrt(15 * 14 * 35 / 18)
    assert trend_confidence(falling, "down") == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)))
    assert trend_confidence(falling, "up") == pytest.approx(
        1 - 0.5 * math.erfc(-(z + 2 / 20.2) / math.sqrt(2)), abs=1e-4
    )
    assert trend_confidence([1.0] * 10, "down") == 0.5
    # Of three: scores 3 and 1, and a spread of sqrt(3 · 2 · 11 / 18).
    spread = math.sqrt(66 / 18)
    for values, score in (([3.0, 2.0, 1.0], 3), ([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], -3)):
        z = (score - 1 if score > 0 else score + 1) / spread
        assert trend_confidence(values, "down") == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)))
        mirrored = [-value for value in values]
        assert trend_confidence(mirrored, "up") == pytest.approx(trend_confidence(values, "down"))
    assert math.isnan(trend_confidence([2.0, 1.0], "down"))


def test_relative_change_is_checked():
    with pytest.raises(ValueError, match=r"relative_change=1.0"):
        ChangeDetector(1.0)


def test_health_begins_when_the_loss_has_fallen_and_ends_with_a_spike():
    health = LossHealth()
    assert not any(health.update(loss) for loss in (5.0, 4.0, 3.0, 2.0, 1.5))
    for _ in range(5):
        healthy = health.update(0.3)
    assert healthy
    assert not health.update(3.0)
    assert not health.update(math.nan)
    assert health.update(0.35)
    other = LossHealth()
    other.load_state_dict(health.state_dict())
    assert other.state_dict() == health.state_dict()
    assert [health.update(2.0) for _ in range(30)] == [False] * 29 + [True]


def test_health_begins_below_a_fifth_of_the_first_loss_by_the_median_of_five():
    health = LossHealth()
    assert [health.update(loss) for loss in (1.0, 0.1, 0.1, 0.3, 0.3)] == [False] * 5, "a median of 0.3"
    assert not health.update(0.2), "0.2 is a fifth, and not below"
    assert not health.update(0.1), "0.1, 0.3, 0.3, 0.2, 0.1: a median of 0.2"
    assert not health.update(0.19), "0.3, 0.3, 0.2, 0.1, 0.19: again"
    assert health.update(0.19), "0.3, 0.2, 0.1, 0.19, 0.19: below"


def test_a_healthy_loss_is_at_most_twice_the_median_and_a_tenth_more():
    health = LossHealth()
    for loss in (10.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        health.update(loss)
    assert health.began
    # The median of 10 and five times 1 is 1; of an even number it is between the two in the middle.
    assert [health.update(loss) for loss in (2.11, 2.1, 2.09)] == [False, True, True]
    health = LossHealth()
    for loss in (10.0, 9.0, 1.0, 1.0, 1.0):
        health.update(loss)
    assert health.began
    health._recent.clear()
    health._recent.extend([1.0, 2.0])
    assert not health.update(3.11)
    assert health.update(3.1)


def test_thirty_unhealthy_losses_in_a_row_are_the_new_normal_and_one_healthy_starts_the_count_anew():
    health = LossHealth()
    for loss in (10.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        health.update(loss)
    found = [health.update(5.0) for _ in range(29)]
    assert health.update(1.0)
    found += [health.update(5.0) for _ in range(30)]
    assert found == [False] * 58 + [True]
    assert health.state_dict()["recent"] == [5.0]


def test_fifteen_healthy_losses_are_remembered():
    health = LossHealth()
    for loss in (10.0, *[1.0] * 20, 1.5, 1.6):
        health.update(loss)
    assert health.state_dict()["recent"] == [1.0] * 13 + [1.5, 1.6]
