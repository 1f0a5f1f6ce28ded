"""Calibration over batches and processes, in memory that does not grow."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from forge_lightning.calibration.functional import (
    ReliabilityBins,
    brier_score,
    expected_calibration_error,
    log_probabilities,
    minimize_convex,
    nll_derivatives,
    reliability_bins,
)

Reduce = Callable[[Tensor], Tensor]

_CHUNK = 1 << 24
"""Numbers of logits to work on at a time."""


class CalibrationMetric(Metric):
    """Likelihood, Brier score, expected calibration error, accuracy and entropy at one temperature.

    Keeps sums over ``num_bins`` bins; torchmetrics' `MulticlassCalibrationError`, to whose ``norm="l1"`` the error is
    equal, keeps every confidence.

    Args:
        temperature: Logits are divided by it, above 0.
        num_bins: Bins of confidence, of equal width, at least 1.
        **kwargs: `torchmetrics.Metric`'s own.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> metric = CalibrationMetric()
        >>> metric.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()["ece"]), 4)
        0.3808
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    bins: Tensor
    sums: Tensor

    def __init__(self, temperature: float = 1.0, num_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not temperature > 0:
            raise ValueError(f"`CalibrationMetric(temperature={temperature})` must be above 0.")
        if num_bins < 1:
            raise ValueError(f"`CalibrationMetric(num_bins={num_bins})` must be at least 1.")
        self.temperature = temperature
        self.num_bins = num_bins
        self.add_state("bins", torch.zeros(3, num_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add predictions: ``(N, V)`` and ``(N,)``."""
        for part, labels in _chunks(logits, target):
            log_probs = log_probabilities(part, self.temperature)
            probs = log_probs.exp()
            right = log_probs.gather(-1, labels[:, None]).squeeze(-1)
            right = right.where(right > -1e29, -torch.inf)  # what could not come
            confidence, predicted = probs.max(-1)
            self.bins += torch.stack(list(reliability_bins(confidence, predicted == labels, self.num_bins)))
            entropy = -(probs * log_probs.clamp(min=-1e9)).sum(-1)  # p log p is 0 where p is
            values = (-right, brier_score(log_probs, labels), entropy, right.exp())
            self.sums += torch.stack([value.double().sum() for value in values])

    def compute(self) -> dict[str, Tensor]:
        """Means over all predictions; NaN without any, and where a logit was NaN.

        "nll" in nats, "brier", "entropy" in nats, "p_correct" (probability of what came, which is how often sampling is
        right), "accuracy" (of the likeliest), "confidence", "ece".
        """
        bins = self.reliability()
        total = bins.total.sum()
        total = total.where((total > 0) & ~self.sums.isnan().any(), torch.nan)
        nll, brier, entropy, p_correct = (self.sums / total).unbind()
        return {
            "nll": nll,
            "brier": brier,
            "entropy": entropy,
            "p_correct": p_correct,
            "accuracy": bins.correct.sum() / total,
            "confidence": bins.confidence.sum() / total,
            "ece": expected_calibration_error(bins) + 0 * total,
        }

    def sum_over_processes(self, reduce: Reduce) -> None:
        """Have every process know what all have seen; before `compute`, and once."""
        self.bins, self.sums = reduce(self.bins), reduce(self.sums)
        self._update_count = max(1, self._update_count)  # by another process

    @property
    def is_empty(self) -> bool:
        """Whether it has seen no prediction."""
        return not bool(self.bins[0].any())

    def reliability(self) -> ReliabilityBins:
        """The bins so far, of this process."""
        return ReliabilityBins(*self.bins)


class FittedTemperature(Metric):
    """The temperature at which the likelihood of what came is largest, and the likelihood there.

    Keeps the likelihood and its first two derivatives at ``grid`` temperatures, and interpolates. At an end of the grid
    it says that end.

    Args:
        low: Smallest temperature, above 0.
        high: Largest temperature.
        grid: Temperatures in between, in equal ratios, both included.
        max_rows: Predictions of a batch that it looks at, evenly spread; each costs ``grid`` softmaxes. ``None`` for
            all.
        **kwargs: `torchmetrics.Metric`'s own.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    values: Tensor
    rows: Tensor

    def __init__(
        self, low: float = 0.1, high: float = 10.0, grid: int = 17, max_rows: int | None = 512, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < low < high:
            raise ValueError(f"`FittedTemperature(low={low}, high={high})` must be 0 < low < high.")
        if grid < 3:
            raise ValueError(f"`FittedTemperature(grid={grid})` must be at least 3.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"`FittedTemperature(max_rows={max_rows})` must be at least 1, or None.")
        self.max_rows, self.low, self.high = max_rows, low, high
        ratios = torch.linspace(0, 1, grid, dtype=torch.float64)
        self.inverse_temperature = (1 / high) * (high / low) ** ratios  # ascending
        self.add_state("values", torch.zeros(3, grid, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add predictions: ``(N, V)`` and ``(N,)``."""
        if self.max_rows is not None and len(target) > self.max_rows:
            chosen = torch.linspace(0, len(target) - 1, self.max_rows, device=target.device).round().long()
            logits, target = logits[chosen], target[chosen]
        for part, labels in _chunks(logits, target):
            self.values += torch.stack(nll_derivatives(part, labels, self.inverse_temperature))
            self.rows += len(labels)

    def sum_over_processes(self, reduce: Reduce) -> None:
        """Have every process know what all have seen; before `compute`, and once."""
        self.values, self.rows = reduce(self.values), reduce(self.rows)
        self._update_count = max(1, self._update_count)  # by another process

    def compute(self) -> dict[str, Tensor]:
        """The "temperature", and "nll" there, in nats; NaN without predictions, or where one had no probability."""
        if self.rows == 0:
            return {"temperature": torch.tensor(torch.nan), "nll": torch.tensor(torch.nan)}
        mean = (self.values / self.rows).cpu()
        inverse, nll = minimize_convex(self.inverse_temperature, *mean)
        return {"temperature": torch.tensor(1 / inverse), "nll": torch.tensor(nll)}


def _chunks(logits: Tensor, target: Tensor) -> Any:
    rows = max(1, _CHUNK // max(1, logits.shape[-1]))
    return zip(logits.split(rows), target.split(rows), strict=True)
