"""Append stored examples to training batches on their way to the module."""

from collections.abc import Callable
from typing import Any

from forge_lightning.dream.batch_rows import rows_of, template_of, with_rows
from forge_lightning.dream.session import Session, refusing

_METHOD = "batch_to_device"


class Mixing:
    """Wraps the strategy's ``batch_to_device`` while a fit runs.

    Args:
        session: The fit.
        fraction: Share of replayed examples in a batch.
        before_first: Called with a batch without examples, before the first batch is mixed.
    """

    def __init__(self, session: Session, fraction: float, before_first: Callable[[Any], None]) -> None:
        self._session, self._fraction, self._before_first = session, fraction, before_first
        self._is_first, self._attached = True, True
        self._attributes = vars(session.trainer.strategy)
        self._replaced = self._attributes.get(_METHOD)
        self._inner = session.trainer.strategy.batch_to_device
        self._attributes[_METHOD] = self._wrapper = self._to_device
        session.step.appended.owner = session.step

    def detach(self) -> None:
        """Put back what was there. If other code has wrapped the method since, it stays, and passes batches through."""
        self._attached = False
        if self._attributes.get(_METHOD) is self._wrapper:
            del self._attributes[_METHOD]
            if self._replaced is not None:
                self._attributes[_METHOD] = self._replaced

    def _to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        moved = self._inner(batch, *args, **kwargs)
        session, trainer = self._session, self._session.trainer
        if moved is None or not self._attached or not trainer.training or trainer.sanity_checking:
            return moved
        progress_of_loop = trainer.fit_loop.epoch_loop.batch_progress.current
        if progress_of_loop.ready != progress_of_loop.completed:
            return moved  # another batch, moved by other code in the middle of a step
        appended, memory, progress = session.step.appended, session.memory, session.progress
        appended.count, session.step.drawn = 0, None
        with refusing():
            rows = rows_of(moved)
        if self._is_first:
            self._is_first = False
            self._before_first(template_of(moved))
        if len(memory.buffer) == 0:
            return moved
        progress.carry += len(next(iter(rows.values()))) * self._fraction / (1 - self._fraction)
        count = int(progress.carry)
        progress.carry -= count
        if count == 0:
            return moved
        with refusing():
            session.step.drawn = draw = memory.draw(count, progress)
            appended.count = len(next(iter(draw.rows.values())))
            return with_rows(moved, memory.buffer.joined(rows, draw.rows))
