"""How far probabilities can be trusted, and the divergence between two models at a temperature."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LOWEST = -1e30
"""Stands for a logit of -inf, which would make 0 · inf of a divergence."""


class ReliabilityBins(NamedTuple):
    """Predictions sorted by confidence into bins of equal width; each ``(num_bins,)``. Those of batches add up.

    Args:
        total: Predictions of each bin.
        confidence: Sum of their confidences.
        correct: Number of correct predictions.
    """

    total: Tensor
    confidence: Tensor
    correct: Tensor


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)`` in at least single precision.

    Finite, also for logits of -inf (a large negative number stands for -inf); NaN for rows with NaN or +inf, or with
    nothing else than -inf.

    Args:
        logits: ``(..., V)``.
        temperature: Above 0.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (z - z.detach().amax(-1, keepdim=True)).clamp(min=_LOWEST)
    return F.log_softmax(z / temperature, dim=-1)


def reliability_bins(confidence: Tensor, correct: Tensor, num_bins: int = 15) -> ReliabilityBins:
    """Sort predictions by confidence.

    Args:
        confidence: Probability of each prediction, ``(N,)``, in [0, 1].
        correct: Whether it was right, ``(N,)``.
        num_bins: Bins, of equal width; 1 belongs to the last.
    """
    index = (confidence * num_bins).long().clamp_(0, num_bins - 1)
    zeros = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    ones = torch.ones_like(confidence, dtype=torch.float64)
    return ReliabilityBins(
        zeros.index_add(0, index, ones),
        zeros.index_add(0, index, confidence.double()),
        zeros.index_add(0, index, correct.double()),
    )


def expected_calibration_error(bins: ReliabilityBins) -> Tensor:
    """Mean distance of confidence and accuracy, weighted by the predictions of each bin, in [0, 1]; NaN without any.

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, eq. 3.

    Example:
        >>> bins = reliability_bins(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]))
        >>> expected_calibration_error(bins)
        tensor(0.4000, dtype=torch.float64)
    """
    predictions = bins.total.sum()
    return (bins.confidence - bins.correct).abs().sum() / predictions.where(predictions > 0, torch.nan)


def brier_score(log_probs: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the predicted distribution from what came, ``Σ (p - onehot)²``, in [0, 2].

    Args:
        log_probs: ``(N, V)``.
        target: ``(N,)``.

    Returns:
        ``(N,)``.

    Example:
        >>> brier_score(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))
        tensor([0.0800])
    """
    probs = log_probs.exp()
    right = probs.gather(-1, target[:, None]).squeeze(-1)
    return probs.square().sum(-1) - 2 * right + 1


def nll_derivatives(logits: Tensor, target: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the negative log-likelihood at inverse temperatures, with its first and second derivative by them.

    The likelihood is convex in the inverse temperature ``β``: ``Σ logsumexp(βz) - βz_y``.

    Args:
        logits: ``(N, V)``.
        target: ``(N,)``.
        inverse_temperature: β, ``(K,)``, above 0.

    Returns:
        Three times ``(K,)``, in double precision; infinite values where a label's logit is -inf.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (z - z.amax(-1, keepdim=True)).clamp(min=_LOWEST)
    of_labels = z.gather(-1, target[:, None]).squeeze(-1).double()
    right = of_labels.where(of_labels > _LOWEST, -torch.inf).sum()
    values, slopes, curvatures = [], [], []
    finite = z.clamp(min=-1e4)  # of no weight at any β here, and squares stay finite
    for beta in inverse_temperature.tolist():
        scaled = z * beta
        log_sum = scaled.logsumexp(-1)
        probs = (scaled - log_sum[:, None]).exp()
        mean = (probs * finite).sum(-1)
        values.append(log_sum.double().sum() - beta * right)
        slopes.append(mean.double().sum() - right)
        curvatures.append(((probs * finite.square()).sum(-1) - mean.square()).clamp(min=0).double().sum())
    return torch.stack(values), torch.stack(slopes), torch.stack(curvatures)


def minimize_convex(
    x: Tensor, values: Tensor, slopes: Tensor, curvatures: Tensor, iterations: int = 60
) -> tuple[float, float]:
    """Where a convex function known on a grid is least, and its value there.

    Between the two points where the slope changes its sign, the slope is the cubic that has the known slopes and
    curvatures; its zero is found by halving. At an end of the grid, that end.

    Args:
        x: Grid, ``(K,)``, ascending.
        values: Values of the function, ``(K,)``.
        slopes: First derivatives, ``(K,)``.
        curvatures: Second derivatives, ``(K,)``.
        iterations: Halvings.

    Returns:
        The place and the value; NaN twice where a value is not finite.

    Example:
        >>> x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        >>> place, value = minimize_convex(x, (x - 1.2) ** 2, 2 * (x - 1.2), torch.full_like(x, 2.0))
        >>> round(place, 6), abs(round(value, 6))
        (1.2, 0.0)
    """
    if not all(bool(t.isfinite().all()) for t in (values, slopes, curvatures)):
        return torch.nan, torch.nan
    if slopes[0] >= 0:
        return float(x[0]), float(values[0])
    if slopes[-1] <= 0:
        return float(x[-1]), float(values[-1])
    i = int((slopes > 0).nonzero()[0]) - 1
    x0, width = float(x[i]), float(x[i + 1] - x[i])
    s0, s1 = float(slopes[i]), float(slopes[i + 1])
    # Slope at x0 + t · width: s0 + a t + b t² + c t³
    a, end = float(curvatures[i]) * width, float(curvatures[i + 1]) * width
    b, c = 3 * (s1 - s0) - 2 * a - end, a + end - 2 * (s1 - s0)
    low, high = 0.0, 1.0
    for _ in range(iterations):
        t = (low + high) / 2
        low, high = (t, high) if s0 + a * t + b * t**2 + c * t**3 < 0 else (low, t)
    t = (low + high) / 2
    value = float(values[i]) + width * (s0 * t + a * t**2 / 2 + b * t**3 / 3 + c * t**4 / 4)
    return x0 + width * t, value
