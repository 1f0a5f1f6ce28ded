"""Replay priorities, draws without replacement, and distillation from stored logits."""

import torch
from torch import Tensor
from torch.nn import functional as F


def replay_priority(
    loss: Tensor,
    best_loss: Tensor,
    success: Tensor,
    best_success: Tensor,
    replays: Tensor,
    threshold: float,
    scale: float,
    floor: float = 0.1,
) -> Tensor:
    r"""Priority of stored examples: how much there is to learn from each.

    ``floor + (4 p (1 - p) + ½ (best_success - success)₊ + ¼ min(1, (loss - best_loss)₊ / 3)) · 2^(-replays / 8)`` with
    ``p = σ((threshold - loss) / scale)``, the chance of success at that loss: most for what is on the edge, was
    forgotten, and has not been replayed often. What is not known counts as nothing. The weights are choices, not
    measurements.

    Args:
        loss: Last loss, ``(N,)``, in nats.
        best_loss: Lowest so far, ``(N,)``.
        success: Last success in [0, 1], ``(N,)``, or NaN.
        best_success: Highest so far, ``(N,)``, or NaN.
        replays: How often each was replayed, ``(N,)``.
        threshold: Loss at which success and failure meet; NaN while it is unknown.
        scale: Spread of the losses, above 0.
        floor: Least priority, above 0.

    Returns:
        ``(N,)``, above 0.

    Example:
        >>> loss = torch.tensor([0.1, 1.0, 3.0])
        >>> one = torch.ones(3)
        >>> replay_priority(loss, loss, one, one, torch.zeros(3), threshold=1.0, scale=0.5).argmax().item()
        1
    """
    p = torch.sigmoid((threshold - loss) / scale)
    edge = (4 * p * (1 - p)).nan_to_num()
    forgotten = (best_success - success).clamp(min=0).nan_to_num()
    worse = ((loss - best_loss).clamp(min=0) / 3).clamp(max=1).nan_to_num()
    return floor + (edge + 0.5 * forgotten + 0.25 * worse) * torch.exp2(-replays / 8)


def gumbel_top_k(log_weights: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Draw without replacement, each time in proportion to the remaining weights.

    Args:
        log_weights: ``(N,)``; -inf is never drawn.
        k: Number of draws, at most ``N``.
        uniform: Random numbers in [0, 1), ``(N,)``.

    Returns:
        Places, ``(k,)``, in the order drawn.

    References:
        Kool et al., `Stochastic Beams and Where to Find Them <https://arxiv.org/abs/1903.06059>`_, 2019.
    """
    noise = -torch.log(-torch.log(uniform.clamp(min=1e-12)))
    return torch.topk(log_weights + noise, k).indices


def importance_weights(probability: Tensor, num_stored: int, beta: float) -> Tensor:
    """Weights that undo the bias of draws by priority: ``(num_stored · p)^-beta``, divided by the largest.

    Args:
        probability: Probabilities of the drawn examples, ``(B,)``.
        num_stored: Number of stored examples.
        beta: Strength of the correction: 0 for none, 1 for a full one.

    Returns:
        ``(B,)``, in (0, 1].

    References:
        Schaul et al., `Prioritized Experience Replay <https://arxiv.org/abs/1511.05952>`_, 2016.
    """
    weights = (num_stored * probability) ** -beta
    return weights / weights.max()


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The part of logits to store for `stored_logit_loss`.

    Args:
        logits: ``(N, V)``.
        k: Number of largest logits in each row.

    Returns:
        Log-probabilities of the largest, ``(N, min(k, V))``; their classes, int32; and the log-sum-exp of all logits,
        ``(N,)``. Log-probabilities of likely classes are small numbers, which 16 bits hold well; raw logits may lie
        around a large offset.
    """
    logits = logits.detach().float()
    values, classes = logits.topk(min(k, logits.shape[-1]), dim=-1)
    total = logits.logsumexp(-1)
    return values - total.unsqueeze(-1), classes.int(), total


def stored_logit_loss(logits: Tensor, values: Tensor, classes: Tensor, total: Tensor) -> Tensor:
    r"""Distance of logits from those stored by `top_logits`.

    Where all ``V`` were stored, their mean squared difference, as in dark experience replay. Otherwise the divergence
    ``KL(stored ‖ now)`` over the stored classes and one more for all the others together.

    Args:
        logits: ``(N, V)``, with gradient.
        values: Stored log-probabilities, ``(N, K)``.
        classes: Their classes, ``(N, K)``.
        total: Log-sum-exp of all stored logits, ``(N,)``.

    Returns:
        ``(N,)``, at least 0.

    References:
        Buzzega et al., `Dark Experience for General Continual Learning <https://arxiv.org/abs/2004.07211>`_, 2020.
    """
    logits, values, classes = logits.float(), values.float(), classes.long()
    if classes.shape[-1] == logits.shape[-1]:
        return (logits.gather(-1, classes) - total.float().unsqueeze(-1) - values).square().mean(-1)
    now = logits.log_softmax(-1)
    others = now.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    rest = torch.log1p(-values.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    goal = torch.cat([values, rest], -1)
    mine = torch.cat([now.gather(-1, classes), others], -1)
    return F.kl_div(mine, goal, reduction="none", log_target=True).sum(-1)
