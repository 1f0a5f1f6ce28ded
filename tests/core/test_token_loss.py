"""The loss of tokens, against torch's cross-entropy."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from forge_lightning.core import token_loss as module
from forge_lightning.core.token_loss import row_chunks, token_loss


def case(dtype=torch.float32, shape=(3, 5, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels[0, 1:3] = labels[2] = -100
    return logits, labels


@pytest.mark.parametrize("at_once", [1, 14, 2**17])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
def test_losses_and_gradients_are_those_of_cross_entropy(dtype, tolerance, at_once, monkeypatch):
    monkeypatch.setattr(module, "_ON_CPU", at_once)
    logits, labels = case(dtype)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    losses, likeliest = token_loss(logits, labels)
    (losses * weights).sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    other = logits.detach().to(wide).requires_grad_()
    expected = F.cross_entropy(other.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    (expected * weights).sum().backward()
    assert losses.dtype == wide
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits.grad, other.grad.to(dtype), atol=tolerance, rtol=tolerance)
    assert torch.equal(likeliest, logits.argmax(-1))


def test_its_gradient_is_that_of_finite_differences():
    logits, labels = case(torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_loss(x, labels)[0], logits)


def test_a_position_without_a_label_may_hold_anything():
    logits, labels = case()
    with torch.no_grad():
        logits[2] = torch.nan
        logits[0, 1, 0] = torch.inf
    losses, _ = token_loss(logits, labels)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert (losses[labels == -100] == 0).all()
    assert (logits.grad[labels == -100] == 0).all()
    assert logits.grad[1].isfinite().all()


def test_what_is_not_finite_at_a_label_is_seen():
    logits, labels = case()
    with torch.no_grad():
        logits[1, 0, 0], logits[1, 1, int(labels[1, 1])] = torch.nan, -torch.inf
    losses, _ = token_loss(logits, labels)
    assert losses[1, 0].isnan()
    assert losses[1, 1] == torch.inf
    assert losses[1, 2:].isfinite().all()


def test_small_gradients_of_16_bits_wait_for_the_loss_scale():
    """A share of 1e-8 is 0 in fp16, and 1e-8 times a scale of 65,536 is not."""
    logits = torch.tensor([[18.5, 0.0]], dtype=torch.float16, requires_grad=True)
    losses, _ = token_loss(logits, torch.tensor([0]))
    (losses.sum() * 2.0**16).backward()
    assert logits.grad[0, 1].item() == pytest.approx(2.0**16 * 9.24e-9, rel=1e-2)


def test_without_a_gradient_none_is_made():
    logits, labels = case()
    with torch.no_grad():
        losses, _ = token_loss(logits, labels)
    assert losses.grad_fn is None
    assert not token_loss(logits.detach(), labels)[0].requires_grad


def test_no_second_derivative():
    logits, labels = case()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(token_loss(logits, labels)[0].sum(), logits, create_graph=True)


def test_chunks_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(module, "_ON_CPU", 20)
    rows = torch.arange(11)
    chunks = list(row_chunks(torch.empty(11, 7)))
    assert torch.equal(torch.cat([rows[chunk] for chunk in chunks]), rows)
    assert all(len(rows[chunk]) <= 2 for chunk in chunks)
    assert len(list(row_chunks(torch.empty(11, 7), 4))) == 2


def test_a_compiled_step_takes_the_plain_loss_whatever_the_length():
    @torch.compile(backend="aot_eager")
    def step(logits, labels):
        return token_loss(logits, labels)[0].sum()

    torch._dynamo.reset()
    counters.clear()
    for length in range(3, 12):
        logits, labels = case(shape=(3, length, 7))
        torch.testing.assert_close(step(logits, labels), token_loss(logits, labels)[0].sum())
    assert counters["stats"]["unique_graphs"] <= 3
    torch._dynamo.reset()


def test_no_whole_copy_of_16_bits_is_made(monkeypatch):
    monkeypatch.setattr(module, "_ON_CPU", 20)
    logits, labels = case(torch.bfloat16, shape=(16, 8, 10))
    largest = 0

    class Watches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                largest = max(largest, found.numel())
            return found

    with Watches():
        token_loss(logits, labels)[0].sum().backward()
    assert largest <= 16 * 8  # the losses
