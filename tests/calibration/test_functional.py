import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from forge_lightning.calibration.functional import (
    brier_score,
    expected_calibration_error,
    log_probabilities,
    minimize_convex,
    nll_derivatives,
    reliability_bins,
)


def draw(n=200, classes=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, generator=generator), torch.randint(0, classes, (n,), generator=generator)


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_calibration_error_is_torchmetrics(scale):
    logits, target = draw(scale=scale)
    confidence, predicted = logits.softmax(-1).max(-1)
    ours = expected_calibration_error(reliability_bins(confidence, predicted == target))
    theirs = MulticlassCalibrationError(7, n_bins=15, norm="l1")(logits.softmax(-1), target)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


def test_bins_hold_every_prediction_and_add_up():
    confidence = torch.tensor([0.0, 0.05, 0.5, 1.0])
    correct = torch.tensor([False, True, True, False])
    whole = reliability_bins(confidence, correct, 10)
    assert whole.total.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    parts = [reliability_bins(c, k, 10) for c, k in zip(confidence.split(2), correct.split(2), strict=True)]
    for a, b in zip(whole, (x + y for x, y in zip(*parts, strict=True)), strict=True):
        assert torch.allclose(a, b)


def test_no_prediction_has_no_error():
    assert math.isnan(expected_calibration_error(reliability_bins(torch.empty(0), torch.empty(0))))


def test_brier_score_against_its_definition():
    logits, target = draw()
    expected = (logits.softmax(-1) - F.one_hot(target, 7)).square().sum(-1)
    assert torch.allclose(brier_score(logits.log_softmax(-1), target), expected, atol=1e-6)


def test_derivatives_against_autograd():
    logits, target = draw()
    for beta in (0.2, 1.0, 3.0):
        b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
        nll = F.cross_entropy(b * logits.double(), target, reduction="sum")
        (slope,) = torch.autograd.grad(nll, b, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, b)
        found = [float(t) for t in nll_derivatives(logits, target, torch.tensor([beta], dtype=torch.float64))]
        assert found == pytest.approx([t.item() for t in (nll.detach(), slope.detach(), curvature)], rel=1e-5)


@pytest.mark.parametrize("true", [0.3, 0.7, 1.0, 1.9, 5.0])
def test_minimum_against_a_fine_search(true):
    """Labels drawn from the model at a known temperature."""
    logits, _ = draw(4000, 5)
    target = torch.multinomial((logits / true).softmax(-1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    grid = torch.logspace(-1, 1, 17, dtype=torch.float64)
    beta, nll = minimize_convex(grid, *nll_derivatives(logits, target, grid))
    fine = torch.linspace(0.9 * beta, 1.1 * beta, 2001, dtype=torch.float64)
    values = torch.stack([F.cross_entropy(b * logits.double(), target, reduction="sum") for b in fine])
    assert beta == pytest.approx(float(fine[values.argmin()]), rel=2e-3)
    assert nll == pytest.approx(float(values.min()), rel=5e-5)  # of a cubic between grid points
    assert 1 / beta == pytest.approx(true, rel=0.1)


def test_minimum_at_an_end_and_of_nothing():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert minimize_convex(x, x**2, 2 * x, 0 * x + 2) == (1.0, 1.0)
    assert minimize_convex(x, -x, 0 * x - 1, 0 * x) == (3.0, -3.0)
    assert all(math.isnan(v) for v in minimize_convex(x, x * math.inf, x, x))


def test_tokens_that_cannot_come_do_not_break_the_fit():
    logits, target = draw(500)
    masked = torch.cat([logits, torch.full((500, 1), -math.inf)], 1)
    grid = torch.logspace(-1, 1, 17, dtype=torch.float64)
    expected = minimize_convex(grid, *nll_derivatives(logits, target, grid))
    assert minimize_convex(grid, *nll_derivatives(masked, target, grid)) == pytest.approx(expected, rel=1e-4)


def test_label_that_cannot_come_has_no_temperature():
    logits, target = draw(50)
    logits[7, target[7]] = -math.inf
    grid = torch.logspace(-1, 1, 17, dtype=torch.float64)
    assert all(math.isnan(v) for v in minimize_convex(grid, *nll_derivatives(logits, target, grid)))


def test_log_probabilities_of_half_precision():
    logits = draw()[0].bfloat16()
    assert log_probabilities(logits).dtype == torch.float32
    assert torch.allclose(log_probabilities(logits, 0.01).exp().sum(-1), torch.ones(200), atol=1e-5)
