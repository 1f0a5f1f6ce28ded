import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from forge_lightning.calibration import functional as calibration
from forge_lightning.calibration.functional import (
    brier_score,
    expected_calibration_error,
    log_probabilities,
    minimize_convex,
    nll_derivatives,
    reliability_bins,
)
from forge_lightning.temperature.functional import temperature_kl

TEMPERATURES = [0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, 4.0]


def draw(n=200, classes=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, generator=generator), torch.randint(0, classes, (n,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_divergence_and_its_gradient_are_finite(temperature, dtype, scale):
    student, teacher = (draw(seed=seed, scale=scale)[0].to(dtype) for seed in (0, 1))
    student.requires_grad_()
    loss = temperature_kl(student, teacher, temperature).mean()
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_divergence_against_its_definition(temperature):
    student, teacher = (draw(seed=seed)[0].double() for seed in (0, 1))
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    assert torch.allclose(temperature_kl(student, teacher, temperature), expected)
    assert torch.equal(temperature_kl(teacher, teacher, temperature), torch.zeros(len(teacher)).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("at_once", [1, 20, 10_000])
def test_gradient_is_that_of_the_definition_and_zero_elsewhere(at_once, dtype, monkeypatch):
    monkeypatch.setattr(calibration._TemperatureKL, "ON_CPU", at_once)
    student, teacher = (draw(seed=seed)[0].to(dtype).unflatten(0, (20, 10)) for seed in (0, 1))
    places = torch.tensor([199, 3, 4, 77])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.promote_types(dtype, torch.float32))
    by_hand = student.clone().requires_grad_()
    p, q = ((z.flatten(0, 1)[places].to(weights.dtype) / 2.0).log_softmax(-1) for z in (teacher, by_hand))
    (4.0 * (p.exp() * (p - q)).sum(-1) * weights).sum().backward()
    student.requires_grad_()
    divergence = temperature_kl(student, teacher, 2.0, places)
    for _ in range(2):  # a graph that is kept
        student.grad = None
        (divergence * weights).sum().backward(retain_graph=True)
        assert torch.allclose(student.grad, by_hand.grad)
    touched = student.grad.flatten(0, 1).abs().sum(-1).nonzero().squeeze(1)
    assert touched.tolist() == sorted(places.tolist())
    with pytest.raises(
        RuntimeError, match=r"cannot be differentiated twice, as `create_graph=True` asks. Leave it out"
    ):
        torch.autograd.grad(divergence.mean(), student, create_graph=True)


def test_places_may_repeat_and_shapes_stay():
    student, teacher = (draw(n=6, seed=seed)[0].requires_grad_() for seed in (0, 1))
    temperature_kl(student, teacher, 2.0, torch.tensor([4, 4, 1])).sum().backward()
    assert teacher.grad is None
    once = student.detach().clone().requires_grad_()
    temperature_kl(once, teacher, 2.0, torch.tensor([4, 1])).sum().backward()
    assert torch.allclose(student.grad[4], 2 * once.grad[4])
    assert torch.allclose(student.grad[1], once.grad[1])
    assert temperature_kl(student.unflatten(0, (2, 3)), teacher.unflatten(0, (2, 3)), 2.0).shape == (2, 3)
    assert temperature_kl(student[0], teacher[0], 2.0).shape == ()
    assert temperature_kl(student, teacher, 2.0, torch.tensor([], dtype=torch.long)).shape == (0,)


def test_only_what_counts_is_held_and_nothing_without_a_gradient():
    student, teacher = (draw(n=50, seed=seed)[0].requires_grad_() for seed in (0, 1))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t.shape), t)[1], lambda t: t):
        temperature_kl(student, teacher, 2.0, torch.tensor([1, 2]))
        assert (2, 7) in held
        assert all(shape[0] < 50 for shape in held)
        held.clear()
        with torch.no_grad():
            temperature_kl(student, teacher, 2.0)
    assert not held


def test_gradients_of_half_precision_keep_what_a_loss_scale_saves():
    student, teacher = (draw(n=4, classes=2000, seed=seed, scale=5.0)[0].half() for seed in (0, 1))
    student.requires_grad_()
    (2.0**16 * temperature_kl(student, teacher, 1.0).mean()).backward()
    assert (student.grad.abs() > 0).float().mean() > 0.99


def test_logits_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"`student` is \(2, 3\) and `teacher` \(3, 3\); both must be alike"):
        temperature_kl(torch.zeros(2, 3), torch.zeros(3, 3), 1.0)


def test_gradient_does_not_shrink_with_temperature():
    """τ² keeps it: at large τ it is the difference of centred logits over their number."""
    student, teacher = (draw(seed=seed)[0] for seed in (0, 1))
    student.requires_grad_()
    temperature_kl(student, teacher, 1000.0).sum().backward()
    centred = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    assert torch.allclose(student.grad, centred / student.shape[1], atol=1e-2)


def test_excluded_tokens_and_broken_logits():
    student, teacher = (draw(seed=seed)[0] for seed in (0, 1))
    student, teacher = student.clone(), teacher.clone()
    student[:, 0] = teacher[:, 0] = -math.inf
    student.requires_grad_()
    loss = temperature_kl(student, teacher, 0.5)
    assert torch.allclose(loss, temperature_kl(student[:, 1:], teacher[:, 1:], 0.5), atol=1e-5)
    loss.sum().backward()
    assert student.grad.isfinite().all()
    broken = teacher.clone()
    broken[3, 2], broken[4, 2] = math.nan, math.inf
    broken[5] = -math.inf
    assert temperature_kl(broken, teacher, 1.0).isnan().tolist() == [i in (3, 4, 5) for i in range(len(teacher))]
    huge = torch.tensor([[3e38, -3e38, 0.0]])
    assert temperature_kl(huge, huge.flip(1), 0.5).isfinite().all()


def test_divergence_under_autocast_is_computed_in_single():
    student, teacher = (draw(seed=seed)[0] for seed in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        inside = temperature_kl(student, teacher, 2.0)
    assert torch.equal(inside, temperature_kl(student, teacher, 2.0))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="must be above 0"):
        temperature_kl(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


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
