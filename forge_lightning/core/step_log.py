"""Numbers that belong to one optimizer step: when they are logged, and what was."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from forge_lightning.core.metric_names import plain_metric

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_logged: WeakKeyDictionary[Any, dict[str, tuple[int, float]]] = WeakKeyDictionary()
_published: WeakKeyDictionary[Any, dict[str, float]] = WeakKeyDictionary()
_intervals: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
_muted: WeakSet[Any] = WeakSet()


def log_at_this_step(trainer: "Trainer", metrics: Mapping[str, float], monitor: bool = True) -> None:
    """Log at this optimizer step only, to every logger, and by default where `EarlyStopping` looks.

    `LightningModule.log` would repeat a sparse value at every later logging step.
    """
    if trainer in _muted:
        return
    step = step_of_log(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    if monitor:
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
    _logged.setdefault(trainer, {}).update({key: (step, value) for key, value in metrics.items()})


def publish(trainer: "Trainer", metrics: Mapping[str, float]) -> None:
    """Show numbers that are the same on all ranks where `EarlyStopping` looks, and to `published`."""
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
    _published.setdefault(trainer, {}).update(metrics)


def published(trainer: "Trainer", name: str) -> float:
    """What was published last in this fit under this full name, the same on all ranks; NaN without it.

    Asking Lightning for it makes it compute the metrics of all modules, and read those of the progress bar.
    """
    return _published.get(trainer, {}).get(name, math.nan)


def forget_published(trainer: "Trainer") -> None:
    """At the start of a fit: nothing of an earlier one counts."""
    _published.pop(trainer, None)


def step_of_log(trainer: "Trainer") -> int:
    """The step number under which Lightning's own monitors log."""
    step: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return step


def is_logging_step(trainer: "Trainer") -> bool:
    """Whether the coming or just finished optimizer step is one of ``log_every_n_steps``, or of `log_also_every`."""
    if trainer in _muted:
        return False
    every: Any = getattr(trainer, "log_every_n_steps", 1)
    step = step_of_log(trainer) + 1
    if step % max(1, every) == 0 or is_dev_run(trainer):
        return True
    return any(step % interval == 0 for interval in _intervals.get(trainer, ()))


@contextmanager
def muted(trainer: "Trainer", module: "LightningModule") -> Iterator[None]:
    """Meanwhile nothing is logged, neither by callbacks of the suite nor by the module: steps that are not counted."""
    was_muted = trainer in _muted
    before = {name: vars(module).get(name) for name in ("log", "log_dict")}
    _muted.add(trainer)
    module.log = module.log_dict = _nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(module, name)
            else:
                setattr(module, name, method)
        if not was_muted:
            _muted.discard(trainer)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def log_also_every(trainer: "Trainer", interval: int | None) -> None:
    """What one callback records at an interval of its own, the others log there too; ``None`` ends it."""
    if interval is None:
        _intervals.pop(trainer, None)
    else:
        _intervals.setdefault(trainer, set()).add(interval)


def is_dev_run(trainer: "Trainer") -> bool:
    """Whether this is a `fast_dev_run`, which leaves nothing on disk."""
    return bool(getattr(trainer, "fast_dev_run", False))


def logged_at_this_step(trainer: "Trainer") -> dict[str, float]:
    """What callbacks of the suite logged at the step that is being finished, by full name."""
    step = step_of_log(trainer)
    return {key: value for key, (at, value) in _logged.get(trainer, {}).items() if at == step}


def last_logged(trainer: "Trainer", *names: str) -> float:
    """The value that callbacks of the suite logged last under the first of these full names; NaN without one.

    Instances with a ``name`` count as those without.
    """
    logged = _logged.get(trainer, {})
    for name in names:
        found = [entry for key, entry in logged.items() if plain_metric(key) == name]
        if found:
            return max(found, key=lambda entry: entry[0])[1]
    return math.nan
