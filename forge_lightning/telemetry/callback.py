"""Telemetry: what each step did and where its time went, in every logger and in a trace on disk."""

import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.optim import Optimizer

from forge_lightning.core.batch import field_of
from forge_lightning.core.callback import (
    ForgeCallback,
    StepMeans,
    events_of,
    is_a,
    is_dev_run,
    is_logging_step,
    log_also_every,
    logged_at_this_step,
    overrides,
    run_directory,
    step_of_log,
)
from forge_lightning.core.distributed import full_tensor, sum_over_ranks
from forge_lightning.core.protocols import SupportsEvents, SupportsStage
from forge_lightning.core.trace import FILE_NAME, TraceWriter
from forge_lightning.telemetry.facts import run_facts
from forge_lightning.telemetry.step_timer import StepTimer

_OPTIONAL = ("loss", "success", "tokens", "examples")  # which a module or a batch may lack


class Telemetry(ForgeCallback):
    """Log what a step did, and write it with everything the other callbacks logged into a trace that survives a kill.

    Hook: the end of every optimizer step, and of every validation. Place it last in the list: it then sees what the
    other callbacks logged at the step. The trace, ``trace.jsonl`` in the run directory, is one JSON object a line:
    steps with the values of that step, validations with their metrics, events (transitions of the geometry, changes
    of stage). A resumed run continues it without gap or repetition. `forge-fit analyze` draws it. Without a logger
    there is no run directory, and no trace.

    Reads: what ``training_step`` returns (``loss``; ``example_loss`` and ``example_success`` where it has them),
    gradients, learning rate, the batch's ``attention_mask`` and ``input_ids``, what other callbacks log and find.
    Changes: nothing.
    Logs: every ``every_n_steps``, as means over ranks and accumulated batches: ``forge/telemetry/loss``,
    ``forge/telemetry/success`` (share of examples), ``forge/telemetry/perplexity`` (of a module that returns
    ``example_loss``), ``forge/telemetry/grad_norm_before`` (filter and clipping), ``forge/telemetry/grad_norm_after``,
    ``forge/telemetry/lr``, ``forge/telemetry/examples_per_second``, ``forge/telemetry/tokens_per_second`` (without
    padding), ``forge/telemetry/step_seconds``, and its parts ``forge/telemetry/data_seconds``,
    ``forge/telemetry/forward_backward_seconds``, ``forge/telemetry/optimizer_seconds``,
    ``forge/telemetry/callbacks_seconds``, ``forge/telemetry/other_seconds``; ``forge/telemetry/peak_memory`` (GiB, of
    the accelerator, else of the process). Times are the host's, since the last logged step, without validation. What a
    module does not return is not logged.

    Cost: 0.2 to 0.3 ms of CPU a step of a small model; logging at every step, 2 % of one of 27 ms.

    When to use: always; last in the list.

    When it does not help: on an accelerator work goes on after a call returns; the parts of a step then say where the
    host waits.

    Args:
        every_n_steps: Optimizer steps between two records. Default: the Trainer's ``log_every_n_steps``.
        trace: Write the trace.
        max_rows: Records after which only every second one is written, then every fourth after twice as many, and so
            on: the file grows with the logarithm of the steps. Rows with sparse values are all written.
        name: Tells two instances apart; also in the trace's file name.

    Raises:
        ValueError: If ``every_n_steps`` or ``max_rows`` is below 1.
    """

    namespace: ClassVar[str] = "telemetry"

    def __init__(
        self,
        every_n_steps: int | None = None,
        trace: bool = True,
        max_rows: int = 100_000,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        for argument, value in (("every_n_steps", every_n_steps), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"`Telemetry({argument}={value})` must be at least 1.")
        self.every_n_steps = every_n_steps
        self.trace = trace
        self.max_rows = max_rows
        self._writer: TraceWriter | None = None
        self._earlier: Path | None = None
        self._offered = 0
        self._num_rows: int | None = None  # of the trace that a restored state continues
        self._seen_events: dict[str, dict[str, Any]] = {}
        self._seconds_before = 0.0
        self._trainer: Trainer | None = None
        self._profiler: _TimedProfiler | None = None
        self._finders: list[Any] = []
        self._is_last = True
        self._stage_source: SupportsStage | None = None
        self._started = 0.0
        self._record, self._last_logged = False, 0
        self._now = _Record()
        self._known: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trainer = trainer
        self._begin_fit()
        timed: Any = trainer
        self._profiler = _TimedProfiler(timed.profiler)
        timed.profiler = self._profiler
        self._last_logged = trainer.global_step
        self._finders = [callback for callback in timed.callbacks if isinstance(callback, SupportsEvents)]
        later = timed.callbacks[timed.callbacks.index(self) + 1 :]
        self._is_last = not any(_changes_gradients(callback) for callback in later)
        self._stage_source = next(
            (c for c in timed.callbacks if isinstance(c, SupportsStage) and isinstance(c.stage, str)), None
        )
        if self.every_n_steps is not None:
            log_also_every(trainer, self.every_n_steps)
        if trainer.global_step == 0:  # another fit with the same instance
            self._offered, self._seconds_before = 0, 0.0
        directory = None if is_dev_run(trainer) else run_directory(trainer)
        if self.trace and directory is not None and trainer.is_global_zero:
            path = directory / (FILE_NAME if self.name is None else f"trace_{self.name}.jsonl")
            earlier = self._earlier if self._earlier is not None and self._earlier.is_file() else path
            header = {"module": type(pl_module).__name__}
            try:
                header = run_facts(trainer, pl_module)
            except Exception as error:  # of the user's module or data, which a report must not end a fit for
                self.warn_once(f"the facts of the run are unknown: {type(error).__name__}: {error}")
            known = (self._offered, self._num_rows)
            self._writer = TraceWriter(
                path, trainer.global_step, earlier, header, self.max_rows, *known, on_failure=self._lost
            )
            self._seconds_before = max(self._seconds_before, self._writer.seconds)
            self._earlier = path

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profiler is not None:
            self._profiler.timer.pause(True)
            if self._writer is not None:
                self._writer.flush()  # a validation may take long
            self._known = dict(trainer.callback_metrics)  # kept alive: a value is fresh if it is another object

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profiler is None:
            return
        if self._writer is not None and not trainer.sanity_checking:
            fresh = {k: float(v) for k, v in trainer.callback_metrics.items() if self._known.get(k) is not v}
            row = self._row(trainer, "validation")
            self._writer.write(row | {"metrics": fresh})
            self._write_events(trainer)
            self._writer.flush()
        self._known = {}
        self._profiler.timer.pause(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        starts_step = self._step_before != trainer.global_step
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if starts_step:
            self._record = self._is_recorded(trainer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._record:
            self._now.lr = float(trainer.optimizers[0].param_groups[0]["lr"])
            self._now.norms.append(_norm_of(_gradients([optimizer])))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._now.count(batch)
        if self._record:
            self._now.means.add(trainer, outputs)
            self._now.tells_perplexity = isinstance(outputs, Mapping) and "example_loss" in outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._profiler is None:
            return
        if self._record:
            self.log_metrics(trainer, self._read(trainer, pl_module), monitor=False)
            self._now, self._last_logged = _Record(), trainer.global_step
        if self._writer is not None:
            values = logged_at_this_step(trainer)
            if values:
                row = self._row(trainer, "step") | {"metrics": values}
                sparse = any(not key.startswith(("forge/telemetry/", "forge/grokfast/")) for key in values)
                (self._writer.write if sparse else self._writer.write_plain)(row)
                self._offered = self._writer.offered
            self._write_events(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None:
            self._write_events(trainer)
        super().on_train_end(trainer, pl_module)

    def reset(self) -> None:
        super().reset()
        self._earlier, self._num_rows, self._seen_events = None, None, {}
        self._offered, self._seconds_before = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        if self._writer is not None:
            self._writer.flush()  # what a resumed run will not write again
        return {
            "trace": None if self._earlier is None else str(self._earlier.absolute()),
            "offered": self._offered,
            "num_rows": self._num_rows if self._writer is None else self._writer.num_rows,
            "seen_events": {key: dict(event) for key, event in self._seen_events.items()},
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = None if state_dict["trace"] is None else Path(state_dict["trace"])
        self._offered, self._num_rows = state_dict["offered"], state_dict["num_rows"]
        self._seen_events = {key: dict(event) for key, event in state_dict["seen_events"].items()}
        self._seconds_before = state_dict["seconds"]

    def _lost(self, error: OSError) -> None:
        self.warn_once(f"the trace ends here: {error}. Training continues without it.")

    def _begin_fit(self) -> None:
        self._started = time.perf_counter()
        self._record, self._last_logged = False, 0
        self._now, self._known = _Record(), {}

    def detach(self) -> None:
        if self._profiler is not None and self._trainer is not None:
            self._seconds_before = self._seconds()
            timed: Any = self._trainer
            if timed.profiler is self._profiler:
                timed.profiler = self._profiler.inner
            log_also_every(self._trainer, None)
            self._profiler = None
        self._trainer = None
        if self._writer is not None:
            self._writer.close()
            self._num_rows = self._writer.num_rows
            self._writer = None

    def _seconds(self) -> float:
        running = time.perf_counter() - self._started if self._profiler is not None else 0.0
        return self._seconds_before + running

    def _is_recorded(self, trainer: Trainer) -> bool:
        if self.every_n_steps is None or is_dev_run(trainer):
            return is_logging_step(trainer)
        return (step_of_log(trainer) + 1) % self.every_n_steps == 0

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """This record's values; one exchange between ranks."""
        assert self._profiler is not None
        now, steps, device = self._now, max(1, trainer.global_step - self._last_logged), pl_module.device
        seconds = {f"{part}_seconds": spent / steps for part, spent in self._profiler.timer.take().items()}
        values = {key: now.means.read(key) for key in ("loss", "success") if key in now.means}
        if now.tokens is not None:
            values["tokens"] = float(now.tokens)
        if now.examples is not None:
            values["examples"] = float(now.examples)
        values |= {**seconds, "peak_memory": _peak_memory(device)}
        if trainer.world_size > 1:
            values = self._mean_over_ranks(trainer, values)
        total = sum(values[part] for part in seconds)
        metrics = {"step_seconds": total}
        for key in ("tokens", "examples"):
            if key in values:
                there = values.pop(key) * trainer.world_size
                metrics[f"{key}_per_second"] = there / (total * steps) if total else math.nan
        if now.tells_perplexity and "loss" in values:
            metrics["perplexity"] = math.inf if values["loss"] >= 700 else math.exp(values["loss"])
        if now.norms:
            norm = math.sqrt(sum(float(norm) ** 2 for norm in now.norms))
            metrics["grad_norm_before"] = self._norm_before(trainer, norm)
            after = self._norm_after(trainer, pl_module, norm)
            if after is not None:
                metrics["grad_norm_after"] = after
            metrics["lr"] = now.lr
        return values | metrics

    def _mean_over_ranks(self, trainer: Trainer, values: dict[str, float]) -> dict[str, float]:
        """Means over the ranks that have a value. A value that is not finite stays so."""
        keys = list(dict.fromkeys((*_OPTIONAL, *values)))  # the same on all ranks
        both = [values.get(key, 0.0) for key in keys] + [float(key in values) for key in keys]
        sums, counts = sum_over_ranks(trainer, torch.tensor(both)).chunk(2)
        return {key: float(s / c) for key, s, c in zip(keys, sums, counts, strict=True) if c > 0}

    def _norm_before(self, trainer: Trainer, norm: float) -> float:
        """The norm without what `Grokfast`, in front of this callback, has made of the gradients that it filters."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        logged, square = logged_at_this_step(trainer), norm**2
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, ForgeCallback) and callback.namespace == "grokfast":
                names = [callback.metric_name(f"grad_norm_{when}") for when in ("before", "after")]
                if all(name in logged for name in names):
                    others = square - logged[names[1]] ** 2  # of gradients that are not filtered
                    square = logged[names[0]] ** 2 + (others if others > 1e-5 * square else 0.0)
        return math.sqrt(square)

    def _norm_after(self, trainer: Trainer, pl_module: LightningModule, norm: float) -> float | None:
        """``None`` where the module has cleared the gradients already, as manual optimization may."""
        own_clipping = overrides(pl_module, "configure_gradient_clipping")
        if (
            trainer.gradient_clip_val is None
            and not own_clipping
            and pl_module.automatic_optimization
            and self._is_last
        ):
            return norm
        found = _gradients(trainer.optimizers)
        return float(_norm_of(found)) if found else None

    def _row(self, trainer: Trainer, kind: str) -> dict[str, Any]:
        row = {"kind": kind, "step": trainer.global_step, "epoch": trainer.current_epoch}
        row["seconds"] = round(self._seconds(), 4)
        return row if self._stage_source is None else row | {"stage": self._stage_source.stage}

    def _write_events(self, trainer: Trainer) -> None:
        assert self._writer is not None
        for finder in self._finders:
            key, events = finder.state_key, events_of(finder)
            last = self._seen_events.get(key)
            if not events or events[-1] == last:
                continue
            start = max((i + 1 for i, event in enumerate(events) if event == last), default=0)
            for event in events[start:]:
                self._writer.write({**event, "event": event["kind"], "kind": "event", "callback": key})
            self._seen_events[key] = events[-1]


class _Record:
    """What comes together between two records."""

    def __init__(self) -> None:
        self.means = StepMeans()
        self.norms: list[Tensor] = []
        self.lr = math.nan
        self.tells_perplexity = False
        self.examples: int | None = None  # of batches that are not tensors nor hold any
        self.tokens: Any = None  # on the device until it is read

    def count(self, batch: Any) -> None:
        """Examples, and tokens that are not padding."""
        tokens = field_of(batch, "input_ids")
        first = tokens if tokens is not None else _first_tensor(batch)
        if first is not None and first.ndim:
            self.examples = (self.examples or 0) + len(first)
        if tokens is not None:
            mask = field_of(batch, "attention_mask")
            count = tokens.numel() if mask is None else mask.sum()
            self.tokens = count if self.tokens is None else self.tokens + count


class _TimedProfiler(Profiler):
    """Lightning's own marks around every part of a step, timed; handed on to the profiler that was there."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self.timer = StepTimer()
        self._hands_on = not is_a(inner, "PassThroughProfiler")

    def __del__(self) -> None:
        """Do nothing: the inner profiler is still in use, and the base class would tear it down."""

    def profile(self, action_name: str) -> Any:
        return super().profile(action_name) if self._hands_on else _Span(self.timer, action_name)

    def start(self, action_name: str) -> None:
        self.timer.start(action_name)
        if self._hands_on:
            self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        if self._hands_on:
            self.inner.stop(action_name)
        self.timer.stop()

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)


class _Span:
    """One action; a class is quicker here than a generator."""

    __slots__ = ("action", "timer")

    def __init__(self, timer: StepTimer, action: str) -> None:
        self.timer, self.action = timer, action

    def __enter__(self) -> str:
        self.timer.start(self.action)
        return self.action

    def __exit__(self, *_: object) -> None:
        self.timer.stop()


def _changes_gradients(callback: Callback) -> bool:
    return any(overrides(callback, hook) for hook in ("on_before_optimizer_step", "on_after_backward"))


def _gradients(optimizers: Any) -> list[Any]:
    return [p.grad for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]


def _norm_of(grads: list[Any]) -> Tensor:
    """Global norm, over shards too; NaN without any gradient."""
    if not grads:
        return torch.tensor(math.nan)
    grads = [g.coalesce().values() if g.is_sparse else g for g in grads]
    norm: Any
    if all(type(g) is Tensor and g.device == grads[0].device for g in grads):
        half = all(g.dtype in (torch.float16, torch.bfloat16, torch.float32) for g in grads)
        norms = torch._foreach_norm(grads, dtype=torch.float32 if half else torch.float64)  # doubles take no less
        norm = torch.linalg.vector_norm(torch.stack(norms))
    else:  # shards
        norm = torch.nn.utils.get_total_norm(grads)
    return full_tensor(norm).detach()


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _peak_memory(device: torch.device) -> float:
    """GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
