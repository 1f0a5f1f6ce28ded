"""Times are set here, so that what follows from them can be computed by hand."""

import math

import pytest

from forge_lightning.geometry import pace
from forge_lightning.geometry.pace import ProbePace


def timed(every_n_steps, max_overhead, steps, probes):
    made = ProbePace(every_n_steps, max_overhead)
    made.step_seconds.extend(steps)
    made.probe_seconds.extend(probes)
    return made


def same(value):
    return value


def test_overhead_is_the_fastest_probe_over_the_median_steps_between():
    made = timed(10, None, [1.0, 2.0, 9.0], [4.0, 3.0, 5.0])
    assert made.overhead() == 3.0 / (10 * 2.0)
    assert made.overhead(30) == 3.0 / (30 * 2.0)
    assert math.isnan(timed(10, None, [], [1.0]).overhead())


@pytest.mark.parametrize(
    ("probe", "interval"), [(0.5, 10), (1.0, 10), (1.01, 20), (2.0, 20), (2.1, 30)]
)  # steps of a second, and a tenth of the time
def test_a_costly_probe_comes_at_a_multiple_of_its_interval(probe, interval):
    made = timed(10, 0.1, [1.0] * 5, [probe] * 2)
    warning = made.plan_next(40, same)
    assert (made.interval, made.next_due) == (interval, 40 + interval)
    assert bool(warning) == (interval > 10)
    if warning:
        assert f"a probe takes {1000 * probe:.3g} ms and a step 1e+03 ms" in warning
        assert f"every {interval} steps from here on, not every 10" in warning


def test_it_warns_again_only_if_probes_become_rarer_still():
    made = timed(10, 0.1, [1.0] * 5, [2.0] * 2)
    assert made.plan_next(10, same)
    assert not made.plan_next(30, same)
    made.probe_seconds.extend([1.5] * 3)
    assert not made.plan_next(50, same), "as often as before"
    made.probe_seconds.extend([4.5] * 3)
    assert "every 50 steps" in made.plan_next(70, same)
    made.probe_seconds.extend([0.5] * 3)
    assert not made.plan_next(120, same)
    assert made.interval == 10


@pytest.mark.parametrize(
    ("max_overhead", "steps", "probes"), [(None, [1.0], [9.0, 9.0]), (0.1, [], [9.0, 9.0]), (0.1, [1.0], [9.0])]
)
def test_without_a_limit_or_two_timed_probes_the_interval_stays(max_overhead, steps, probes):
    made = timed(10, max_overhead, steps, probes)
    assert made.plan_next(45, same) == ""
    assert (made.interval, made.next_due) == (10, 50)


def test_the_first_rank_s_times_count_on_all():
    made = timed(10, 0.1, [1.0], [1.0, 1.0])
    made.plan_next(10, lambda share: 2 * share)
    assert made.interval == 20


def test_steps_are_timed_from_the_end_of_the_one_before_or_of_a_probe(monkeypatch):
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(now))
    made = ProbePace(10, None)
    made.end_step()
    made.end_step()
    made.end_probe()
    made.end_step()
    assert list(made.step_seconds) == [2.0, 4.0]
    made.start_fit()
    made.end_step()
    assert not made.step_seconds


def test_points_are_thinned_before_probes_all_but_stop():
    made = timed(10, 0.1, [1.0] * 10, [8.0, 8.0])  # eight times as long as it may: every 80 steps
    assert made.fewer_points(512, same) == int(512 * math.sqrt(4 / 8))
    assert made.fewer_points(150, same) == 128
    assert made.fewer_points(64, same) == 64
    assert timed(10, 0.1, [1.0] * 10, [4.0, 4.0]).fewer_points(512, same) == 512  # every 40 steps is often enough
    assert timed(10, None, [1.0] * 10, [8.0, 8.0]).fewer_points(512, same) == 512
    assert timed(10, 0.1, [1.0] * 10, [8.0]).fewer_points(512, same) == 512
    assert "every 80 steps" in made.plan_next(10, same)
    made.forget_probes()
    assert not made.plan_next(20, same)
    assert (made.interval, made.next_due) == (10, 30)
