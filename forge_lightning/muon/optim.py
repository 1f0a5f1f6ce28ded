"""MuonAdamW: Muon for matrices, AdamW for all else, as one optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from forge_lightning.core.distributed import full_tensor
from forge_lightning.muon.functional import newton_schulz, product_dtype

_MOST_STACKED = 2**26  # numbers: 128 MiB in bf16
_Matrix = tuple[Tensor, Tensor, Tensor]
"""Parameter, gradient and momentum."""


class MuonAdamW(Optimizer):
    """Muon for matrices and `torch.optim.AdamW` for all other parameters, as one optimizer.

    Lightning steps one optimizer by itself, and leaves two to you. A learning-rate schedule moves both alike. Muon is
    that of `torch.optim.Muon`, with the products of matrices in fp32 on CPUs and in bf16 on accelerators that multiply
    it, and matrices of one shape together.

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
        for use_muon, mine in split:
            if use_muon and not all(map(_is_matrix, mine)):
                raise ValueError(
                    "`MuonAdamW`: a group with `use_muon=True` may only hold parameters of two dimensions."
                )
            if mine:
                given = {key: value for key, value in param_group.items() if key not in ("params", "use_muon")}
                if isinstance(given.get("lr"), Tensor):
                    given["lr"] = given["lr"].clone()  # each part has its own, which a schedule changes in place
                # The part checks what was asked for, and fills in what was not.
                part = (Muon if use_muon else AdamW)([{"params": mine, **given}], **self._options[use_muon])
                super().add_param_group({**part.param_groups[0], "use_muon": use_muon})
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}  # for groups that are added to a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """One part per kind, on the very groups and state of this optimizer: a schedule changes them here."""
        self._parts = []
        for use_muon, kind in ((True, _BatchedMuon), (False, AdamW)):
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
        for part in self._parts:
            part.step()
        return loss


class _BatchedMuon(Muon):
    """`torch.optim.Muon`'s arguments and state, with a step of our own: matrices of one shape go together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all matrices that have a gradient; ``closure`` is not called."""
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)  # fills the lists and the state
            lr = float(group["lr"])
            for stack in _stacks(zip(params, grads, momenta, strict=True)):
                updates = torch.stack([_update(grad, momentum, group) for _, grad, momentum in stack])
                updates = newton_schulz(updates, group["ns_steps"], group["ns_coefficients"], group["eps"])
                factor = _step_factor(updates.shape[-2:], group["adjust_lr_fn"], group.get("transposed", False))
                for (param, _, _), update in zip(stack, updates.unbind(), strict=True):
                    param.mul_(1 - lr * group["weight_decay"]).add_(_as(param, update), alpha=-lr * factor)


def _stacks(matrices: Iterable[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices that are updated together: of one shape and device, as many as memory has room for."""
    alike: dict[Any, list[_Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix[0].shape, matrix[0].device), []).append(matrix)
    for (shape, _), found in alike.items():
        room = max(1, _MOST_STACKED // max(1, shape.numel()))
        for start in range(0, len(found), room):
            yield found[start : start + room]


def _update(grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Move the momentum in place. Returns the whole matrix that is to be orthogonalised, of all ranks."""
    momentum.lerp_(grad, 1 - group["momentum"])
    update = full_tensor(grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
    return update.to(product_dtype(update.device))


def _as(param: Tensor, update: Tensor) -> Tensor:
    """The part of a whole matrix that this rank has of the parameter."""
    if not isinstance(param, DTensor):
        return update
    return distribute_tensor(update, param.device_mesh, param.placements, src_data_rank=None)


def _step_factor(shape: torch.Size, adjust_lr_fn: str | None, transposed: bool) -> float:
    """Factor of the learning rate for a matrix of this shape."""
    rows, columns = reversed(shape) if transposed else shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _is_matrix(param: Any) -> bool:
    tensor: Tensor = param[1] if isinstance(param, tuple) else param
    return tensor.ndim == 2
