"""Scores of predicted activations, independent of the scale of the activations."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PredictionSums(NamedTuple):
    """Sums of squares over positions and units, from which every reported score follows.

    Sums of several batches add up, entry by entry.

    Args:
        error: ``Σ (prediction - target)²``; carries the gradient.
        spread: ``Σ (target - mean of the batch)²``: the error of the best constant.
        copy_error: ``Σ (source - target)²``, the error of predicting the source unchanged; NaN where widths differ.
        size: Numbers predicted, rows × units.
    """

    error: Tensor
    spread: Tensor
    copy_error: Tensor
    size: Tensor


def normalized_target(x: Tensor, stop_gradient: bool = True) -> Tensor:
    """Activations with mean 0 and variance 1 over the units of each row, in at least single precision.

    A layer cannot make itself easier to predict by shrinking, and layers of all scales weigh alike. As layer
    normalisation, but without its constant beside the variance, against which small activations would vanish.

    Args:
        x: ``(..., D)``.
        stop_gradient: Detach. With the gradient, targets move towards the prediction too.

    Returns:
        ``(..., D)``; a row whose units are equal up to rounding becomes 0.

    Example:
        >>> normalized_target(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    x = x.detach() if stop_gradient else x
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        rounding = (4 * torch.finfo(x.dtype).eps * x.detach().abs().amax(-1, keepdim=True)).square()
        varies = variance > rounding
        return torch.where(varies, centred * variance.where(varies, 1.0).rsqrt(), 0.0)


def prediction_sums(
    prediction: Tensor, target: Tensor, source: Tensor | None = None, counts: Tensor | None = None
) -> PredictionSums:
    """Squared error of a prediction, and of the two trivial ones.

    Args:
        prediction: ``(N, D)``.
        target: ``(N, D)``, from `normalized_target`.
        source: ``(N, D)``, what was predicted from, on the target's scale.
        counts: Which rows count, ``(N,)`` booleans; the others get no gradient, whatever they hold. Default: all.

    Returns:
        `PredictionSums`. All but ``error`` are detached.

    References:
        Premakumar et al., `Unexpected Benefits of Self-Modeling in Neural Systems <https://arxiv.org/abs/2407.10188>`_,
        2024, eq. 1, with targets normalised here.
    """
    error = _counted(prediction.to(target.dtype) - target, counts).square().sum()
    with torch.no_grad():
        if counts is None:
            mean, size = target.mean(0), target.new_full((), target.numel())
        else:
            number = counts.sum()
            mean, size = _counted(target, counts).sum(0) / number.clamp(min=1), (number * target.shape[1]).to(target)
        spread = _counted(target - mean, counts).square().sum()
        same = source is not None and source.shape == target.shape
        copy_error = (
            _counted(source - target, counts).square().sum() if same and source is not None else spread * math.nan
        )
    return PredictionSums(error, spread, copy_error, size)


def _counted(rows: Tensor, counts: Tensor | None) -> Tensor:
    """Rows that count, and 0 in place of the others."""
    return rows if counts is None else torch.where(counts[:, None], rows, 0.0)


def explained_variance(error: Tensor, trivial_error: Tensor) -> Tensor:
    """Share of a trivial predictor's error that a prediction removes: ``1 - error / trivial_error``.

    At most 1; 0 for one that is no better, below 0 for a worse one; NaN where the trivial one makes no error.
    """
    return torch.where(trivial_error > 0, 1 - error / trivial_error, torch.nan)


def uncertainty_weights(losses: Sequence[float], low: float = 0.5, high: float = 2.0) -> list[float]:
    """Weights of mean 1 in inverse proportion to running losses, within bounds.

    The closed form of learned uncertainty weights, without their two ways to cheat: a bound keeps an easy loss from
    taking all the weight, and a mean of 1 keeps the sum from falling by shrinking the weights.

    Args:
        losses: Running mean of each loss, relative to what predicting nothing costs; NaN before the first.
        low: Smallest weight, at most 1.
        high: Largest weight, at least 1.

    Returns:
        A weight for each loss, in ``[low, high]``; 1 where none is known.

    Example:
        >>> [round(weight, 3) for weight in uncertainty_weights([1.0, 0.25])]  # 0.4 and 1.6 without the bound
        [0.5, 1.5]
    """
    precisions = [1 / max(loss, 1e-12) for loss in losses if loss == loss]

    def bounded(scale: float) -> list[float]:
        return [min(high, max(low, scale * precision)) for precision in precisions]

    if not precisions:
        return [1.0] * len(losses)
    least, most = low / max(precisions), high / min(precisions)
    for _ in range(100):  # the mean grows with the scale: bisection, on a logarithmic one
        scale = math.sqrt(least * most)
        least, most = (scale, most) if sum(bounded(scale)) < len(precisions) else (least, scale)
    weights = iter(bounded(math.sqrt(least * most)))
    return [1.0 if loss != loss else next(weights) for loss in losses]
