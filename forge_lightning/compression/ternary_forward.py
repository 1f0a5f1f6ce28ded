"""The forward pass of a linear layer with ternary weights and 8-bit activations, trained straight through."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forge_lightning.compression.codecs.ternary import EPS, ternary


def rounded_activations(activations: Tensor, bits: int = 8) -> Tensor:
    r"""Activations rounded to integers of the largest of each token.

    .. math:: \hat x = \mathrm{clip}(\mathrm{round}(x s), -2^{b-1}, 2^{b-1} - 1) / s,
              \quad s = (2^{b-1} - 1) / \max|x|

    Args:
        activations: ``(..., D)``.
        bits: Bits of the integers, ``b``.

    Returns:
        ``(..., D)``, of the same type.
    """
    most = 2 ** (bits - 1) - 1
    values = activations.float()
    scale = most / values.abs().amax(-1, keepdim=True).clamp(min=EPS)
    whole = (values * scale).round().clamp(-most - 1, most)
    rounded: Tensor = whole / scale
    return rounded.to(activations.dtype)


def straight_through(exact: Tensor, rounded: Tensor, share: Tensor) -> Tensor:
    """A mean of exact and rounded values, whose gradient is that of the exact ones.

    Args:
        exact: Any shape.
        rounded: Same shape.
        share: How much of the mean is rounded, ``()``, in [0, 1].
    """
    fixed = exact.detach()
    mean = torch.where(share < 1, torch.lerp(fixed, rounded, share.to(fixed.dtype)), rounded)
    return mean + (exact - fixed)


class TernaryForward:
    """Takes the place of a linear layer's ``forward``. A pickled layer gets its own back.

    Args:
        layer: The layer.
        share: How much of the weights and activations is rounded, ``()``, on the layer's device.
        activation_bits: Bits of activations; ``None`` to leave them.
    """

    def __init__(self, layer: nn.Linear, share: Tensor, activation_bits: int | None) -> None:
        self.layer, self.share, self.activation_bits = layer, share, activation_bits

    def __call__(self, input: Tensor) -> Tensor:
        weight = self.layer.weight
        rounded = ternary(weight.detach().float()).to(weight.dtype)
        weight = straight_through(weight, rounded, self.share)
        if self.activation_bits is not None:
            quantised = rounded_activations(input.detach(), self.activation_bits)
            input = straight_through(input, quantised, self.share)
        return F.linear(input, weight, self.layer.bias)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (type(self.layer).forward, self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        layer = memo.get(id(self.layer), self.layer)
        return partial(type(layer).forward, layer)
