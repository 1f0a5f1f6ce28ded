"""Optimizers with Grokfast built in, for training loops without Lightning."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from forge_lightning.grokfast.filter import FilterName, GradientFilter, ScheduleName


class _Grokfast(Optimizer):
    """Mixin: filter the gradients between the closure and the update, keep the filter's state in ``state_dict()``."""

    _filter: GradientFilter

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Evaluate ``closure`` once, filter the gradients in place, update the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Filtering before a closure has run would filter the gradients of the step before.
        self._filter({name: p.grad for name, p in self._named() if p.grad is not None})
        super().step()
        return loss

    def _named(self) -> list[tuple[str, Tensor]]:
        params = [p for group in self.param_groups for p in group["params"]]
        return [(str(index), p) for index, p in enumerate(params)]

    def state_dict(self) -> dict[str, Any]:
        """The parent's, and under ``"grokfast"`` the filter's, keyed by parameter index like ``"state"``."""
        return super().state_dict() | {"grokfast": self._filter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both. A state of the plain parent optimizer loads too, and the filter then starts afresh."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grokfast"})
        if "grokfast" in state_dict:
            self._filter.load_state_dict(state_dict["grokfast"])


class GrokfastAdamW(_Grokfast, AdamW):
    """`torch.optim.AdamW` whose gradients pass a Grokfast filter. Equal to it bit by bit for ``lamb=0``.

    ``step()`` edits ``p.grad`` in place: call it once for each backward pass. What a loop clips before it is clipped
    before the filter; the `Grokfast` callback filters first.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        filter: "ema", "ma" or "projection".
        alpha: EMA decay, in [0, 1).
        lamb: Largest λ; 0 turns the filter off. Default: 2 for "ema", 5 for "ma", 0.25 for "projection".
        window_size: Gradients that "ma" averages.
        schedule: "cosine_similarity", "constant" (the paper's) or "linear_warmup".
        keep_norm: Rescale the filtered gradient to the norm it had.
        compile: On a GPU, let `torch.compile` fuse the filter's passes over the gradients.
        **kwargs: `torch.optim.AdamW`'s own: ``betas``, ``eps``, ``weight_decay``, ``amsgrad``, ``foreach``, ...

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = GrokfastAdamW([weight], lr=0.1, lamb=2.0, schedule="constant")
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.grad
        tensor([3., 3.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        filter: FilterName = "ema",
        alpha: float = 0.98,
        lamb: float | None = None,
        window_size: int = 100,
        schedule: ScheduleName = "cosine_similarity",
        keep_norm: bool = False,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        self._filter = GradientFilter(
            filter, alpha, lamb, window_size, schedule, keep_norm=keep_norm, compile=compile, owner="GrokfastAdamW"
        )
        super().__init__(params, lr=lr, **kwargs)
        self._step_supports_amp_scaling = False  # a scaler has to unscale before the filter, not inside a fused step


class GrokfastSGD(_Grokfast, SGD):
    """`torch.optim.SGD` whose gradients pass a Grokfast filter. Equal to it bit by bit for ``lamb=0``.

    SGD's step grows with the gradient, by ``1 + lamb`` for a steady one: lower ``lr`` alike, or set ``keep_norm``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        filter: "ema", "ma" or "projection".
        alpha: EMA decay, in [0, 1).
        lamb: Largest λ; 0 turns the filter off. Default: 2 for "ema", 5 for "ma", 0.25 for "projection".
        window_size: Gradients that "ma" averages.
        schedule: "cosine_similarity", "constant" (the paper's) or "linear_warmup".
        keep_norm: Rescale the filtered gradient to the norm it had.
        compile: On a GPU, let `torch.compile` fuse the filter's passes over the gradients.
        **kwargs: `torch.optim.SGD`'s own: ``momentum``, ``weight_decay``, ``nesterov``, ``foreach``, ...

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        filter: FilterName = "ema",
        alpha: float = 0.98,
        lamb: float | None = None,
        window_size: int = 100,
        schedule: ScheduleName = "cosine_similarity",
        keep_norm: bool = False,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        self._filter = GradientFilter(
            filter, alpha, lamb, window_size, schedule, keep_norm=keep_norm, compile=compile, owner="GrokfastSGD"
        )
        super().__init__(params, lr=lr, **kwargs)
        self._step_supports_amp_scaling = False  # a scaler has to unscale before the filter, not inside a fused step
