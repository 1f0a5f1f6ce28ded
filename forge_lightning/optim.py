"""Optimizers: with Grokfast built in, and Muon beside AdamW."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from forge_lightning.grokfast.optim import GrokfastAdamW as GrokfastAdamW
from forge_lightning.grokfast.optim import GrokfastSGD as GrokfastSGD


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` for matrices and `torch.optim.AdamW` for all other parameters, as one optimizer.

    Lightning steps one optimizer by itself, and leaves two to you. A learning-rate schedule moves both alike.

    Args:
        params: Parameters or parameter groups. A group's ``use_muon`` says which of the two has its parameters;
            without it, those of two dimensions are Muon's. Embeddings and output heads are matrices too: for small
            models that are to generalise soon that is right, in pretraining they are commonly left to AdamW. A group
            with ``transposed=True`` holds weights of ``(inputs, outputs)``, as GPT-2's `Conv1D`; Muon's factor is for
            ``(outputs, inputs)``. `ForgeModule` marks them.
            What else a group sets, as ``lr``, holds for all of it.
        lr: Learning rate of Muon.
        weight_decay: Decoupled weight decay of Muon.
        momentum: Momentum of Muon, in [0, 1).
        nesterov: Nesterov momentum in Muon.
        ns_steps: Newton–Schulz iterations that bring the momentum's singular values near 1.
        adjust_lr_fn: "original" (factor ``sqrt(max(1, rows / columns))``) or "match_rms_adamw".
        adamw_lr: Learning rate of AdamW.
        adamw_betas: Betas of AdamW.
        adamw_weight_decay: Decoupled weight decay of AdamW.

    Raises:
        ValueError: If an argument is out of range, or a group with ``use_muon=True`` holds more than matrices.

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; on grokking: Tveit et al.,
        `Muon Optimizer Accelerates Grokking <https://arxiv.org/abs/2504.16041>`_, 2025.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = MuonAdamW(model.parameters(), lr=0.05)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> [(group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
        [(True, 1), (False, 1)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.98),
        adamw_weight_decay: float = 0.0,
    ) -> None:
        self._options: dict[bool, dict[str, Any]] = {
            True: {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            },
            False: {"lr": adamw_lr, "betas": adamw_betas, "weight_decay": adamw_weight_decay},
        }
        self._parts: list[Optimizer] = []
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add one group, or two where it holds matrices and others and does not say ``use_muon``."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if "use_muon" in param_group:
            split = [(param_group["use_muon"], params)]
        else:
            split = [(True, [p for p in params if _is_matrix(p)]), (False, [p for p in params if not _is_matrix(p)])]
        if param_group.get("transposed"):  # one group for each shape, whose factor is its own
            split = [(use_muon, part) for use_muon, mine in split for part in _by_shape(mine, use_muon)]
        for use_muon, mine in split:
            if use_muon and not all(map(_is_matrix, mine)):
                raise ValueError(
                    "`MuonAdamW`: a group with `use_muon=True` may only hold parameters of two dimensions."
                )
            if mine:
                given = {key: value for key, value in param_group.items() if key not in ("params", "use_muon")}
                # The part checks what was asked for, and fills in what was not.
                part = (Muon if use_muon else AdamW)([{"params": mine, **given}], **self._options[use_muon])
                super().add_param_group({**part.param_groups[0], "use_muon": use_muon})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """One part per kind, on the very groups and state of this optimizer: a schedule changes them here."""
        self._parts = []
        for use_muon, kind in ((True, Muon), (False, AdamW)):
            groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            if groups:
                part = kind([{"params": groups[0]["params"]}])
                part.param_groups, part.state = groups, self.state
                self._parts.append(part)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Evaluate ``closure`` once, then update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with _turned(self.param_groups):
            for part in self._parts:
                part.step()
        return loss


@contextmanager
def _turned(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Meanwhile give transposed weights the factor of Muon that they have the other way round."""
    before = []
    for group in groups:
        if group.get("transposed") and group["use_muon"] and group.get("adjust_lr_fn") in (None, "original"):
            rows, columns = group["params"][0].shape
            factor = math.sqrt(max(1, columns / rows) / max(1, rows / columns))
            before.append((group, group["lr"], group["weight_decay"]))
            group["lr"], group["weight_decay"] = group["lr"] * factor, group["weight_decay"] / factor
    try:
        yield
    finally:
        for group, lr, weight_decay in before:
            group["lr"], group["weight_decay"] = lr, weight_decay


def _by_shape(params: list[Any], use_muon: bool) -> list[list[Any]]:
    if not use_muon:
        return [params]
    shapes: dict[Any, list[Any]] = {}
    for param in params:
        shapes.setdefault((param[1] if isinstance(param, tuple) else param).shape, []).append(param)
    return list(shapes.values())


def _is_matrix(param: Any) -> bool:
    tensor: Tensor = param[1] if isinstance(param, tuple) else param
    return tensor.ndim == 2


__all__ = ["GrokfastAdamW", "GrokfastSGD", "MuonAdamW"]
