"""The base of every callback of the suite, and helpers for hooks."""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from forge_lightning.core.distributed import current_rank
from forge_lightning.core.loss_terms import TASK_LOSS, own_loss
from forge_lightning.core.protocols import SupportsEvents
from forge_lightning.core.step_log import forget_published, log_at_this_step
from forge_lightning.core.step_log import is_dev_run as is_dev_run
from forge_lightning.core.step_log import is_logging_step as is_logging_step
from forge_lightning.core.step_log import last_logged as last_logged
from forge_lightning.core.step_log import log_also_every as log_also_every
from forge_lightning.core.step_log import logged_at_this_step as logged_at_this_step
from forge_lightning.core.step_log import publish as publish
from forge_lightning.core.step_log import published as published
from forge_lightning.core.step_log import step_of_log as step_of_log

_FAULTS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Errors that files, figures and third-party loggers may raise while a report is written."""
_modules: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The module that each callback was last fitted with. Not kept in the callback, which may be pickled."""


class ForgeCallback(Callback):
    """Base of every callback of the suite.

    It names logged metrics, keeps a checkpoint key that survives a change of hyperparameters, and calls `on_step_end`
    once per optimizer step. It calls `detach` however a fit ends. A subclass that overrides one of Lightning's hooks
    below calls ``super()`` in it. `docs/write_a_callback.md` shows two subclasses.

    Args:
        name: Tells two instances of one class apart, in checkpoints and in metric names.
    """

    namespace: ClassVar[str]

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._said: set[str] = set()
        self._metric_names: dict[str, str] = {}
        self._step_before = -1  # optimizer steps when the batch at hand started
        self._in_fit = False

    def detach(self) -> None:
        """Undo what this callback did to Trainer and module. Called however a fit ends, perhaps several times."""

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """Called at the end of each batch with an optimizer step, with what ``training_step`` returned for it."""

    def preflight(self, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        """Refuse what cannot be trained, for `forge-fit check`: no data is read, and there is no Trainer.

        Raises:
            MisconfigurationException: If this callback cannot work with the two.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        earlier = _modules.get(self)
        if earlier is not None and earlier() is not pl_module:
            self.reset()
        _modules[self] = weakref.ref(pl_module)

    def reset(self) -> None:
        """Drop what was learned from one model. Called before another one is fitted with the same callback."""
        self._said.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forget_published(trainer)
        if self._in_fit:  # of a fit that ended without a word
            self.detach()
        self._in_fit, self._step_before = True, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restore_loaders(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step_before:  # otherwise gradients are being accumulated
            self.on_step_end(trainer, pl_module, outputs, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.detach()
        self._in_fit = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.detach()
        self._in_fit = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.detach()
        self._in_fit = False

    @property
    def state_key(self) -> str:
        # Hyperparameters stay out: a resume with another `lamb` must still find the EMA.
        return type(self).__name__ if self.name is None else f"{type(self).__name__}[{self.name}]"

    def metric_name(self, quantity: str) -> str:
        """``forge/<callback>/[<name>/]<quantity>``."""
        named = self._metric_names.get(quantity)
        if named is None:
            named = "/".join(part for part in ("forge", self.namespace, self.name, quantity) if part)
            self._metric_names[quantity] = named
        return named

    def log_metrics(self, trainer: Trainer, metrics: Mapping[str, float], monitor: bool = True) -> None:
        """Log at this optimizer step only, to every logger, and where `EarlyStopping(monitor=...)` looks.

        `LightningModule.log` would repeat a sparse value at every later logging step. Without ``monitor`` only to the
        loggers: at every step the other costs more.
        """
        named = {self.metric_name(quantity): float(value) for quantity, value in metrics.items()}
        log_at_this_step(trainer, named, monitor)

    def read_metric(self, trainer: Trainer, monitor: str, argument: str) -> Tensor:
        """The latest value logged as ``monitor``, by the module or by any callback.

        Raises:
            MisconfigurationException: If nothing was logged under that name, listing what was.
        """
        metrics = trainer.callback_metrics
        if monitor not in metrics:
            raise MisconfigurationException(
                f"`{type(self).__name__}({argument}={monitor!r})`: nothing logs this metric."
                f" Logged so far: {sorted(metrics)}."
                f" Log it in your module, give `{argument}` the name that you log, or add the callback that logs it."
            )
        return metrics[monitor]

    def warn_once(self, message: str, key: str | None = None) -> None:
        """Warn on rank 0, prefixed with the class name.

        Each distinct message is shown once; with a ``key``, one message of that key, whatever numbers it holds.
        """
        if (key or message) not in self._said:
            self._said.add(key or message)
            rank_zero_warn(f"{type(self).__name__}: {message}", stacklevel=5)  # the line that found it

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Turn a fault of what only reports into a warning: it must not end a fit that trained."""
        try:
            yield
        except _FAULTS as error:
            self.warn_once(f"{what} could not be written: {type(error).__name__}: {error}", key=what)

    def refuse(self, what: str, why: str, instead: str) -> MisconfigurationException:
        """The error for a trainer, module or wiring that this callback cannot serve; to be raised at start."""
        return MisconfigurationException(f"`{type(self).__name__}` cannot work with {what}: {why}. {instead}")


def uses_strategy(trainer: Trainer, *names: str) -> bool:
    """Whether the Trainer's strategy is of one of these classes, of ``lightning`` or ``pytorch_lightning``."""
    return is_a(trainer.strategy, *names)


def is_a(thing: Any, *names: str) -> bool:
    """Whether an object is of a class of Lightning's, by its name: both packages have one of it."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def overrides(thing: Any, method: str) -> bool:
    """Whether a module's or callback's class defines a method itself, not Lightning or torch for it."""
    found = getattr(type(thing), method, None)
    return found is not None and found.__module__.split(".")[0] not in ("lightning", "pytorch_lightning", "torch")


def restore_loaders(trainer: Trainer) -> None:
    """Restore the saved state of training loaders that Lightning made before it read the checkpoint.

    It does so if ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``, as for `OneCycleLR`, and then
    forgets the state: a resume inside an epoch would train on other batches.
    """
    fit_loop: Any = trainer.fit_loop
    if getattr(fit_loop, "_combined_loader_states_to_load", None):
        fit_loop._load_combined_loader_states()


def compute_metrics(trainer: Trainer) -> None:
    """Compute the metrics of the epoch on all ranks, before other exchanges between ranks at its end.

    A progress bar computes them on rank 0 alone, and their exchange would meet another one on the other ranks: both
    would wait for ever. What is computed is kept.
    """
    if trainer.world_size > 1:
        _ = trainer.callback_metrics


def run_directory(trainer: Trainer) -> Path | None:
    """Where the first logger writes; ``None`` without one. No collective, as ``trainer.log_dir`` is.

    Of a logger without a folder for each run, where Lightning puts its checkpoints.
    """
    logger = trainer.logger
    if logger is None or not (logger.log_dir or logger.save_dir):
        return None
    if logger.log_dir:
        return Path(logger.log_dir)
    parts = (logger.save_dir, logger.name, logger.version)
    return Path(*(str(part) for part in parts if part))


def events_of(callback: Callback) -> list[dict[str, Any]]:
    """The events that a callback has found; empty if its ``events`` are something else."""
    events: Any = callback.events if isinstance(callback, SupportsEvents) else ()
    if not isinstance(events, list | tuple):
        return []
    return [dict(event) for event in events if isinstance(event, Mapping) and {"kind", "step"} <= event.keys()]


def loss_of_step(trainer: Trainer, outputs: Any) -> Tensor | None:
    """The detached loss of one batch, as ``on_train_batch_end`` gets it; Lightning has divided it for accumulation.

    Without what callbacks and a head have added to it: that is no measure of the task.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        return None
    automatic = trainer.lightning_module.automatic_optimization
    own = own_loss(trainer.lightning_module) if automatic else None
    task = outputs.get(TASK_LOSS, own) if isinstance(outputs, Mapping) else own
    if isinstance(task, Tensor):
        return task.detach().float().mean()
    loss = loss.detach().float()
    scale = trainer.accumulate_grad_batches if automatic else 1
    return loss.mean() * scale if loss.ndim or scale > 1 else loss


def is_skipped(trainer: Trainer, outputs: Any) -> bool:
    """Whether ``training_step`` returned nothing for this batch, by which Lightning skips it.

    Under manual optimization that is the usual case, and means nothing.
    """
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and not isinstance(outputs, Tensor) and not outputs


class StepMeans:
    """Means over batches of what ``training_step`` returned: "loss", and "success" where it has ``example_success``.

    Kept on the device until they are read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, int]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._sums

    def add(self, trainer: Trainer, outputs: Any) -> None:
        """Take one batch, as ``on_train_batch_end`` gets it."""
        found = {"loss": loss_of_step(trainer, outputs)}
        success = outputs.get("example_success") if isinstance(outputs, Mapping) else None
        if isinstance(success, Tensor):
            found["success"] = success.detach().float().mean()
        for key, value in found.items():
            if value is not None:
                total, count = self._sums.get(key, (0.0, 0))
                self._sums[key] = (total + value, count + 1)

    def read(self, key: str) -> float:
        """The mean; NaN where nothing was returned."""
        total, count = self._sums.get(key, (math.nan, 1))
        return float(total) / count

    def clear(self) -> None:
        """Drop all sums."""
        self._sums = {}

    def state_dict(self) -> dict[str, list[float]]:
        return {key: [float(total), count] for key, (total, count) in self._sums.items()}

    def load_state_dict(self, states: Sequence[Mapping[str, Sequence[float]]]) -> None:
        """Restore from the states of all ranks. If the world size has changed, every rank gets the total."""
        rank, world_size = current_rank()
        if len(states) == world_size:
            states = [states[rank]]
        sums: dict[str, tuple[Any, int]] = {}
        for key, (total, count) in (item for state in states for item in state.items()):
            before, counted = sums.get(key, (0.0, 0))
            sums[key] = (before + total, counted + int(count))
        self._sums = sums
