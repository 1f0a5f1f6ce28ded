"""DreamReplay: train again on stored examples."""

import math
from functools import wraps
from typing import Any, ClassVar, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from forge_lightning.core.callback import ForgeCallback, is_dev_run, is_logging_step, published, uses_strategy
from forge_lightning.core.device import reads_are_free
from forge_lightning.core.distributed import broadcast_from_rank_zero, gather_states
from forge_lightning.core.hooks import compile_anew
from forge_lightning.core.logit_tap import find_network
from forge_lightning.core.loss_terms import add_loss_term, remove_loss_term
from forge_lightning.core.validate import require
from forge_lightning.dream.batch_rows import template_of
from forge_lightning.dream.buffer import STRATEGIES, Strategy
from forge_lightning.dream.measuring import measure_forgetting
from forge_lightning.dream.memory import ReplayMemory
from forge_lightning.dream.mixing import Mixing
from forge_lightning.dream.options import MOVED, BatchFields, Mix, ProgramReplay, Sleep, Storage
from forge_lightning.dream.program_rounds import ProgramRounds
from forge_lightning.dream.progress import Progress
from forge_lightning.dream.record import StepRecord
from forge_lightning.dream.scores import RowScores
from forge_lightning.dream.session import ReplayStep, Session, note_scores, refusing
from forge_lightning.dream.sleeping import Sleeping


def _explain_moved(init: Any) -> Any:
    """Have a constructor say where an argument went that it took before."""

    @wraps(init)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in MOVED.keys() & kwargs.keys():
            raise TypeError(f"`DreamReplay({name}=...)` is now `{MOVED[name]}`, from `forge_lightning.callbacks`.")
        init(self, *args, **kwargs)

    return explained


class DreamReplay(ForgeCallback):
    """Replay stored examples, mixed into batches or in extra steps, so that earlier tasks are not forgotten.

    Each training batch is offered to a `ReplayBuffer`: a fair sample of everything seen, and a frontier of examples
    that the model gets barely right or barely wrong. What was replayed is not stored as new.

    `Mix` appends stored examples to each batch, on its way to the module. Other callbacks see only the fresh examples
    of what ``training_step`` returns.

    `Sleep` makes optimizer steps on stored examples alone, in the strategy, on all ranks. The Trainer does not count
    them, they do not move the learning-rate schedule, they skip the module's ``optimizer_step`` and ``log``, and they
    have their own random generator. No other callback sees them, unless ``with_callbacks`` is set: Grokfast neither
    filters their gradients nor adds them to its average.

    Hook: ``training_step`` is wrapped while fitting, with `Mix` also the strategy's ``batch_to_device``; a sleep comes
    after all callbacks' ``on_train_batch_end``.

    Reads: batches that are a mapping or tuple of tensors ``(B, ...)``; from what ``training_step`` returns
    ``example_loss`` and ``example_success``, ``(B,)``, or else logits and labels; ``stage_monitor``.
    Changes: with `Mix` the batches, with `Sleep` the weights between steps; with ``distillation`` the loss of replayed
    examples. Batch statistics and metrics that ``training_step`` updates include replayed examples.
    Logs: at logging steps, by rank 0 about its own examples: ``forge/dream/stored`` (examples),
    ``forge/dream/frontier`` (of those near the threshold), ``forge/dream/share`` (of all compute so far, by entries of
    batches), ``forge/dream/replay_loss`` and ``forge/dream/replay_success`` (of examples replayed since the last log,
    NaN without any). Over all ranks, after a sleep, or every ``every_n_steps`` of `Mix`: ``forge/dream/probe_loss`` (of
    early examples, which their rank never replays) and ``forge/dream/forgetting`` (that minus its lowest so far); after
    a sleep also ``forge/dream/cycles`` and, of up to 64 stored examples, ``forge/dream/loss_before``,
    ``forge/dream/loss_after``, ``forge/dream/success_before`` and ``forge/dream/success_after``. These are measured
    with ``training_step`` in evaluation mode, and NaN under manual optimization. Where the loss of single examples is
    unknown, losses are means of what the step returned (``replay_loss`` only with `Sleep`), and successes NaN.
    With ``programs.augmenter`` also ``forge/dream/augmented`` (variants so far that passed) and ``forge/dream/yield``
    (their share of those made), with ``programs.temperatures`` ``forge/dream/sampled`` (programs written so far that
    passed and differ from the known answer) and ``forge/dream/sampled_yield`` (their share).

    Cost: the compute of the replayed examples, and 3 ms of CPU a step of a small model, 0.2 % of a GPT-2-small one. On
    an accelerator a step's examples are stored one step later, when they can be read without waiting for it.

    When to use: tasks, or kinds of data, follow one another, and the early ones must not be lost.

    When it does not help: where all tasks come all along, or the data come again every epoch, replay is more of the
    same. Where tasks follow one another it decides whether they are forgotten, and "uniform" is the best strategy:
    examples near the threshold are mostly the newest ones. Sleeps were never better than mixing. See
    `benchmarks/replay.md`.

    Args:
        schedule: When to replay: `Mix` or `Sleep`.
        strategy: How examples are drawn: "uniform", "balanced" over families, "near_threshold", "edge_cases" or
            "priority".
        distillation: Weight of a loss that keeps replayed examples to the logits they had when they were stored, for
            examples that were right then; 0 for none. Mean squared difference where all logits are stored, otherwise
            the divergence over the ``top_k`` largest with the rest as one class.
        top_k: Logits stored for each label, with ``distillation``.
        buffer: Limits of what is stored.
        programs: Replay new programs too. Default: no.
        fields: Which entries of a batch are what.
        probe_size: Examples on each rank, every fourth of the first ones, that are kept apart to measure forgetting; 0
            for none.
        stage_monitor: Logged metric that holds the number of the stage of training.
        seed: Random seed for what is stored and drawn.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is given that has moved to one of the option objects.
        MisconfigurationException: At start, under DeepSpeed and FSDP1, if ``distillation`` finds no network, or
            ``programs`` finds no source of problems, no sandbox, or sharded weights that are to write programs; at the
            first batch, if its examples cannot be stored.

    References:
        Chaudhry et al., `On Tiny Episodic Memories in Continual Learning <https://arxiv.org/abs/1902.10486>`_, 2019.
        Buzzega et al., `Dark Experience for General Continual Learning <https://arxiv.org/abs/2004.07211>`_, 2020.

    Example:
        >>> replay = DreamReplay(schedule=Sleep(every_n_steps=500, num_steps=20), buffer=Storage(capacity=2000))
        >>> replay.schedule.num_steps
        20
    """

    namespace: ClassVar[str] = "dream"
    moved_arguments: ClassVar[dict[str, str]] = MOVED

    @_explain_moved
    def __init__(
        self,
        schedule: Mix | Sleep = Mix(),
        strategy: Strategy = "uniform",
        distillation: float = 0.0,
        top_k: int = 32,
        buffer: Storage = Storage(),
        programs: ProgramReplay | None = None,
        fields: BatchFields = BatchFields(),
        probe_size: int = 64,
        stage_monitor: str = "forge/stage/number",
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        require("DreamReplay", isinstance(schedule, Mix | Sleep), "schedule", schedule, "`Mix(...)` or `Sleep(...)`")
        require("DreamReplay", strategy in STRATEGIES, "strategy", strategy, f"one of {list(STRATEGIES)}")
        require("DreamReplay", distillation >= 0, "distillation", distillation, "at least 0")
        require("DreamReplay", top_k >= 1, "top_k", top_k, "at least 1")
        require("DreamReplay", probe_size >= 0, "probe_size", probe_size, "at least 0")
        self.schedule, self.storage, self.fields = schedule, buffer, fields
        self.distillation, self.top_k, self.stage_monitor = distillation, top_k, stage_monitor
        self.memory = ReplayMemory(buffer, fields, strategy, probe_size, (programs or ProgramReplay).fraction, seed)
        """What is stored, on this rank."""
        self._rounds = None if programs is None else ProgramRounds(programs)
        self._progress = self._new_progress()
        self._restored: dict[str, Any] = {}
        self._session: Session | None = None
        self._mixing: Mixing | None = None
        self._sleeping: Sleeping | None = None
        self._last_in_line: _EndOfStep | None = None
        self._catch_up = False
        self._unread: StepRecord | None = None  # of the step before

    def _new_progress(self) -> Progress:
        return Progress(probe_closed=self.memory.probe_size == 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.schedule.is_off:
            return
        if uses_strategy(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
            raise self.refuse(
                type(trainer.strategy).__name__,
                "extra steps are not tested with it",
                "Use DDP, or `ModelParallelStrategy` (FSDP2).",
            )
        if self._rounds is not None and stage == "fit" and (reasons := self._rounds.why_not(trainer, pl_module)):
            raise self.refuse(*reasons)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.schedule.is_off:
            return
        if self._restored:
            self._unread = None
        self._settle()  # of an earlier fit
        if not self._progress.offered:
            self.memory.clear(trainer.global_rank)
            self._progress = self._new_progress()
            if self._rounds is not None:
                self._rounds.programs.clear()
        elif not self._restored:
            self._progress.fits += 1
        network, fields = None, self.fields
        try:
            network = find_network(pl_module, fields.network)
        except ValueError as error:
            if self.distillation or fields.network is not None:
                raise MisconfigurationException(f"`BatchFields(network={fields.network!r})`: {error}") from None
        scores = RowScores(network, fields.labels, fields.shift, fields.mask, fields.ignore_index)
        compile_anew()
        step = ReplayStep(trainer, scores, self.distillation, self.top_k, self.warn_once)
        self._session = Session(trainer, pl_module, self.memory, self._progress, step)
        self._catch_up = False
        if self._restored:
            self._take_restored(self._session)
        add_loss_term(pl_module, step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        session = self._session
        if session is None:
            return
        others = cast(list[Callback], trainer.callbacks)  # type: ignore[attr-defined]
        mixers = [
            other._session
            for other in others
            if isinstance(other, DreamReplay) and other._session is not None and isinstance(other.schedule, Mix)
        ]
        if len(mixers) > 1:
            raise self.refuse(
                "another `DreamReplay(schedule=Mix(...))`",
                "each would store what the other replays",
                "Raise `fraction`, or let one of them sleep.",
            )
        if mixers:
            session.step.appended = mixers[0].step.appended
        if isinstance(self.schedule, Mix):
            self._mixing = Mixing(session, self.schedule.fraction, self._catch_up_mixing)
        else:
            self._sleeping = Sleeping(session, self.schedule, self._settle, self._write_programs)
            steps = 0 if self.schedule.every_n_steps_by_stage else trainer.estimated_stepping_batches
            if 0 < steps < self.schedule.every_n_steps and not is_dev_run(trainer):
                self.warn_once(
                    f"every_n_steps={self.schedule.every_n_steps} is more than the run's {steps} steps: it will not"
                    " sleep."
                )
        self._last_in_line = _EndOfStep(self)
        vars(trainer)["callbacks"] = [*others, self._last_in_line]  # a new list: the Trainer is iterating over the old

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._catch_up and self._sleeping is not None:  # the checkpoint was written before a sleep, or within it
            self._catch_up = False
            self._sleep_if_due(trainer, template_of(batch), interruptible=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._session is not None:
            self._store(self._session)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._session is None:
            return
        self._progress.steps += 1
        if is_logging_step(trainer):
            self._log_step(trainer)

    def end_step(self, trainer: Trainer) -> None:
        """Sleep or measure, if it is due. Called after the hooks of all callbacks, so that a checkpoint of this step
        holds what is due.
        """
        template = None if self._session is None else self._session.step.template
        if trainer.global_step == self._step_before or template is None:
            return  # gradients are being accumulated, or nothing was trained on
        if self._sleeping is not None:
            self._sleep_if_due(trainer, template)
        else:
            self._measure_if_due(trainer, template)

    def detach(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        remove_loss_term(session.module, session.step)
        session.step.scores.detach()
        callbacks = cast(list[Callback], session.trainer.callbacks)  # type: ignore[attr-defined]
        vars(session.trainer)["callbacks"] = [c for c in callbacks if c is not self._last_in_line]
        if self._mixing is not None:
            self._mixing.detach()
        self._mixing = self._sleeping = self._last_in_line = None

    def _store(self, session: Session) -> None:
        """Count the replayed examples of the batch, and offer the fresh ones; on an accelerator a step later."""
        step, progress = session.step, self._progress
        outcome, draw, kept = step.outcome, step.drawn, step.kept
        step.clear()
        self._settle()
        if outcome is None:
            return
        fresh = step.num_fresh(len(outcome.losses))
        progress.size = max(progress.size, fresh)
        first = next(iter(outcome.rows.values()))
        progress.computed[0] += first[:fresh].numel()
        stored = None
        if step.appended.owner is step:
            progress.computed[1] += first[fresh:].numel()
            stored = None if draw is None else draw.stored
        may_wait = reads_are_free(first.device)
        self._unread = StepRecord.of(
            {name: tensor[:fresh] for name, tensor in outcome.rows.items()},
            outcome.losses,
            outcome.successes,
            kept,
            stored,
            self._stage(session.trainer),
            progress.steps,
            may_wait,
        )
        if may_wait:
            self._settle()

    def _settle(self) -> None:
        """Store the examples of the last step."""
        record, self._unread = self._unread, None
        if record is None:
            return
        rows, losses, successes, kept = record.read()
        fresh = len(next(iter(rows.values())))
        if record.stored is not None:
            note_scores(self.memory, self._progress, record.stored, losses[fresh:], successes[fresh:])
        with refusing():
            self.memory.admit(rows, losses[:fresh], successes[:fresh], kept, self._progress, record.stage, record.step)

    def _stage(self, trainer: Trainer) -> int:
        """Number of the stage of training; the last known one, or -1, where it is not logged."""
        value = published(trainer, self.stage_monitor)
        asks = reads_are_free(trainer.strategy.root_device) or not self.stage_monitor.startswith("forge/")
        if math.isnan(value) and asks:  # Lightning computes all metrics for it, and waits for those of its bar
            value = float(trainer.callback_metrics.get(self.stage_monitor, math.nan))
        return int(value) if math.isfinite(value) else -1 if self._progress.stage is None else self._progress.stage

    def _sleep_if_due(self, trainer: Trainer, template: Any, interruptible: bool = True) -> None:
        schedule, progress = cast(Sleep, self.schedule), self._progress
        interval = schedule.every_n_steps
        if schedule.every_n_steps_by_stage and not progress.remaining:
            stage = self._stage(trainer)  # the suite's own is the same on all ranks
            known = math.isfinite(published(trainer, self.stage_monitor))
            progress.stage = stage if known else broadcast_from_rank_zero(trainer, stage)
            interval = schedule.every_n_steps_by_stage.get(progress.stage or 0, interval)
        assert self._sleeping is not None
        metrics = self._sleeping.sleep_if_due(template, interval, interruptible)
        if metrics:
            self.log_metrics(trainer, {**metrics, **self._program_metrics(trainer)})

    def _catch_up_mixing(self, template: Any) -> None:
        """Before the first batch: what was due when the checkpoint was written."""
        if self._catch_up and self._session is not None:
            self._catch_up = False
            self._measure_if_due(self._session.trainer, template)

    def _measure_if_due(self, trainer: Trainer, template: Any) -> None:
        progress = self._progress
        due = progress.steps and progress.steps % self.schedule.every_n_steps == 0
        if is_dev_run(trainer) or (due and progress.steps != progress.last_sleep):
            assert self._session is not None
            progress.last_sleep = progress.steps
            self._settle()
            self._write_programs()
            forgetting = measure_forgetting(self._session, template)
            self.log_metrics(trainer, {**forgetting, **self._program_metrics(trainer)})

    def _write_programs(self) -> None:
        if self._rounds is not None and self._session is not None:
            self._rounds.run(self._session)

    def _program_metrics(self, trainer: Trainer) -> dict[str, float]:
        return {} if self._rounds is None else self._rounds.metrics(trainer)

    def _log_step(self, trainer: Trainer) -> None:
        loss, success = self._progress.take_replayed()
        fresh, replayed = self._progress.computed
        self.log_metrics(
            trainer,
            {
                "stored": float(len(self.memory.buffer)),
                "frontier": float(sum(self.memory.buffer.categories.values())),
                "share": replayed / max(1, fresh + replayed),
                "replay_loss": loss,
                "replay_success": success,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Collective: every rank has to call it."""
        if self.schedule.is_off:
            return {}
        return dict(self._restored) or {"ranks": gather_states(self._state_of_rank())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        if self._session is not None:  # some strategies restore after `on_fit_start`, others before
            self._take_restored(self._session)

    def _state_of_rank(self) -> dict[str, Any]:
        reader = None if self._session is None else self._session.step.scores.reader.state_dict()
        counters = self._progress.state_dict() | {"distilled": self._stored_with, "outputs": reader}
        if not self.storage.in_checkpoints:
            empty = {"remaining": 0, "offered": 0, "probe_closed": self.memory.probe_size == 0, "lowest": math.nan}
            return {"counters": counters | empty}
        programs = {} if self._rounds is None else {"programs": self._rounds.programs.state_dict()}
        unread = None if self._unread is None else self._unread.state_dict()
        return {"counters": counters, "unread": unread, **programs, **self.memory.state_dict()}

    @property
    def _stored_with(self) -> list[int]:
        """Whether logits are stored with each example, and how many."""
        return [1, self.top_k] if self.distillation else [0, 0]

    def _take_restored(self, session: Session) -> None:
        states, self._restored = self._restored.get("ranks", []), {}
        if not states:
            return
        trainer = session.trainer
        same_ranks = len(states) == trainer.world_size
        state = states[trainer.global_rank if same_ranks else 0]
        counters = state["counters"]
        stored_with, any_stored = counters["distilled"], any(len(s["buffer"]["slots"]) for s in states if "buffer" in s)
        if stored_with != self._stored_with and any_stored:
            how = f"with the logits of {stored_with[1]} classes" if stored_with[0] else "without logits"
            raise MisconfigurationException(
                f"`DreamReplay(distillation={self.distillation}, top_k={self.top_k})`: the checkpoint's examples were"
                f" stored {how}. Use the same settings, or leave `DreamReplay` out and start over."
            )
        self._progress.load_state_dict(counters)
        if counters.get("outputs") is not None:
            session.step.scores.reader.load_state_dict(counters["outputs"])
        if self._rounds is not None and "programs" in state:
            self._rounds.programs.load_state_dict(state["programs"])
        self.memory.load_state_dict(states, trainer.global_rank, trainer.world_size)
        unread = state.get("unread") if same_ranks else None  # with other ranks a batch of each is left out
        self._unread = None if unread is None else StepRecord.from_state(unread)
        self._catch_up = True
        self._progress.probe_closed |= not same_ranks and self._progress.offered > 0


class _EndOfStep(Callback):
    """Stands last in the list of callbacks while fitting."""

    def __init__(self, replay: DreamReplay) -> None:
        self._replay = replay

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._replay.end_step(trainer)
