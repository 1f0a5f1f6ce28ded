"""Cross-entropy of tokens, a few rows of the logits at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forge_lightning.core.tokens import IGNORED

_ON_CPU, _ELSEWHERE = 2**17, 2**26
"""Logits at a time: what a processor's cache holds, and 256 MiB of fp32."""


def row_chunks(logits: Tensor, count: int | None = None) -> Iterator[slice]:
    """Consecutive rows of logits ``(N, V)`` to work on at a time, so that no whole copy in fp32 is made.

    Args:
        logits: ``(N, V)``.
        count: Number of rows. Default: all.
    """
    at_once = _ON_CPU if logits.device.type == "cpu" else _ELSEWHERE
    step = max(1, at_once // max(1, logits.shape[-1]))
    for start in range(0, len(logits) if count is None else count, step):
        yield slice(start, start + step)


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and likeliest class of each position, in one pass over the logits.

    The gradient is made on the way, in the type of the logits, and is all that is kept for the backward pass; a plain
    cross-entropy keeps a copy in fp32, and makes another. It has no derivative of its own: no second backward pass
    through the first.

    Args:
        logits: ``(..., V)``.
        labels: ``(...)``, -100 where a position has none. Others are in [0, V).

    Returns:
        Losses in nats, fp32 or wider, 0 without a label, whatever the logits are there; and classes, int64.

    Raises:
        RuntimeError: In a backward pass with ``create_graph=True``.

    Example:
        >>> losses, likeliest = token_loss(torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([1, -100]))
        >>> losses, likeliest
        (tensor([0.6931, 0.0000]), tensor([0, 0]))
    """
    if torch.compiler.is_compiling():  # which would unroll the loop over rows
        flat = logits.flatten(0, -2)
        whole = F.cross_entropy(flat.to(_wide(logits)), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return whole.view(labels.shape), logits.argmax(-1)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    losses, likeliest = _TokenLoss.apply(logits.reshape(-1, logits.shape[-1]), labels.flatten(), wanted)
    return losses.view(labels.shape), likeliest.view(labels.shape)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        wide = _wide(logits)
        # 16 bits with five for the exponent do not hold small gradients before a loss scale comes to them.
        kept = wide if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept) if wanted else None
        losses = logits.new_empty(len(logits), dtype=wide)
        likeliest = labels.new_empty(len(logits))
        with torch.autocast(logits.device.type, enabled=False):
            for rows in row_chunks(logits):
                chunk = logits[rows].to(wide)
                known = labels[rows].unsqueeze(1) != IGNORED
                label = labels[rows].unsqueeze(1).masked_fill(~known, 0)
                most, likeliest[rows] = chunk.max(1)
                chunk = chunk - most.unsqueeze(1)
                own = chunk.gather(1, label)
                shares = chunk.exp_()
                total = shares.sum(1, keepdim=True)
                losses[rows] = (total.log() - own).masked_fill(~known, 0).squeeze(1)
                if gradient is not None:
                    shares.div_(total).scatter_add_(1, label, shares.new_full((), -1).expand_as(label))
                    gradient[rows] = shares.masked_fill_(~known, 0)
        ctx.mark_non_differentiable(likeliest)
        ctx.dtype = logits.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses, likeliest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of `ForgeModule` cannot be differentiated twice, as `create_graph=True` asks. Leave it out,"
                " or compute a loss of your own from `forward`."
            )
        (gradient,) = ctx.saved_tensors
        found = torch.empty_like(gradient, dtype=ctx.dtype)
        for rows in row_chunks(gradient):
            found[rows] = gradient[rows] * grads[0][rows].unsqueeze(1)
        return found, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
