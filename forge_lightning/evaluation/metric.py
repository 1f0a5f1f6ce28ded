"""pass@k as a metric over batches and ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from forge_lightning.evaluation.functional import pass_at_k


class PassAtK(Metric):
    """Mean over problems of the unbiased estimate of pass@k. See `forge_lightning.evaluation.functional`.

    Args:
        k: Samples that a user would draw, at least 1. Every problem needs at least that many.
        **kwargs: `torchmetrics.Metric`'s own.

    Raises:
        ValueError: If ``k`` is below 1.

    Example:
        >>> metric = PassAtK(k=1)
        >>> metric.update(num_samples=torch.tensor([4, 4]), num_passed=torch.tensor([1, 3]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    num_samples: list[Tensor]
    num_passed: list[Tensor]

    def __init__(self, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`PassAtK(k={k})` must be at least 1.")
        self.k = k
        self.add_state("num_samples", default=[], dist_reduce_fx="cat")
        self.add_state("num_passed", default=[], dist_reduce_fx="cat")

    def update(self, num_samples: Tensor, num_passed: Tensor) -> None:
        """Add problems: the number of samples of each, and the number that passed, both ``(N,)``."""
        self.num_samples.append(num_samples)
        self.num_passed.append(num_passed)

    def compute(self) -> Tensor:
        """Mean over all problems; NaN without any, or where one has fewer than ``k`` samples."""
        if len(self.num_samples) == 0:  # a list, or after synchronisation a tensor
            return torch.tensor(torch.nan)
        return pass_at_k(dim_zero_cat(self.num_samples), dim_zero_cat(self.num_passed), self.k).mean().float()
