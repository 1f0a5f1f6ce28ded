import math

import pytest
import torch
from torch.nn import functional as F

from forge_lightning.self_model.functional import (
    explained_variance,
    normalized_target,
    prediction_sums,
    uncertainty_weights,
)


def test_target_is_layer_norm_without_scale_or_gradient():
    x = torch.randn(5, 7, requires_grad=True)
    assert torch.allclose(normalized_target(x), F.layer_norm(x, (7,)), atol=1e-4)
    assert not normalized_target(x).requires_grad
    assert normalized_target(x, stop_gradient=False).requires_grad
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        assert torch.allclose(normalized_target(scale * x), normalized_target(x), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e6, 1 / 3])
def test_constant_rows_are_zero_not_rounding_blown_up(value):
    x = torch.full((2, 768), value, requires_grad=True)
    target = normalized_target(x, stop_gradient=False)
    assert torch.equal(target, torch.zeros(2, 768))
    target.sum().backward()
    assert x.grad.isfinite().all()


def test_half_precision_target_is_computed_in_single():
    x = torch.randn(3, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert normalized_target(x).dtype == torch.float32
    assert normalized_target(x.double()).dtype == torch.float64


def test_sums_against_numpy():
    generator = torch.Generator().manual_seed(0)
    prediction, target, source = (torch.randn(6, 4, generator=generator) for _ in range(3))
    sums = prediction_sums(prediction, target, source)
    p, t, s = prediction.numpy(), target.numpy(), source.numpy()
    assert float(sums.error) == pytest.approx(((p - t) ** 2).sum(), rel=1e-6)
    assert float(sums.spread) == pytest.approx(t.var(0).sum() * 6, rel=1e-6)
    assert float(sums.copy_error) == pytest.approx(((s - t) ** 2).sum(), rel=1e-6)
    assert float(sums.size) == 24
    assert math.isnan(prediction_sums(prediction, target, source[:, :2]).copy_error)


@pytest.mark.parametrize(("error", "trivial", "expected"), [(0.0, 2.0, 1.0), (2.0, 2.0, 0.0), (4.0, 2.0, -1.0)])
def test_explained_variance(error, trivial, expected):
    assert float(explained_variance(torch.tensor(error), torch.tensor(trivial))) == expected


def test_explained_variance_of_a_trivial_predictor_without_error_is_unknown():
    assert math.isnan(explained_variance(torch.tensor(0.0), torch.tensor(0.0)))


@pytest.mark.parametrize("losses", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [math.nan, 1e-9, 50.0], [3.0]])
def test_weights_are_bounded_and_of_mean_one(losses):
    weights = uncertainty_weights(losses)
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert min(weights) >= 0.5 - 1e-9
    assert max(weights) <= 2 + 1e-9


@pytest.mark.parametrize("losses", [[0.01] + [5.0] * 11, [5.0] + [0.01] * 11])
def test_weights_stay_in_their_range_where_one_loss_stands_out(losses):
    weights = uncertainty_weights(losses)
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert weights[0] == pytest.approx(2.0 if losses[0] < losses[1] else 0.5)
    assert all(0.5 <= weight <= 2 for weight in weights)


def test_rows_that_do_not_count_leave_sums_and_gradients_alone():
    generator = torch.Generator().manual_seed(0)
    prediction, target, source = (torch.randn(6, 4, generator=generator) for _ in range(3))
    counts = torch.tensor([True, False, True, True, False, True])
    expected = prediction_sums(*(x[counts] for x in (prediction, target, source)))
    prediction[1], target[1], source[4] = torch.nan, torch.inf, torch.nan
    prediction.requires_grad_()
    found = prediction_sums(prediction, target, source, counts)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)
    found.error.backward()
    assert prediction.grad.isfinite().all()
    assert torch.equal(prediction.grad.abs().sum(1) > 0, counts)
    nothing = prediction_sums(prediction, target, source, torch.zeros(6, dtype=torch.bool))
    assert [float(value.detach()) for value in nothing] == [0.0] * 4
