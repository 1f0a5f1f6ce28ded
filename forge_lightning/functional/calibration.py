"""How far probabilities can be trusted, and the divergence between two models at a temperature."""

from collections.abc import Iterator
from typing import Any, NamedTuple

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
        correct: How many were right.
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


def temperature_kl(student: Tensor, teacher: Tensor, temperature: float, places: Tensor | None = None) -> Tensor:
    r"""Divergence of a student from its teacher at a temperature, scaled so that high ones do not weaken gradients.

    .. math:: \tau^2\, \mathrm{KL}\big(p^{T}_\tau \,\|\, p^{S}_\tau\big), \qquad p_\tau = \mathrm{softmax}(z / \tau)

    At one temperature it is 0 only where it is at all: a temperature chooses which differences of logits count. Large
    ones compare all logits, and ``τ²`` keeps their gradient from falling as ``1/τ²``; small ones compare the margin of
    the likeliest, with a gradient that falls as τ.

    The gradient, ``τ (softmax(z_S / τ) - softmax(z_T / τ))``, is made on the way, a few rows at a time, and is the one
    copy of them that is held. It has no derivative of its own: no second backward pass through the first, no
    `torch.func`, and `torch.compile` goes round it.

    Args:
        student: Logits ``(..., V)``.
        teacher: Logits of the same shape; no gradient goes there.
        temperature: τ, above 0.
        places: Which rows of the logits, flattened to ``(M, V)``, count: ``(N,)``. Default: all.

    Returns:
        ``(N,)``, without ``places`` ``(...)``; at least 0 up to rounding; finite as `log_probabilities` is.

    Raises:
        ValueError: If ``temperature`` is not above 0, or the shapes differ.
        RuntimeError: In a backward pass with ``create_graph=True``.

    References:
        Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> temperature_kl(z, z, 0.5), temperature_kl(z, -z, 2.0)
        (tensor([0.]), tensor([1.8485]))
    """
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}` must be above 0.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"`student` is {tuple(student.shape)} and `teacher` {tuple(teacher.shape)}; both must be alike."
        )
    shape, width = student.shape[:-1], student.shape[-1]
    student, teacher = student.reshape(-1, width), teacher.detach().reshape(-1, width)
    wanted = student.requires_grad and torch.is_grad_enabled()
    if places is not None:
        shape = places.shape
    else:
        places = torch.arange(len(student), device=student.device)
    divergence: Tensor = _TemperatureKL.apply(student, teacher, temperature, places, wanted)
    return divergence.reshape(shape)


class _TemperatureKL(torch.autograd.Function):
    """Of rows ``(M, V)``, as many at a time as a processor's cache holds."""

    ON_CPU, ELSEWHERE = 2**17, 2**26
    """Logits at a time."""

    @staticmethod
    def parts(student: Tensor, places: Tensor) -> Iterator[tuple[slice, Tensor]]:
        at_once = _TemperatureKL.ON_CPU if student.device.type == "cpu" else _TemperatureKL.ELSEWHERE
        done = 0
        for part in places.split(max(1, at_once // student.shape[-1])):
            yield slice(done, done + len(part)), part
            done += len(part)

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, places: Tensor, wanted: bool) -> Tensor:
        # Single precision: a loss scale only comes to it in the backward pass.
        wide = torch.promote_types(student.dtype, torch.float32)
        gradient = student.new_empty(len(places), student.shape[-1], dtype=wide) if wanted else None
        divergence = student.new_empty(len(places), dtype=wide)
        with torch.autocast(student.device.type, enabled=False):
            for rows, part in _TemperatureKL.parts(student, places):
                log_student = log_probabilities(student[part], temperature)
                log_teacher = log_probabilities(teacher[part], temperature)
                probs = log_teacher.exp()
                divergence[rows] = (probs * (log_teacher - log_student)).sum(-1)
                if gradient is not None:
                    gradient[rows] = log_student.exp_().sub_(probs).mul_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient, places)
            ctx.like = student.new_empty(0)
            ctx.rows = len(student)
        return divergence.mul_(temperature**2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`temperature_kl` (`TemperatureCurriculum`) cannot be differentiated twice, as `create_graph=True`"
                " asks. Leave it out, or the second derivative."
            )
        gradient, places = ctx.saved_tensors
        found: Tensor = ctx.like.new_zeros(ctx.rows, gradient.shape[-1])
        for rows, part in _TemperatureKL.parts(gradient, places):
            found.index_add_(0, part, (gradient[rows] * grad_output[rows, None]).to(found.dtype))
        return found, None, None, None, None


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
        values: Of the function, ``(K,)``.
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
