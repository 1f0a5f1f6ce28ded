"""Newton–Schulz iteration: matrices with the same singular vectors and singular values near 1."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The published ones: the steepest slope at 0 for which the values stay near 1."""


@torch.no_grad()
def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Bring the singular values of each matrix near 1, into about [0.7, 1.2] after five steps.

    Args:
        matrices: ``(..., rows, columns)``.
        steps: Iterations, each three products of matrices.
        coefficients: ``(a, b, c)``: each step makes ``a s + b s³ + c s⁵`` of a singular value ``s``.
        eps: Least norm by which a matrix is divided, so that one of zeros stays zeros.
        dtype: Type that the products are made in. Default: `product_dtype`.

    Returns:
        ``(..., rows, columns)`` in ``dtype``.

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.

    Example:
        >>> values = torch.linalg.svdvals(newton_schulz(torch.diag(torch.tensor([3.0, 1.0, 0.2]))))
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    a, b, c = coefficients
    x = matrices.to(dtype or product_dtype(matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the product of the shorter sides is the smaller one
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = _add_product(x, a, _add_product(gram, b, gram, gram, c), x, 1.0)
    return x.mT if tall else x


def product_dtype(device: torch.device) -> torch.dtype:
    """bf16 on accelerators that multiply it, else fp32, so that results on CPUs depend on no instruction set."""
    if device.type in ("cpu", "mps"):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def _add_product(added: Tensor, beta: float, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """``beta * added + alpha * left @ right``."""
    add_product = torch.addmm if added.ndim == 2 else torch.baddbmm
    return add_product(added, left, right, beta=beta, alpha=alpha)
