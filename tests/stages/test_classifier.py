"""On recorded runs (`python -m benchmarks.stages record`), and on series made here."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.stages import changes_of
from forge_lightning.stages.classifier import Observation, StageClassifier, TrainingStage, observations, replay

RECORDED = sorted((Path(__file__).parents[1] / "recorded_runs").glob("*.jsonl.gz"))
GROKS = [path for path in RECORDED if "grok" in path.name]
NEVER = [path for path in RECORDED if "grok" not in path.name]


def read(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def reaches(rows, level):
    return next(r["step"] for r in rows if r["kind"] == "validation" and r["metrics"]["val/accuracy"] >= level)


def ids(path):
    return path.name.split(".")[0]


def test_there_are_runs_enough():
    assert len(GROKS) >= 5
    assert len(NEVER) >= 5


@pytest.mark.parametrize("path", GROKS, ids=ids)
def test_grokking_is_told_in_the_right_order(path):
    rows = read(path)
    found = replay(rows)
    assert [t.after.label for t in found] == ["memorisation", "onset", "generalisation", "consolidation"]
    assert found[1].step < reaches(rows, 0.5)
    assert all(t.reason and t.evidence for t in found)


@pytest.mark.parametrize("path", NEVER, ids=ids)
def test_runs_that_never_grok_are_not_said_to(path):
    stages = {t.after.label for t in replay(read(path))}
    assert "memorisation" in stages
    assert not stages & {"onset", "generalisation", "consolidation"}


@pytest.mark.parametrize("path", GROKS, ids=ids)
def test_the_dimension_falls_where_a_run_groks(path):
    rows = read(path)
    falls = [c.step for c in changes_of(rows) if c.direction == "down"]
    assert falls
    assert falls[0] <= reaches(rows, 0.5) + 100


@pytest.mark.parametrize("path", NEVER, ids=ids)
def test_the_dimension_does_not_fall_elsewhere(path):
    assert [c for c in changes_of(read(path)) if c.direction == "down"] == []


@pytest.mark.parametrize("path", GROKS[:2], ids=ids)
@pytest.mark.parametrize("cut", [3, 20, 45])
def test_state_goes_on_where_it_was(path, cut):
    seen = observations(read(path))
    first, second = StageClassifier(), StageClassifier()
    found = [t for now in seen[:cut] if (t := first.update(now))]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [t for now in seen[cut:] if (t := second.update(now))]
    assert found == replay(read(path))


def run(points, **options):
    """``(train_loss, val_loss)`` or with successes, one observation each."""
    classifier = StageClassifier(**{"cross_entropy": True} | options)
    found = [classifier.update(Observation(step, *point)) for step, point in enumerate(points)]
    return classifier, [t for t in found if t is not None]


def test_a_loss_that_is_not_finite_is_divergence_at_once():
    for bad in (math.nan, math.inf):
        classifier, found = run([(1.0, 1.0)] * 3 + [(bad, 1.0)])
        assert classifier.stage is TrainingStage.DIVERGENCE
        assert found[-1].reason == "a loss is not finite"
    classifier, _ = run([(1.0, 1.0)] * 3 + [(1.0, math.nan, 0.5, 0.5)])
    assert classifier.stage is TrainingStage.DIVERGENCE


def test_success_that_is_lost_for_good_is_divergence():
    good, bad = (0.1, 0.2, 0.97, 0.5), (3.0, 3.0, 0.05, 0.05)
    classifier, _ = run([good] * 12 + [bad] * 60)
    assert classifier.stage is TrainingStage.DIVERGENCE


def test_a_spike_changes_nothing():
    calm = [(0.05, 6.0, 1.0, 0.02)] * 20
    spike = [(4.0, 6.5, 0.1, 0.02)] * 3
    assert run(calm + spike + calm)[1] == run(calm + calm)[1]


def test_learning_without_memorisation_is_generalisation():
    """Losses of a language model that falls on both sides."""
    losses = [6 * math.exp(-0.05 * t) + 1.5 for t in range(40)]
    classifier, found = run([(loss, loss + 0.05) for loss in losses])
    assert [t.after.label for t in found][:1] == ["generalisation"]
    classifier, found = run([(loss, loss + 0.05) for loss in losses] + [(1.6, 1.65)] * 30)
    assert classifier.stage is TrainingStage.PLATEAU


def test_overfitting_is_memorisation():
    points = [(3 * math.exp(-0.1 * t), 2.5 + 0.05 * t) for t in range(40)]
    assert run(points)[0].stage is TrainingStage.MEMORISATION


def test_overfitting_that_sinks_from_above_is_memorisation():
    """Validation success is still above half of training success, and on its way down."""
    by_loss = [(3.0, 0.2)] * 3 + [(0.05, min(0.6, 0.2 + 0.03 * t)) for t in range(60)]
    sinks = [max(0.55, 0.9 - 0.02 * t) for t in range(60)]
    by_success = [(0.05, 1.0 + 0.03 * t, 0.99, val) for t, val in enumerate(sinks)]
    for points in (by_loss, by_success):
        classifier, found = run(points)
        assert "generalisation" not in [t.after.label for t in found]
        assert classifier.stage is TrainingStage.MEMORISATION


@pytest.mark.parametrize(("train", "val", "noise"), [(0.9, 0.85, 0.016), (0.85, 0.85, 0.02)])
def test_noise_of_validation_is_no_memorisation(train, val, noise):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        levels = rng.normal(val, noise, 60)
        points = [(0.3, 0.4 - level + val, train, level) for level in levels]
        assert TrainingStage.MEMORISATION not in [t.after for t in run(points)[1]]


def test_without_validation_only_training_is_judged():
    falling = [(5 * math.exp(-0.05 * t),) for t in range(30)]
    assert run(falling)[0].stage is TrainingStage.UNKNOWN
    assert run(falling + [(0.8,)] * 30)[0].stage is TrainingStage.PLATEAU


def test_a_stage_must_be_seen_several_times():
    solved, poor = (0.01, 0.01, 1.0, 1.0), (4.0, 4.0, 0.01, 0.01)
    assert run([poor] * 5 + [solved] * 2 + [poor] * 5)[0].stage is not TrainingStage.CONSOLIDATION
    short, long = (len(run([solved] * 12, patience=p)[1]) for p in (3, 12))
    assert (short, long) == (2, 0)  # through generalisation, however quick


def test_the_evidence_says_what_it_rests_on():
    _, found = run([(0.05, 6.0, 1.0, 0.02, 0.3, 1.5)] * 12)
    (transition,) = found
    assert transition.evidence["gap"] == pytest.approx(0.98)
    assert (transition.evidence["cosine"], transition.evidence["grad_norm"]) == (0.3, 1.5)
    event = transition.as_event()
    assert (event["kind"], event["before"], event["after"]) == ("stage", "unknown", "memorisation")
    json.dumps(event)


@pytest.mark.parametrize("options", [{"window": 3}, {"patience": 0}, {"min_dwell": -1}, {"solved": 1.0}])
def test_bad_arguments_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        StageClassifier(**options)


def noisy(level, spread, rng, correlation=0.0, count=200):
    steps, x = rng.normal(size=count) * spread * math.sqrt(1 - correlation**2), rng.normal() * spread
    out = []
    for step in steps:
        x = correlation * x + step
        out.append(level * math.exp(x))
    return out


CONSTANTS = {
    "nothing learned": (2.3, 2.3),
    "language model": (3.2, 3.25),
    "fine-tuned": (1.5, 1.6),
    "small": (0.4, 0.45),
}


@pytest.mark.parametrize("levels", CONSTANTS)
def test_noise_around_constants_is_a_plateau_and_no_other_stage(levels):
    rng = np.random.default_rng(0)
    train, val = CONSTANTS[levels]
    names, changes = set(), 0
    for _ in range(20):
        points = zip(noisy(train, 0.02, rng), noisy(val, 0.01, rng, 0.5), strict=True)
        found = run(points)[1]
        names |= {t.after.label for t in found}
        changes += len(found)
    assert names <= {"plateau", "unknown"}
    assert changes <= 26  # one each, and at most six by chance


def test_noise_around_successes_is_a_plateau_too():
    rng, changes = np.random.default_rng(1), 0
    for _ in range(20):
        losses = zip(noisy(1.1, 0.02, rng), noisy(1.15, 0.01, rng, 0.5), strict=True)
        points = [(*loss, 0.6 + 0.02 * rng.normal(), 0.58 + 0.01 * rng.normal()) for loss in losses]
        classifier, found = run(points, cross_entropy=False)
        changes += len(found)
        assert classifier.stage in (TrainingStage.PLATEAU, TrainingStage.UNKNOWN)
    assert changes <= 26


T = np.arange(200)
OTHER_LOSSES = {
    "squares of small numbers": (1e-2 * np.exp(-T / 60) + 1e-3, np.full(200, 1e-2)),
    "squares of large numbers": (100 * np.exp(-T / 15) + 1e-3, 50 * np.exp(-T / 15) + 30 + 0.1 * T),
    "a Gaussian likelihood": (-3 - 27 * (1 - np.exp(-T / 60)), -3 - 26 * (1 - np.exp(-T / 60))),
    "one that passes 0": (2 - 5 * (1 - np.exp(-T / 20)), np.where(T < 60, 2 - 3 * (1 - np.exp(-T / 20)), 0.05 * T - 4)),
}


@pytest.mark.parametrize("loss", OTHER_LOSSES)
def test_a_loss_without_a_known_floor_names_no_success(loss):
    points = list(zip(*OTHER_LOSSES[loss], strict=True))
    classifier, found = run(points, cross_entropy=False)
    assert {t.after.label for t in found} <= {"plateau", "unknown"}
    assert not {"train_likelihood", "val_likelihood", "gap"} & classifier.evidence.keys()


def test_a_negative_loss_is_no_cross_entropy():
    classifier, found = run(zip(*OTHER_LOSSES["a Gaussian likelihood"], strict=True))
    assert {t.after.label for t in found} <= {"plateau", "unknown"}
    assert not classifier.cross_entropy
