import math

import pytest
import torch
from torch.nn import functional as F

from forge_lightning.dream.functional import (
    gumbel_top_k,
    importance_weights,
    replay_priority,
    stored_logit_loss,
    top_logits,
)


def priority(**changed):
    known = {"loss": 1.0, "best_loss": 1.0, "success": 1.0, "best_success": 1.0, "replays": 0.0}
    known |= {key: value for key, value in changed.items() if key in known}
    options = {"threshold": 1.0, "scale": 0.5} | {key: value for key, value in changed.items() if key not in known}
    return replay_priority(**{key: torch.tensor([value]) for key, value in known.items()}, **options).item()


def test_priority_is_that_of_the_formula():
    assert priority() == pytest.approx(0.1 + 1.0)
    p = 1 / (1 + math.exp(-(1.0 - 2.0) / 0.5))
    got = priority(loss=2.0, best_loss=0.5, success=0.25, best_success=1.0, replays=8.0)
    assert got == pytest.approx(0.1 + (4 * p * (1 - p) + 0.5 * 0.75 + 0.25 * 0.5) / 2)


def test_what_is_unknown_adds_nothing():
    assert priority(threshold=math.nan, success=math.nan, best_success=math.nan) == pytest.approx(0.1)
    assert priority(loss=math.nan, best_loss=math.nan) == pytest.approx(0.1)


def test_gumbel_draws_in_proportion_and_never_twice():
    weights = torch.tensor([1.0, 2.0, 4.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(4)
    for _ in range(4000):
        drawn = gumbel_top_k(weights.log(), 2, torch.rand(4, generator=generator))
        assert len(set(drawn.tolist())) == 2
        first[drawn[0]] += 1
    torch.testing.assert_close(first / 4000, weights / 7, atol=0.03, rtol=0)


def test_importance_weights_make_the_mean_that_of_all():
    values, weights = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0.2, 0.3, 0.5])
    corrected = importance_weights(weights, 3, beta=1.0)
    assert corrected.max() == 1
    mean = (weights * corrected * values).sum() / (weights * corrected).sum()
    assert mean.item() == pytest.approx(values.mean().item())
    assert torch.equal(importance_weights(weights, 3, beta=0.0), torch.ones(3))


def test_stored_logits_of_all_classes_give_the_squared_difference():
    old, new = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    loss = stored_logit_loss(new, *top_logits(old, 32))
    torch.testing.assert_close(loss, (new - old).square().mean(-1))
    assert stored_logit_loss(old, *top_logits(old, 32)).abs().max() < 1e-10


@pytest.mark.parametrize("offset", [0.0, -100.0, -250.0])
def test_top_logits_rounded_to_16_bits_give_the_gradient_of_32(offset):
    """Confident rows around an offset, as GPT-2's logits lie."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator) * 3 + offset
    logits[torch.arange(64), torch.randint(0, 5000, (64,), generator=generator)] += 22
    values, classes, total = top_logits(logits, 32)

    def gradient(kept):
        new = (logits + 0.5 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(1))).requires_grad_()
        stored_logit_loss(new, kept, classes, total).mean().backward()
        return new.grad

    exact = gradient(values)
    assert (gradient(values.half()) - exact).norm() < 0.02 * exact.norm()


def test_stored_top_logits_give_the_divergence_with_one_bucket_for_the_rest():
    old, new = torch.randn(5, 50), torch.randn(5, 50, requires_grad=True)
    values, classes, total = top_logits(old, 8)
    loss = stored_logit_loss(new, values, classes, total)

    def bucketed(logits):
        p = logits.softmax(-1)
        top = p.gather(-1, classes.long())
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    expected = F.kl_div(bucketed(new).log(), bucketed(old), reduction="none").sum(-1)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    loss.sum().backward()
    assert new.grad.abs().sum() > 0
    torch.testing.assert_close(stored_logit_loss(old, values, classes, total), torch.zeros(5), atol=1e-5, rtol=0)


def test_a_sure_prediction_stays_finite():
    logits = torch.full((2, 50), -100.0)
    logits[:, 3] = 100.0
    new = torch.randn(2, 50, requires_grad=True)
    loss = stored_logit_loss(new, *top_logits(logits, 4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert new.grad.isfinite().all()
