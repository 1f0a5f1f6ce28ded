"""Grokfast without a trainer: a gradient filter with its state and its schedule, over named gradients."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import zeros as dtensor_zeros

from forge_lightning.core.device import reads_are_free
from forge_lightning.core.distributed import full_tensor, local_part
from forge_lightning.core.validate import require
from forge_lightning.grokfast import functional as F
from forge_lightning.grokfast.unread import UnreadSteps

FilterName = Literal["ema", "ma", "projection"]
ScheduleName = Literal["constant", "linear_warmup", "cosine_similarity", "by_stage"]

LAMB_DEFAULTS: dict[str, tuple[float, float]] = {"ema": (0.0, 2.0), "ma": (0.0, 5.0), "projection": (0.05, 0.25)}
"""``(lamb_init, lamb)`` of each filter: the paper's for EMA and MA, this project's requirements for the projection."""


@dataclass(frozen=True)
class FilterStats:
    """What one filtered step did.

    Args:
        lamb: λ of the step.
        cosine: Global cosine between the gradient and the slow gradient before it took this one, in [-1, 1]. NaN on
            the first step, which has none.
        grad_norm_before: Global L2 norm before the filter.
        grad_norm_after: Global L2 norm after it.
    """

    lamb: float
    cosine: float
    grad_norm_before: float
    grad_norm_after: float


class GradientFilter:
    """Filters gradients in place, keeps what that needs, and saves and restores it exactly.

    Under FSDP2 and tensor parallelism gradients are `DTensor`; the state is sharded like them, and norms and inner
    products are summed over the shards, so that every process takes the same decisions. A step with a non-finite
    gradient (as fp16 overflow makes) is left alone and enters no state.

    Args:
        filter: "ema", "ma" or "projection"; see `forge_lightning.functional`.
        alpha: EMA decay of "ema" and "projection", in [0, 1).
        lamb: Largest λ, at least 0; 0 turns the filter off. Default: 2 for "ema", 5 for "ma", 0.25 for "projection".
        window_size: Gradients that "ma" averages, at least 1. It keeps that many copies of every gradient.
        schedule: How λ moves from ``lamb_init`` to ``lamb``: not at all ("constant": always ``lamb``), on a line over
            ``warmup_steps``, with the smoothed cosine of gradient and slow gradient (0 where that is not positive),
            or as ``stage_lambs`` says.
        lamb_init: Smallest λ while a schedule is on. Default: 0, for "projection" 0.05.
        warmup_steps: Optimizer steps that "linear_warmup" takes.
        cosine_decay: Decay of the EMA that smooths the cosine, in [0, 1).
        stage_lambs: λ for each training stage number of "by_stage"; ``lamb_init`` for stages not listed.
        keep_norm: Rescale the filtered gradient to the global norm it had, so that only its direction changes.
        ring_dtype: Type of the gradients that "ma" keeps: "float32" or "bfloat16" (half the memory).
        compile: On an accelerator, let `torch.compile` fuse the passes over the gradients.

    Raises:
        ValueError: If an argument is out of range, naming it and ``owner``.
    """

    def __init__(
        self,
        filter: FilterName = "ema",
        alpha: float = 0.98,
        lamb: float | None = None,
        window_size: int = 100,
        schedule: ScheduleName = "constant",
        lamb_init: float | None = None,
        warmup_steps: int = 100,
        cosine_decay: float = 0.9,
        stage_lambs: Mapping[int, float] | None = None,
        keep_norm: bool = False,
        ring_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        *,
        owner: str = "GradientFilter",
    ) -> None:
        check = partial(require, owner)
        check(filter in get_args(FilterName), "filter", filter, f"one of {list(get_args(FilterName))}")
        check(schedule in get_args(ScheduleName), "schedule", schedule, f"one of {list(get_args(ScheduleName))}")
        lamb_init = LAMB_DEFAULTS[filter][0] if lamb_init is None else lamb_init
        lamb = LAMB_DEFAULTS[filter][1] if lamb is None else lamb
        check(0 <= alpha < 1, "alpha", alpha, "in [0, 1)")
        check(0 <= lamb < math.inf, "lamb", lamb, "at least 0 and finite")
        check(window_size >= 1, "window_size", window_size, "at least 1")
        if schedule != "constant" and lamb > 0:
            check(0 <= lamb_init <= lamb, "lamb_init", lamb_init, f"in [0, lamb={lamb}]")
        check(warmup_steps >= 1, "warmup_steps", warmup_steps, "at least 1")
        check(0 <= cosine_decay < 1, "cosine_decay", cosine_decay, "in [0, 1)")
        check(ring_dtype in ("float32", "bfloat16"), "ring_dtype", ring_dtype, "'float32' or 'bfloat16'")
        if schedule == "by_stage":
            check(bool(stage_lambs), "stage_lambs", stage_lambs, "given with schedule='by_stage', e.g. {1: 0, 2: 2}")
            for stage, value in (stage_lambs or {}).items():
                check(0 <= value <= lamb, "stage_lambs", {stage: value}, f"in [0, lamb={lamb}]")
        self.filter = filter
        self.alpha = alpha
        self.lamb = lamb
        self.window_size = window_size
        self.schedule = schedule
        self.lamb_init = lamb_init
        self.warmup_steps = warmup_steps
        self.cosine_decay = cosine_decay
        self.stage_lambs = dict(stage_lambs or {})
        self.keep_norm = keep_norm
        self.ring_dtype = torch.bfloat16 if ring_dtype == "bfloat16" else torch.float32
        self.compile = compile

        self._steps = 0
        self._skipped_steps = 0
        self._smoothed_cosine: float | None = None
        self._slow: dict[str, Tensor] = {}  # EMA, or running sum of the window
        self._rings: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unread: UnreadSteps | None = None
        self._pending: dict[str, dict[str, Any]] = {}  # restored, not yet on the device and shard of a gradient

    @property
    def steps(self) -> int:
        """Optimizer steps filtered so far."""
        self._settle()
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """Steps left alone so far because a gradient was not finite."""
        self._settle()
        return self._skipped_steps

    @property
    def smoothed_cosine(self) -> float | None:
        """The running cosine of "cosine_similarity"; ``None`` before the first."""
        self._settle()
        return self._smoothed_cosine

    @property
    def is_off(self) -> bool:
        """Whether it can never change a gradient."""
        return self.lamb == 0

    @torch.no_grad()
    def __call__(
        self, grads: Mapping[str, Tensor], *, stage: int | None = None, measure: bool = False
    ) -> FilterStats | None:
        """Filter gradients in place: one optimizer step.

        Args:
            grads: Gradient of each parameter, by a name that stays the same over the run.
            stage: Training stage number, for ``schedule="by_stage"``.
            measure: Also compute the cosine and both norms, at the price of up to two more reads of the gradients.

        Returns:
            What was done, if ``measure``; ``None`` also where nothing was: filter off, no gradient, or a
            non-finite one.

        Raises:
            ValueError: If a gradient is sparse, or the restored state does not fit a parameter.
        """
        if self.is_off or not grads:
            return None
        shards = {name: local_part(grad) for name, grad in grads.items()}
        for name, shard in shards.items():
            if shard.layout != torch.strided:
                raise ValueError(
                    f"The gradient of {name!r} is sparse, which the filter cannot take: build its layer with"
                    " `sparse=False`, or leave the parameter out with `exclude`."
                )
        square = _global_square(grads, shards)
        if not measure and not reads_are_free(square.device) and self._may_go_unread(grads, shards):
            self._filter_unread(grads, shards, square, stage)
            return None
        self._settle()
        square_before = float(square)
        if not math.isfinite(square_before):
            self._skipped_steps += 1
            return None

        known = [name for name in grads if self._materialize(name, grads[name])]
        cosine = math.nan
        if known and (measure or self.schedule == "cosine_similarity"):
            cosine = self._cosine(known, grads, shards, square_before)
        lamb = self._scheduled_lamb(cosine, stage)
        self._filter(grads, shards, lamb)
        self._steps += 1

        square_after = square_before
        if lamb and (measure or self.keep_norm):
            square_after = float(_global_square(grads, shards))
            if self.keep_norm and 0 < square_after < math.inf:
                torch._foreach_mul_(list(shards.values()), math.sqrt(square_before / square_after))
                square_after = square_before
        if not measure:
            return None
        return FilterStats(lamb, cosine, math.sqrt(square_before), math.sqrt(square_after))

    def _settle(self) -> None:
        """Read the counters that steps have left on the device."""
        if self._unread is not None:
            self._steps, self._skipped_steps, self._smoothed_cosine, counts = self._unread.read()
            self._counts |= counts
            self._unread = None

    def _may_go_unread(self, grads: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> bool:
        """Whether every parameter has a state, a restored one perhaps, and all are on one device."""
        if not all(name in self._slow or name in self._pending for name in grads):
            return False
        if len({shard.device for shard in shards.values()}) > 1:
            return False
        if any(name in self._pending for name in grads):
            self._settle()  # a window that is restored brings a count
        return all(self._materialize(name, grad) for name, grad in grads.items())

    def _filter_unread(
        self, grads: Mapping[str, Tensor], shards: Mapping[str, Tensor], square: Tensor, stage: int | None
    ) -> None:
        """A step of which nothing is read: one that is not finite is left out by a flag on the device."""
        if self._unread is None:
            counters = (self._steps, self._skipped_steps, self._smoothed_cosine, self._counts)
            self._unread = UnreadSteps(square.device, *counters)
        unread, ok = self._unread, square.isfinite()
        lamb = self._unread_lamb(grads, shards, square, ok, stage)
        scale = torch.where(ok, lamb, torch.zeros_like(lamb))
        values, slow = list(shards.values()), [local_part(self._slow[name]) for name in shards]
        if self.filter == "ma":
            counts, rings = [unread.counts[name] for name in shards], [local_part(self._rings[name]) for name in shards]
            self._fused(F.ma_where_)(values, rings, slow, counts, ok)
            F.refresh_totals_(rings, slow, unread.calls)
            scale = scale / self.window_size
            scales = [torch.where(count[0] >= self.window_size, scale, torch.zeros_like(scale)) for count in counts]
            self._fused(F.add_scaled_by_)(values, slow, scales)
        elif self.filter == "ema":
            self._fused(F.ema_step_)(values, slow, ok, scale, alpha=self.alpha)
        else:
            products = self._fused(F.ema_products_where_)(values, slow, ok, alpha=self.alpha)
            dots, squares = (_sum_over_shards(product, grads) for product in products)
            shares = torch.where(ok, dots / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0.0)
            self._fused(F.add_scaled_by_)(values, slow, list((scale * shares).unbind()))
        if self.keep_norm:
            after = _global_square(grads, shards)
            right = ok & (after > 0) & after.isfinite()
            factor = torch.where(right, (square / after).sqrt(), torch.ones_like(after))
            torch._foreach_mul_(values, factor)
        unread.end_step(ok)

    def _fused(self, function: Any) -> Any:
        return _compiled(function) if self.compile else function

    def _unread_lamb(
        self, grads: Mapping[str, Tensor], shards: Mapping[str, Tensor], square: Tensor, ok: Tensor, stage: int | None
    ) -> Tensor:
        assert self._unread is not None
        if self.schedule == "linear_warmup":
            share = (self._unread.steps / self.warmup_steps).clamp(max=1.0)
            return self.lamb_init + (self.lamb - self.lamb_init) * share
        if self.schedule == "cosine_similarity":
            slow = [local_part(self._slow[name]) for name in grads]
            dot = _sum_over_shards(F.inner_products(list(shards.values()), slow), grads).sum()
            # Not the root of the product, which fp32 does not hold where gradients are small or large.
            length = square.sqrt() * _sum_over_shards(F.squared_norms(slow), grads).sum().sqrt()
            cosine = self._unread.smooth(torch.where(length > 0, dot / length, torch.nan), ok, self.cosine_decay)
            lamb = self.lamb_init + (self.lamb - self.lamb_init) * cosine.clamp(max=1.0)
            return torch.where(cosine > 0, lamb, torch.zeros_like(lamb))
        return torch.full_like(square, self._scheduled_lamb(math.nan, stage))

    def _filter(self, grads: Mapping[str, Tensor], shards: Mapping[str, Tensor], lamb: float) -> None:
        values = list(shards.values())
        slow = [local_part(self._slow[name]) for name in shards]
        if self.filter == "ema":
            F.ema_filter_(values, slow, alpha=self.alpha, lamb=lamb)
        elif self.filter == "projection":
            products = F.ema_products_(values, slow, alpha=self.alpha)
            dots, squares = (_sum_over_shards(p, grads) for p in products)
            F.project_(values, slow, dots, squares, lamb=lamb)
        else:
            rings = [local_part(self._rings[name]) for name in shards]
            F.ma_filter_(values, rings, slow, [self._counts[name] for name in shards], lamb=lamb)
            for name in shards:
                self._counts[name] += 1

    def _cosine(
        self, known: list[str], grads: Mapping[str, Tensor], shards: Mapping[str, Tensor], square: float
    ) -> float:
        """Cosine with the slow gradient of the steps before; a sum has the direction of the mean."""
        some = {name: grads[name] for name in known}
        slow = [local_part(self._slow[name]) for name in known]
        dot = _sum_over_shards(F.inner_products([shards[name] for name in known], slow), some).sum()
        slow_square = _sum_over_shards(F.squared_norms(slow), some).sum()
        length = math.sqrt(square * float(slow_square))
        return float(dot) / length if length > 0 else math.nan

    def _scheduled_lamb(self, cosine: float, stage: int | None) -> float:
        if self.schedule == "linear_warmup":
            return F.warmup_lamb(self._steps, warmup_steps=self.warmup_steps, lamb_init=self.lamb_init, lamb=self.lamb)
        if self.schedule == "by_stage":
            return self.lamb_init if stage is None else self.stage_lambs.get(stage, self.lamb_init)
        if self.schedule == "cosine_similarity":
            if math.isfinite(cosine):
                last = 0.0 if self._smoothed_cosine is None else self._smoothed_cosine
                self._smoothed_cosine = self.cosine_decay * last + (1 - self.cosine_decay) * cosine
            return F.cosine_lamb(self._smoothed_cosine or 0.0, lamb_init=self.lamb_init, lamb=self.lamb)
        return self.lamb

    def _materialize(self, name: str, grad: Tensor) -> bool:
        """Make the state of a parameter on its first gradient. Returns whether the state held a gradient before."""
        if name in self._slow:
            return True
        saved = self._pending.pop(name, None)
        if saved is not None:
            if saved["slow"].shape != grad.shape:
                raise ValueError(
                    f"The checkpoint's filter state of {name!r} has shape {tuple(saved['slow'].shape)}, the parameter"
                    f" {tuple(grad.shape)}: the model changed. Resume the weights alone, or the model as it was."
                )
            self._slow[name] = _distribute_like(saved["slow"], grad, shift=0)
            if self.filter == "ma":
                self._rings[name] = _distribute_like(saved["ring"], grad, shift=1)
                self._counts[name] = saved["count"]
            return True
        dtype = torch.promote_types(grad.dtype, torch.float32)
        self._slow[name] = grad.to(dtype, copy=True) if self.filter != "ma" else torch.zeros_like(grad, dtype=dtype)
        if self.filter == "ma":
            self._rings[name] = _zero_ring(grad, self.window_size, self.ring_dtype)
            self._counts[name] = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, on the CPU. Collective where gradients are sharded: call it on every process."""
        self._settle()
        buffers: dict[str, dict[str, Any]] = {name: dict(saved) for name, saved in self._pending.items()}
        for name, slow in self._slow.items():
            buffers[name] = {"slow": _full(slow)}
            if self.filter == "ma":
                buffers[name] |= {"ring": _full(self._rings[name]), "count": self._counts[name]}
        return {
            "filter": self.filter,
            "steps": self._steps,
            "skipped_steps": self._skipped_steps,
            "smoothed_cosine": self._smoothed_cosine,
            "buffers": buffers,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up where ``state_dict`` was made. Tensors move to their device on the next step.

        Raises:
            ValueError: If it is the state of another filter, or of another window.
        """
        if state_dict["filter"] != self.filter:
            raise ValueError(
                f"The state was saved with filter={state_dict['filter']!r} and cannot continue as"
                f" filter={self.filter!r}: the two remember different things. Resume with the filter as it was."
            )
        for saved in state_dict["buffers"].values():
            if self.filter == "ma" and len(saved["ring"]) != self.window_size:
                raise ValueError(
                    f"The state was saved with window_size={len(saved['ring'])} and cannot continue with"
                    f" window_size={self.window_size}. Resume with the window as it was."
                )
        self._steps = state_dict["steps"]
        self._skipped_steps = state_dict["skipped_steps"]
        self._smoothed_cosine = state_dict["smoothed_cosine"]
        self._slow, self._rings, self._counts, self._unread = {}, {}, {}, None
        self._pending = {name: dict(saved) for name, saved in state_dict["buffers"].items()}


@cache
def _compiled(function: Any) -> Any:
    # What a window of 16 bits has rounded is what is subtracted later: rounding must not be fused away.
    # And without its decorator, whose code, and the compiler's limit of graphs with it, all such functions share.
    compiled = torch.compile(function.__wrapped__, dynamic=False, options={"emulate_precision_casts": True})
    return torch.no_grad()(compiled)


def _full(tensor: Tensor) -> Tensor:
    # `clone`: a view would save its whole storage
    return full_tensor(tensor).detach().cpu().clone()


def _zero_ring(grad: Tensor, window_size: int, dtype: torch.dtype) -> Tensor:
    dtype = dtype if grad.dtype != torch.float64 else torch.float64
    if isinstance(grad, DTensor):
        shape, placements = (window_size, *grad.shape), _shifted(grad, 1)
        return dtensor_zeros(shape, dtype=dtype, device_mesh=grad.device_mesh, placements=placements)
    return torch.zeros((window_size, *grad.shape), dtype=dtype, device=grad.device)


def _distribute_like(full: Tensor, grad: Tensor, *, shift: int) -> Tensor:
    if isinstance(grad, DTensor):
        full = full.to(grad.device_mesh.device_type)
        # Every process has the whole tensor: no broadcast.
        return distribute_tensor(full, grad.device_mesh, _shifted(grad, shift), src_data_rank=None)
    return full.to(grad.device, copy=True)


def _shifted(grad: DTensor, shift: int) -> list[Any]:
    """Placements of a tensor with ``shift`` more leading dimensions."""
    return [Shard(p.dim + shift) if isinstance(p, Shard) else p for p in grad.placements]


def _global_square(grads: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> Tensor:
    values = list(shards.values())
    if any(isinstance(grad, DTensor) for grad in grads.values()):
        return _sum_over_shards(F.squared_norms(values), grads).sum()
    return F.squared_norm(values)


def _sum_over_shards(values: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
    """Per-tensor sums of local shards, (len(grads),), made global."""
    groups: dict[Any, list[int]] = {}
    for index, grad in enumerate(grads.values()):
        if isinstance(grad, DTensor):
            groups.setdefault((grad.device_mesh, tuple(grad.placements)), []).append(index)
    each = list(values.unbind())
    for (mesh, placements), indices in groups.items():
        kinds = [Partial() if p.is_shard() else Replicate() for p in placements]
        some = torch.stack([each[i] for i in indices])  # an index list would be copied to the device
        whole = DTensor.from_local(some, mesh, kinds, run_check=False).full_tensor()
        for i, value in zip(indices, whole.unbind(), strict=True):
            each[i] = value
    return torch.stack(each) if groups else values
