"""pass@k: the chance that at least one of k generated programs is right."""

import torch
from torch import Tensor


def pass_at_k(num_samples: Tensor, num_passed: Tensor, k: int) -> Tensor:
    r"""Unbiased estimate of the chance that one of ``k`` samples passes, per problem.

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k}

    Args:
        num_samples: Samples ``n`` drawn for each problem, ``(N,)``.
        num_passed: Those ``c`` that passed, ``(N,)``, at most ``n``.
        k: Samples that a user would draw, at least 1.

    Returns:
        ``(N,)``, in [0, 1]. NaN for problems with fewer than ``k`` samples, where no unbiased estimate exists.

    Raises:
        ValueError: If ``k < 1`` or some ``num_passed`` is not in [0, num_samples].

    References:
        Chen et al., `Evaluating Large Language Models Trained on Code <https://arxiv.org/abs/2107.03374>`_, 2021.

    Example:
        >>> pass_at_k(torch.tensor([4, 4, 4]), torch.tensor([0, 1, 4]), k=2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if k < 1:
        raise ValueError(f"`k={k}` must be at least 1.")
    if ((num_passed < 0) | (num_passed > num_samples)).any():
        raise ValueError("`num_passed` must be in [0, num_samples] for every problem.")
    n, failed = num_samples.double(), (num_samples - num_passed).double()
    # C(n-c, k) / C(n, k) = product over i < k of (n - c - i) / (n - i), and 0 as soon as a factor is.
    steps = torch.arange(k, dtype=torch.float64, device=n.device)
    factors = ((failed[:, None] - steps) / (n[:, None] - steps)).clamp_min(0)  # (N, k)
    return torch.where(num_samples >= k, 1 - factors.prod(1), torch.nan)
