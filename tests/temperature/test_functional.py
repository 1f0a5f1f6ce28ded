import math

import pytest
import torch

from forge_lightning.temperature.functional import temperature_kl
from tests.calibration.test_functional import draw

TEMPERATURES = [0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0, 4.0]


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
    monkeypatch.setattr("forge_lightning.core.token_loss._ON_CPU", at_once)
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
