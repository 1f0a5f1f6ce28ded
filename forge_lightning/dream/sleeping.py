"""Make optimizer steps on stored examples alone, between two steps of training."""

from collections.abc import Callable, Mapping
from typing import Any

from forge_lightning.core.callback import is_dev_run
from forge_lightning.core.distributed import max_over_ranks, min_over_ranks
from forge_lightning.core.protocols import SupportsInterrupt
from forge_lightning.dream.extra_steps import apart, extra_step, idle_parameters, scaled_lr
from forge_lightning.dream.measuring import measure, measure_forgetting
from forge_lightning.dream.memory import SEED_STEP
from forge_lightning.dream.options import Sleep
from forge_lightning.dream.session import Session, refusing


class Sleeping:
    """Sleeps of one fit.

    Args:
        session: The fit.
        schedule: When, how long and how.
        settle: Stores the examples of steps that were not read yet, before each sleep.
        write_programs: Stores new programs, before each sleep.
    """

    def __init__(
        self, session: Session, schedule: Sleep, settle: Callable[[], None], write_programs: Callable[[], None]
    ) -> None:
        self._session, self._schedule = session, schedule
        self._settle, self._write_programs = settle, write_programs

    def sleep_if_due(self, template: Any, every_n_steps: int, interruptible: bool = True) -> Mapping[str, float]:
        """Sleep, or finish a sleep that a checkpoint cut short.

        Args:
            template: A batch without examples.
            every_n_steps: Optimizer steps between sleeps; 0 for no sleep.
            interruptible: Whether other callbacks may end the run between two steps of the sleep.

        Returns:
            Numbers to log; empty where no sleep was due.
        """
        session, progress, memory = self._session, self._session.progress, self._session.memory
        trainer, size = session.trainer, self._schedule.batch_size
        if not progress.remaining:
            due = is_dev_run(trainer) or (every_n_steps and progress.steps - progress.last_sleep >= every_n_steps)
            if due:
                self._settle()
            if not due or min_over_ranks(trainer, len(memory.buffer)) == 0:
                return {}
            self._write_programs()
            progress.last_sleep, progress.most_rows = progress.steps, max_over_ranks(trainer, progress.size)
            progress.remaining = 1 if is_dev_run(trainer) else self._schedule.num_steps
            memory.watch()
            progress.before = measure(session, template, memory.watched, size)
        while progress.remaining:
            self._step(template)
            progress.remaining -= 1
            callbacks: list[Any] = trainer.callbacks if progress.remaining and interruptible else []  # type: ignore[attr-defined]
            for callback in callbacks:
                if isinstance(callback, SupportsInterrupt):
                    callback.stop_if_asked(trainer)
        after = measure(session, template, memory.watched, size)
        progress.cycles += 1
        metrics = {"loss_before": progress.before[0], "success_before": progress.before[1]}
        metrics |= {"loss_after": after[0], "success_after": after[1], "cycles": float(progress.cycles)}
        return metrics | dict(measure_forgetting(session, template, size))

    def _step(self, template: Any) -> None:
        session, schedule, step, progress = self._session, self._schedule, self._session.step, self._session.progress
        trainer = session.trainer
        progress.extra_steps += 1
        with refusing():
            draw = session.memory.draw(schedule.batch_size or progress.most_rows, progress)
        step.drawn = draw
        seed = (session.memory.seed * SEED_STEP + progress.extra_steps) * SEED_STEP + trainer.global_rank
        asleep = apart(trainer, session.module, step, seed % (1 << 63), schedule.with_callbacks)
        appended, step.appended.count = step.appended.count, 0
        step.activity = "sleeping"
        step.idle = [] if schedule.with_callbacks else idle_parameters(trainer, session.module)
        try:
            with asleep, scaled_lr(trainer.optimizers, schedule.lr_scale):
                extra_step(trainer, session.module, session.to_batch(template, draw.rows), step.leave_out)
        finally:
            step.activity, step.appended.count, step.idle = "training", appended, []
        if step.outcome is not None:
            entries = next(iter(draw.rows.values())).numel()
            session.note_replayed(draw, entries, step.outcome.losses, step.outcome.successes)
            if draw.stored is not None and step.mean is not None and not draw.num_programs:
                progress.replayed[0] += float(step.mean) * len(draw.stored)
                progress.replayed[1] += len(draw.stored)
        step.clear()
