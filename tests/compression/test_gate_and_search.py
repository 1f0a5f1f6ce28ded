"""The gate by its statistics, and the choice by trying everything."""

import itertools
import math

import pytest
import torch

from forge_lightning.compression.gate import Gate, t_quantile, upper_bound
from forge_lightning.compression.search import Candidate, error, frontier, size


def differences(mean, count=200, seed=0):
    return mean + 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("share", "degrees", "value"),
    [(0.95, 1, 6.3138), (0.95, 10, 1.8125), (0.99, 30, 2.4573), (0.975, 100, 1.9840), (0.95, 10_000, 1.6450)],
)
def test_quantiles_of_students_table(share, degrees, value):
    assert t_quantile(share, degrees) == pytest.approx(value, abs=5e-4)


def test_bounds_are_the_formula_and_agree():
    values = differences(0.01)
    expected = float(values.mean()) + 1.6525 * float(values.std()) / math.sqrt(200)
    assert upper_bound(values) == pytest.approx(expected, abs=1e-5)
    assert upper_bound(values, method="bootstrap") == pytest.approx(expected, abs=5e-4)
    assert upper_bound(values, method="bootstrap") == upper_bound(values, method="bootstrap")


@pytest.mark.parametrize("method", ["t", "bootstrap"])
def test_the_bound_covers_as_often_as_it_says(method):
    covered = sum(upper_bound(differences(0.0, 30, seed), method=method) >= 0 for seed in range(200))
    assert 178 <= covered <= 200  # 95 % of 200 is 190, with a standard error of 3


def test_a_bound_of_too_little_is_nan():
    assert math.isnan(upper_bound(torch.tensor([0.1])))
    assert math.isnan(upper_bound(torch.tensor([0.1, math.nan])))
    assert math.isnan(upper_bound(torch.tensor([0.1, math.inf]), method="bootstrap"))


def test_an_identity_stage_is_never_refused():
    before = 2 + differences(0.0)
    gate = Gate(max_rel_ppl=0.005, min_byte_gain=0.0)
    assert all(gate.judge(before, before.clone(), 100, 100).accepted for _ in range(20))


def test_not_proven_is_refused():
    """A mean of zero is no pass where the sequences say too little."""
    few = differences(0.0, 6)
    verdict = Gate(max_rel_ppl=0.02).judge(torch.zeros(6), few - few.mean(), 100, 50)
    assert not verdict.accepted
    assert verdict.mean == pytest.approx(0, abs=1e-12)
    assert "may rise by" in verdict.reason


def test_reasons_name_what_fails():
    before = torch.full((50,), 2.0)
    gate = Gate(max_rel_ppl=0.02, min_byte_gain=0.1, max_pass_drop=0.05)
    verdict = gate.judge(before, before + 0.5, 100, 95, (0.5, 0.3))
    assert not verdict.accepted
    for said in ("64.87%", "2.0% is allowed", "saves 5.0%", "10.0% is asked for", "30.0% of the problems"):
        assert said in verdict.reason
    assert gate.judge(before, before + 0.01, 100, 80, (0.5, 0.46)).accepted
    broken = gate.judge(before, torch.full((50,), math.nan), 100, 50)
    assert not broken.accepted
    assert "not finite" in broken.reason


@pytest.mark.parametrize(
    "options",
    [
        {"max_rel_ppl": 0.0},
        {"confidence": 0.5},
        {"sequences": 1},
        {"min_byte_gain": -0.1},
        {"method": "z"},
        {"max_pass_drop": 2},
        {"problems": 0},
    ],
)
def test_gates_refuse(options):
    with pytest.raises(ValueError, match=rf"Gate\({next(iter(options))}="):
        Gate(**options)


def random_candidates(seed, matrices=4, codecs=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        str(name): [
            Candidate(
                codec, int(torch.randint(1, 50, (), generator=generator)), float(torch.rand((), generator=generator))
            )
            for codec in range(codecs)
        ]
        for name in range(matrices)
    }


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_the_frontier_is_beaten(seed):
    """Of all 256 choices none is as small and has less loss than one on the frontier."""
    candidates = random_candidates(seed)
    everything = [dict(zip(candidates, each, strict=True)) for each in itertools.product(*candidates.values())]
    found = frontier(candidates)
    assert [size(choice) for choice in found] == sorted({size(choice) for choice in found})
    for choice in found:
        assert not any(size(other) <= size(choice) and error(other) < error(choice) - 1e-12 for other in everything)
    assert size(found[0]) == min(map(size, everything))
    assert error(found[-1]) == pytest.approx(min(map(error, everything)))


def test_a_matrix_without_candidates_is_refused():
    with pytest.raises(ValueError, match="needs a candidate"):
        frontier({"a": []})
