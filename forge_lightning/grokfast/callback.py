"""Grokfast: low-pass gradient filter between the backward pass and the optimizer step."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from forge_lightning.core.callback import ForgeCallback, is_logging_step, published, step_of_log, uses_strategy
from forge_lightning.core.device import reads_are_free
from forge_lightning.core.distributed import broadcast_from_rank_zero
from forge_lightning.core.layers import plain_name
from forge_lightning.grokfast.filter import FilterName, FilterStats, GradientFilter, ScheduleName
from forge_lightning.grokfast.optim import GrokfastAdamW, GrokfastSGD

_STEP_THESE = "Return the optimizer from `configure_optimizers`, and in manual optimization step `self.optimizers()`."


class Grokfast(ForgeCallback):
    """Amplify the slow component of every gradient before the optimizer uses it.

    Hook: ``on_before_optimizer_step``: once per optimizer step, on accumulated, synchronised, unscaled gradients,
    before Lightning clips them. In manual optimization your own ``self.clip_gradients`` comes first.

    Reads: gradients of the parameters that the optimizer steps; ``stage_monitor`` with ``schedule="by_stage"``.
    Changes: those gradients, in place. A step with a non-finite gradient is left alone and enters no state.
    Logs: every ``log_every_n_steps``, of all optimizers of a step together: ``forge/grokfast/lamb``,
    ``forge/grokfast/cosine`` (gradient and slow gradient before the step, in [-1, 1]; NaN on the first),
    ``forge/grokfast/grad_norm_before``, ``forge/grokfast/grad_norm_after``, ``forge/grokfast/skipped_steps``
    (non-finite so far).

    Cost: one fp32 copy of the gradients ("ma": ``window_size + 1`` copies), and with a constant λ 1.3 % of a
    GPT-2-small step, 3 % of one of the paper's model; by "cosine_similarity" 1.7 times that.

    When to use: a model that has memorised and does not generalise, under an optimizer without weight decay to speak
    of, as in the paper; elsewhere, measure it against a higher learning rate.

    When it does not help: the published speed-up is against Adam without weight decay. Tune AdamW's learning rate and
    weight decay first; on the paper's task that alone is faster (`benchmarks/grokking.md`). A filter that remembers 50
    steps slows a run of a few hundred.

    Args:
        filter: "ema" adds the gradients' exponential moving average, "ma" their window mean, "projection" the
            gradient's own component along the EMA.
        alpha: EMA decay of "ema" and "projection", in [0, 1).
        lamb: Largest λ, at least 0; 0 turns the callback off. Default: 2 for "ema", 5 for "ma" (the paper's), 0.25 for
            "projection".
        window_size: Gradients that "ma" averages; it acts from step ``window_size`` on.
        schedule: "cosine_similarity" (λ grows with the smoothed cosine of gradient and slow gradient, and is 0 where
            they do not agree, as under most tuned optimizers), "constant" (always ``lamb``, as in the paper),
            "linear_warmup" or "by_stage".
        lamb_init: Smallest λ while a schedule is on. Default: 0, for "projection" 0.05.
        warmup_steps: Optimizer steps that "linear_warmup" takes.
        cosine_decay: Decay of the EMA that smooths the cosine of "cosine_similarity", in [0, 1).
        stage_monitor: Logged metric that holds the training stage's number, for "by_stage".
        stage_lambs: λ for each stage number, for "by_stage"; ``lamb_init`` for stages not listed.
        keep_norm: Rescale the filtered gradients to the global norm they had: under SGD the filter otherwise also
            raises the step size.
        include: Parameter-name patterns to filter, as in ``"model.layers.*"``. Default: all.
        exclude: Parameter-name patterns to leave alone; wins over ``include``.
        ring_dtype: Type of the gradients that "ma" keeps: "bfloat16" halves the memory.
        compile: On a GPU, let `torch.compile` fuse the filter's passes over the gradients, which takes a while in the
            first steps. On the CPU it does nothing.
        save_state: Keep the filter's state in checkpoints (as large as the filter's memory); without it a resumed run
            starts the filter afresh.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, with LBFGS, DeepSpeed, FSDP1, a fused optimizer under fp16,
            `GrokfastAdamW` or `GrokfastSGD`, or patterns that match no parameter; after an epoch in which no optimizer
            step came by, or none with a gradient.

    References:
        Lee et al., `Grokfast: Accelerated Grokking by Amplifying Slow Gradients <https://arxiv.org/abs/2405.20233>`_,
        2024.
    """

    namespace: ClassVar[str] = "grokfast"

    def __init__(
        self,
        filter: FilterName = "ema",
        alpha: float = 0.98,
        lamb: float | None = None,
        window_size: int = 100,
        schedule: ScheduleName = "cosine_similarity",
        lamb_init: float | None = None,
        warmup_steps: int = 100,
        cosine_decay: float = 0.9,
        stage_monitor: str = "forge/stage/number",
        stage_lambs: dict[int, float] | None = None,
        keep_norm: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        ring_dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        save_state: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._new_filter = partial(
            GradientFilter,
            filter,
            alpha,
            lamb,
            window_size,
            schedule,
            lamb_init,
            warmup_steps,
            cosine_decay,
            stage_lambs,
            keep_norm,
            ring_dtype,
            compile,
            owner="Grokfast",
        )
        self._off = self._new_filter().is_off  # also refuses bad arguments here, where they were written
        self._by_stage = schedule == "by_stage"
        self.stage_monitor = stage_monitor
        self.include = None if include is None else list(include)
        self.exclude = list(exclude)
        self.save_state = save_state
        self._filters: dict[int, GradientFilter] = {}  # by optimizer: each counts its own steps
        self._all_finite: set[int] = set()  # of which no step was left alone yet, for a first warning
        self._stage: int | None = None
        self._names: dict[int, str] = {}
        self._trained, self._acted = False, False  # whether there was a batch, and a gradient to filter
        self._stats: dict[int, FilterStats] = {}  # of each optimizer, at the step that is logged
        self._stats_step = -1

    def reset(self) -> None:
        super().reset()
        self._filters, self._stage, self._acted = {}, None, False
        self._all_finite = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if uses_strategy(trainer, "DeepSpeedStrategy"):
            raise self.refuse(
                "DeepSpeed", "it keeps gradients outside `p.grad`", "Use `ModelParallelStrategy` (FSDP2)."
            )
        if uses_strategy(trainer, "FSDPStrategy"):
            raise self.refuse(
                "FSDPStrategy", "its flattened gradients have no stable shape", "Use `ModelParallelStrategy` (FSDP2)."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._off:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise self.refuse(
                    "LBFGS", "it evaluates the gradient several times per step", "Use a first-order method."
                )
            if isinstance(optimizer, GrokfastAdamW | GrokfastSGD):
                name = type(optimizer).__name__
                raise self.refuse(name, "the gradients would be filtered twice", "Use one of the two.")
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise self.refuse(
                    "a fused optimizer in 16-mixed precision",
                    "its gradients are still scaled when the filter runs",
                    "Pass `fused=False` to the optimizer, or train in bf16-mixed.",
                )
        self._map_names(pl_module)
        if not any(self._is_filtered(name) for name in self._names.values()):
            raise MisconfigurationException(
                f"`Grokfast(include={self.include!r}, exclude={self.exclude!r})` leaves no parameter to filter."
                f" The module has {sorted(self._names.values())[:8]} ..."
            )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._off:
            return
        index = trainer.optimizers.index(optimizer)
        gradients = self._gradients(pl_module, optimizer, index)
        self._acted |= bool(gradients)
        if index not in self._filters:
            self._filters[index] = self._new_filter()
            self._all_finite.add(index)
        gradient_filter, measure = self._filters[index], is_logging_step(trainer)
        stats = gradient_filter(gradients, stage=self._current_stage(trainer), measure=measure)
        free = reads_are_free(pl_module.device)
        if index in self._all_finite and (free or measure) and gradient_filter.skipped_steps:
            self._all_finite.discard(index)
            self._warn_not_finite(trainer, "at" if free else "at or before")
        if stats is not None:
            self._log(trainer, index, stats)

    def _warn_not_finite(self, trainer: Trainer, when: str) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # which drops such steps itself
            self.warn_once(
                f"gradients are not finite {when} step {trainer.global_step}. The filter leaves them alone. Unless your"
                " module clears them, the optimizer takes them, and no weight recovers from NaN: go on from an earlier"
                " checkpoint, without the batch that did it."
            )

    def _log(self, trainer: Trainer, index: int, stats: FilterStats) -> None:
        """What was done at this step, with all its optimizers together."""
        step = step_of_log(trainer)
        if step != self._stats_step:
            self._stats, self._stats_step = {}, step
        self._stats[index] = stats
        every = list(self._stats.values())
        metrics = {key: fmean(getattr(one, key) for one in every) for key in ("lamb", "cosine")}
        for key in ("grad_norm_before", "grad_norm_after"):
            metrics[key] = math.hypot(*(getattr(one, key) for one in every))
        self.log_metrics(trainer, metrics | {"skipped_steps": self.skipped_steps})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._trained = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained, self._trained = self._trained, False  # nothing was, behind a resume at an epoch's end
        if not self._off and not self._acted and trained:
            if not self._filters:
                why = "it saw no step of this epoch"
            elif any(p.requires_grad for p in self._filtered(trainer)):
                why = "no parameter that they step and it filters had a gradient in this epoch"
            else:
                why = ""  # all are frozen, until later
            if why:
                raise self.refuse("optimizers that are stepped past Lightning", why, _STEP_THESE)
        if self._by_stage and self._stage is None:
            self.read_metric(trainer, self.stage_monitor, "stage_monitor")

    @property
    def skipped_steps(self) -> int:
        """Steps left alone so far because a gradient was not finite."""
        return sum(f.skipped_steps for f in self._filters.values())

    def state_dict(self) -> dict[str, Any]:
        if not self.save_state or self._off:
            return {}
        return {"stage": self._stage, "filters": {index: f.state_dict() for index, f in self._filters.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.save_state or self._off:
            return
        self._stage = state_dict["stage"]
        self._filters, self._all_finite = {}, set()
        for index, saved in state_dict["filters"].items():
            self._filters[index] = self._new_filter()
            self._filters[index].load_state_dict(saved)
            if not saved["skipped_steps"]:
                self._all_finite.add(index)

    def _gradients(self, pl_module: LightningModule, optimizer: Optimizer, index: int) -> dict[str, Tensor]:
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if any(id(p) not in self._names for p in params):
            self._map_names(pl_module)  # added since
        named = ((self._names.get(id(p), f"optimizer{index}.{position}"), p) for position, p in enumerate(params))
        return {name: p.grad for name, p in named if p.grad is not None and self._is_filtered(name)}

    def _filtered(self, trainer: Trainer) -> Iterator[Any]:
        """Parameters of the optimizers that are filtered."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                yield from (p for p in group["params"] if self._is_filtered(self._names.get(id(p), "")))

    def _map_names(self, pl_module: LightningModule) -> None:
        self._names = {}
        for name, param in pl_module.named_parameters():
            self._names[id(param)] = plain_name(name)

    def _is_filtered(self, name: str) -> bool:
        included = self.include is None or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _current_stage(self, trainer: Trainer) -> int | None:
        """The stage that the suite's classifier has on all ranks, or else the one that rank 0 sees.

        Another one on another rank would let the weights drift apart.
        """
        if not self._by_stage:
            return None
        known = published(trainer, self.stage_monitor)  # the same on all ranks
        if math.isfinite(known):
            self._stage = int(known)
            return self._stage
        value = trainer.callback_metrics.get(self.stage_monitor)
        stage = self._stage if value is None else int(value)
        self._stage = broadcast_from_rank_zero(trainer, stage)
        return self._stage
