"""DreamReplay: training again on what was trained on before."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from forge_lightning.core.batch import LABEL_NAMES
from forge_lightning.core.callback import (
    ForgeCallback,
    is_dev_run,
    is_logging_step,
    loss_of_step,
    of_all_processes,
    uses_strategy,
)
from forge_lightning.core.logit_tap import find_network
from forge_lightning.core.loss_terms import add_loss_term, remove_loss_term
from forge_lightning.core.protocols import SupportsAugmentation, SupportsGenerate, SupportsInterrupt
from forge_lightning.core.tokens import IGNORED
from forge_lightning.dream.augmenter import DreamAugmenter
from forge_lightning.dream.batch_rows import joined, rows_of, template_of, with_rows
from forge_lightning.dream.buffer import STRATEGIES, Replay, ReplayBuffer, Strategy
from forge_lightning.dream.code_augmentation import CodeExample
from forge_lightning.dream.extra_steps import apart, extra_evaluation, extra_step, scaled_lr
from forge_lightning.dream.programs import ProgramDreams
from forge_lightning.dream.scores import KEPT, RowScores
from forge_lightning.sandbox import Sandbox, SandboxError, Task, Verdict

_COUNTERS = (
    *("steps", "last_sleep", "remaining", "cycles", "extra_steps", "carry", "dream_carry", "size", "most_rows"),
    *("offered", "probe_closed", "computed", "before", "lowest", "stage", "replayed", "fits"),
)
"""What is saved beside the rows, each an attribute with an underscore."""
_NUM_WATCHED = 64  # stored rows that are measured before and after a sleep
_NUM_DREAMS = 2048
_SEED_STEP = 1_000_003


class DreamReplay(ForgeCallback):
    """Train again on examples of earlier batches, so that they are not forgotten and hard ones are met more often.

    What was trained on goes into a `ReplayBuffer`: a fair sample of everything, and a frontier of what the model gets
    barely right or barely wrong. "mix" appends rows of it to each batch, on the way to the module; other callbacks see
    of what ``training_step`` returns only the fresh rows. "cycle" sleeps: every ``every_n_steps`` optimizer steps it
    makes ``num_steps`` more on stored rows alone, in the strategy, on all processes. The Trainer does not count the
    steps of a sleep; they do not move the learning-rate schedule, leave out the module's ``optimizer_step`` and
    ``log``, and draw from random numbers of their own. Unless ``with_callbacks`` is set, no other callback sees them:
    Grokfast's filter neither acts on them nor takes them up. What was replayed is not stored as new.

    Hook: ``training_step`` is wrapped while fitting, with "mix" also the strategy's ``batch_to_device``; a sleep comes
    after all callbacks' ``on_train_batch_end``.

    Reads: batches that are a mapping or tuple of tensors ``(B, ...)``; in what ``training_step`` returns
    ``example_loss`` and ``example_success``, ``(B,)``, or else logits and labels; ``stage_monitor`` with
    ``every_n_steps_by_stage``.
    Changes: with "mix" the batches, with "cycle" the weights between steps; with ``distillation`` the loss of replayed
    rows. Batch statistics and metrics that ``training_step`` updates see replayed rows.
    Logs: at logging steps, of one process, ``forge/dream/stored`` (rows), ``forge/dream/frontier`` (of those near the
    threshold), ``forge/dream/share`` (of all compute so far, by entries of batches), ``forge/dream/replay_loss`` and
    ``forge/dream/replay_success`` (of rows replayed since, NaN without any). Of all processes, after a sleep, and with
    "mix" every ``every_n_steps``, ``forge/dream/probe_loss`` (of early examples, which are never replayed) and
    ``forge/dream/forgetting`` (that minus its lowest so far); with "cycle" also ``forge/dream/cycles`` and, of up to 64
    stored rows, ``forge/dream/loss_before``, ``forge/dream/loss_after``, ``forge/dream/success_before`` and
    ``forge/dream/success_after``. Measured in evaluation mode, with ``training_step``; NaN under manual optimization.
    Where nothing tells how single examples do, losses are means of what the step returned (``replay_loss`` only with
    "cycle"), and successes NaN.
    With ``augmenter`` also ``forge/dream/augmented`` (variants so far that held when they were run) and
    ``forge/dream/yield`` (share of those made that did), with ``temperatures`` ``forge/dream/sampled`` (programs of the
    model's own so far that passed, and are not what it was taught) and ``forge/dream/sampled_yield`` (their share).

    Cost: the replayed rows' own compute, and 3 ms of CPU a step of a small model, 0.1 % of a GPT-2-small one.

    When to use: tasks, or kinds of data, follow one another, and the early ones must not be lost.

    When it does not help: where all tasks come all along, or the data come again every epoch, replay is more of the
    same. Where tasks follow one another it is the difference between forgetting and not, and "uniform" is the strategy:
    what is near the threshold is mostly what came last. Sleeps were never better than mixing. See
    `benchmarks/replay.md`.

    Args:
        mode: "mix" or "cycle".
        every_n_steps: Optimizer steps between sleeps; with "mix" between measurements.
        num_steps: Optimizer steps of a sleep; 0 turns "cycle" off.
        fraction: With "mix", share of replayed rows in a batch, in [0, 1), on top of it: with 0.2, 8 behind each 32. 0
            turns it off. What the module logs of a batch is of all its rows.
        strategy: How rows are drawn: "uniform", "balanced" over families, "near_threshold", "edge_cases" or "priority".
        capacity: Rows stored at most, on each process.
        frontier: Share of the capacity for what is near the threshold, in [0, 1).
        max_bytes: Memory of stored rows at most, on each process, with about 400 bytes of bookkeeping for each.
        memory_map: Folder for a file that holds the rows, in place of memory.
        batch_size: Rows of a step in a sleep. Default: as in training.
        distillation: Weight of keeping to the logits that a row had when it was stored, for rows that were right then;
            0 for none. Mean squared difference where all logits are stored, otherwise the divergence over the
            ``top_k`` largest and the rest as one.
        top_k: Logits stored for each label, with ``distillation``.
        lr_scale: Learning rates in a sleep, as a multiple.
        with_callbacks: Let other callbacks' hooks of backward pass and optimizer step, and their loss terms, take part
            in a sleep: Grokfast then filters its gradients too. Logged is nothing of it.
        augmenter: Makes variants of stored programs that are near the threshold, before each sleep, or with "mix" every
            ``every_n_steps``; each is run in a sandbox before it is stored. Needs `CodeTasks` or `GeneratedTasks`, or a
            datamodule with ``problem_of`` and ``row_of``. Default: none.
        temperatures: Have the model write programs for the same problems itself, one at each of these temperatures, and
            store those that pass their tests in the sandbox. Their prompts are the problems' own.
        max_new_tokens: Tokens of such a program at most.
        augmented_fraction: Share of the replayed rows that are variants or such programs, in [0, 1], once there are
            some.
        problems_per_cycle: Programs to make variants of each time, on each process.
        timeout: Seconds that a program may run.
        allow_weaker: Run programs also where the system lacks a protection. Only for data that you trust.
        probe_size: Examples of each process, every fourth of the first ones, that are kept apart to measure forgetting;
            0 for none.
        every_n_steps_by_stage: With "cycle", another ``every_n_steps`` for stages of training, by number; 0: no sleep.
        stage_monitor: Logged metric that holds the stage's number.
        family: Key or position in the batch of whole numbers that tell families apart, which share the reservoir alike;
            "auto" for "family", "arm" or "level"; ``None`` for one family.
        sample_id: Key or position of numbers that tell examples apart; "auto" for "sample_id", otherwise their
            content does; ``None`` for content. Where the same callback is used for another fit, an example whose number
            is known from an earlier one is the same only if its content is.
        labels: Key or position of the labels; "auto" for the usual names, or the last of a tuple; of a causal language
            model whose batch has none of these, the tokens of "input_ids" that ``mask`` calls real.
        mask: Key of the attention mask: rows are stored up to its last 1.
        network: Name of the part that puts out logits. Default: the only part with parameters, or "model", "net",
            "network".
        shift: Whether the label of a position is what the position before it predicts. Default: true for causal
            language models of Hugging Face, else false.
        ignore_index: Label that the loss ignores, beside -100 and a number that is no class, as -1 or 255: 0 where that
            is padding.
        save_buffer: Keep stored rows in checkpoints. Otherwise a resumed run begins with an empty buffer.
        seed: Of what is stored and drawn.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, under DeepSpeed and FSDP1, if ``distillation`` finds no network, or
            ``augmenter`` or ``temperatures`` no programs or no sandbox, or sharded weights are to write some; at the
            first batch, if its rows cannot be stored.

    References:
        Chaudhry et al., `On Tiny Episodic Memories in Continual Learning <https://arxiv.org/abs/1902.10486>`_, 2019.
        Buzzega et al., `Dark Experience for General Continual Learning <https://arxiv.org/abs/2004.07211>`_, 2020.
    """

    namespace: ClassVar[str] = "dream"

    def __init__(
        self,
        mode: Literal["mix", "cycle"] = "mix",
        every_n_steps: int = 1000,
        num_steps: int = 50,
        fraction: float = 0.2,
        strategy: Strategy = "uniform",
        capacity: int = 10_000,
        frontier: float = 0.3,
        max_bytes: int = 1 << 30,
        memory_map: str | None = None,
        batch_size: int | None = None,
        distillation: float = 0.0,
        top_k: int = 32,
        lr_scale: float = 1.0,
        with_callbacks: bool = False,
        augmenter: DreamAugmenter | None = None,
        temperatures: Sequence[float] = (),
        max_new_tokens: int = 128,
        augmented_fraction: float = 0.5,
        problems_per_cycle: int = 16,
        timeout: float = 2.0,
        allow_weaker: bool = False,
        probe_size: int = 64,
        every_n_steps_by_stage: dict[int, int] | None = None,
        stage_monitor: str = "forge/stage/number",
        family: str | int | None = "auto",
        sample_id: str | int | None = "auto",
        labels: str | int | None = "auto",
        mask: str | None = "attention_mask",
        network: str | None = None,
        shift: bool | None = None,
        ignore_index: int | None = None,
        save_buffer: bool = True,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name)

        def require(ok: bool, argument: str, value: object, allowed: str) -> None:
            if not ok:
                raise ValueError(f"`DreamReplay({argument}={value!r})` must be {allowed}.")

        require(mode in ("mix", "cycle"), "mode", mode, "'mix' or 'cycle'")
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "at least 1")
        require(num_steps >= 0, "num_steps", num_steps, "at least 0")
        require(0 <= fraction < 1, "fraction", fraction, "in [0, 1)")
        require(strategy in STRATEGIES, "strategy", strategy, f"one of {list(STRATEGIES)}")
        require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(distillation >= 0, "distillation", distillation, "at least 0")
        require(top_k >= 1, "top_k", top_k, "at least 1")
        require(lr_scale > 0, "lr_scale", lr_scale, "above 0")
        require(all(t > 0 for t in temperatures), "temperatures", temperatures, "above 0 each")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        require(0 <= augmented_fraction <= 1, "augmented_fraction", augmented_fraction, "in [0, 1]")
        require(problems_per_cycle >= 1, "problems_per_cycle", problems_per_cycle, "at least 1")
        require(timeout > 0, "timeout", timeout, "above 0")
        require(probe_size >= 0, "probe_size", probe_size, "at least 0")
        by_stage = dict(every_n_steps_by_stage or {})
        require(all(n >= 0 for n in by_stage.values()), "every_n_steps_by_stage", by_stage, "at least 0 each")
        if by_stage and mode == "mix":
            raise ValueError("`DreamReplay(every_n_steps_by_stage=...)` goes with mode='cycle': 'mix' has no sleep.")
        filled = LABEL_NAMES if labels == "auto" else (str(labels),)
        label_pad = IGNORED if ignore_index is None else ignore_index
        self._new_buffer = partial(ReplayBuffer, mask=mask, labels=filled, label_pad=label_pad, owner="DreamReplay")
        self._new_main = partial(self._new_buffer, capacity, frontier, max_bytes, memory_map=memory_map)
        self._new_main(memory_map=None)  # refuses bad arguments here, where they were written
        self.mode, self.every_n_steps, self.num_steps, self.fraction = mode, every_n_steps, num_steps, fraction
        self.strategy, self.batch_size, self.lr_scale = strategy, batch_size, lr_scale
        self.distillation, self.top_k, self.with_callbacks = distillation, top_k, with_callbacks
        self.augmenter, self.temperatures, self.augmented_fraction = augmenter, list(temperatures), augmented_fraction
        self._programs = ProgramDreams(augmenter, temperatures, max_new_tokens)
        self.problems_per_cycle, self.timeout, self.allow_weaker = problems_per_cycle, timeout, allow_weaker
        self.probe_size, self.every_n_steps_by_stage, self.stage_monitor = probe_size, by_stage, stage_monitor
        self.family, self.sample_id, self.labels, self.mask = family, sample_id, labels, mask
        self.network, self.shift, self.save_buffer, self.seed = network, shift, save_buffer, seed
        self.ignore_index = ignore_index
        self._off = fraction == 0 if mode == "mix" else num_steps == 0
        self._restored: dict[str, Any] = {}
        self._trainer: Trainer | None = None
        self._scores: RowScores | None = None
        self._after: _AfterAll | None = None
        self._to_device: Any = None
        self._clear()

    def _clear(self, rank: int = 0) -> None:
        seed = self.seed * _SEED_STEP + rank
        self.buffer = self._new_main(seed=seed)
        """What is stored, on this process."""
        self.probe = self._new_buffer(max(1, self.probe_size), 0.0, seed=seed)
        """The first examples, on this process."""
        self.dreams = self._new_buffer(_NUM_DREAMS, 0.0, seed=seed)
        """Variants of programs, on this process."""
        self._watched = self._new_buffer(_NUM_WATCHED, 0.0, seed=seed)
        self._programs.clear()
        self._steps, self._last_sleep, self._remaining, self._cycles, self._extra_steps = 0, 0, 0, 0, 0
        self._carry, self._dream_carry, self._size = 0.0, 0.0, 0
        self._most_rows = 1  # of a batch, on any process, when the sleep began
        self._offered, self._probe_closed = 0, self.probe_size == 0
        self._fits = 0  # earlier ones, whose rows are kept
        self._computed = [0, 0]  # entries of batches: fresh, replayed
        self._before = [math.nan, math.nan]
        self._lowest = math.nan
        self._stage: int | None = None
        self._replayed = [0.0] * 4  # since the last log: sum and number of losses, of successes
        self._begin_fit()

    def _begin_fit(self) -> None:
        self._forget_step()
        self._measuring = self._dreaming = False
        self._appended = 0  # rows that were put behind those of the batch at hand
        self._mixer: DreamReplay | None = None
        self._kind: Any = None  # of batches, without rows
        self._told = False  # that nothing tells how rows do
        self._step_before, self._check_at_start = -1, False

    def _forget_step(self) -> None:
        self._batch: Any = None
        self._drawn: Replay | None = None  # rows of the batch that are replayed: its last ones
        self._num_dreams = 0  # variants in front of them
        self._outcome: tuple[dict[str, Tensor], Tensor, Tensor] | None = None  # rows, losses, successes
        self._mean: Tensor | None = None  # loss of the step, where nothing tells those of rows
        self._logits: list[list[Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self._off and uses_strategy(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
            raise self.refuse(
                type(trainer.strategy).__name__,
                "steps between steps are not tried there",
                "Use DDP, or `ModelParallelStrategy` (FSDP2).",
            )
        if self._off or not self._programs.is_on or stage != "fit":
            return
        if self.temperatures and not isinstance(pl_module, SupportsGenerate):
            raise self.refuse(type(pl_module).__name__, "it has no method `complete(prompts, ...)`", "Use ForgeModule.")
        if self.temperatures and uses_strategy(trainer, "ModelParallelStrategy"):
            raise self.refuse(
                "`temperatures` and sharded weights",
                "the processes would generate out of step",
                "Leave `temperatures` out.",
            )
        if _source_of_programs(trainer, pl_module) is None:
            raise self.refuse(
                "`augmenter` or `temperatures` and this data",
                "neither datamodule nor module has `problem_of` and `row_of`, which say what program a row is of",
                "Use CodeTasks, or leave them out.",
            )
        try:
            with self._sandbox():
                pass
        except SandboxError as error:
            raise MisconfigurationException(f"`DreamReplay`: {error}") from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)
        if self._off:
            return
        if not self._offered:
            self._clear(trainer.global_rank)
        elif not self._restored:
            self._fits += 1
        self._begin_fit()
        self._trainer = trainer
        network = None
        try:
            network = find_network(pl_module, self.network)
        except ValueError as error:
            if self.distillation or self.network is not None:
                raise MisconfigurationException(f"`DreamReplay(network={self.network!r})`: {error}") from None
        self._scores = RowScores(network, self.labels, self.shift, self.mask, self.ignore_index)
        if self._restored:
            self._take_restored()
        add_loss_term(pl_module, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._off:
            return
        mixers = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, DreamReplay) and callback.mode == "mix" and not callback._off
        ]
        if len(mixers) > 1:
            raise self.refuse(
                "another `DreamReplay(mode='mix')`",
                "each would store what the other replays",
                "Raise `fraction`, or let one of them sleep.",
            )
        self._mixer = mixers[0] if mixers else None
        steps = trainer.estimated_stepping_batches if self.mode == "cycle" and not self.every_n_steps_by_stage else 0
        if 0 < steps < self.every_n_steps and not is_dev_run(trainer):
            self.warn_once(
                f"every_n_steps={self.every_n_steps} is more than the run's {steps} steps: it will not sleep."
            )
        # A new list, because the trainer is walking the old one.
        self._after = _AfterAll(self._after_step)
        vars(trainer)["callbacks"] = [*trainer.callbacks, self._after]  # type: ignore[attr-defined]
        if self.mode == "mix":
            strategy: Any = trainer.strategy
            self._to_device = strategy.batch_to_device
            strategy.batch_to_device = self._mixed

    def _mixed(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the strategy's ``batch_to_device``."""
        moved = self._to_device(batch, *args, **kwargs)
        trainer = self._trainer
        if moved is None or trainer is None or not trainer.training or trainer.sanity_checking:
            return moved
        at = trainer.fit_loop.epoch_loop.batch_progress.current
        if at.ready != at.completed:
            return moved  # somebody else's batch, in the middle of a step
        self._appended, self._drawn, self._num_dreams = 0, None, 0
        rows = self._rows_of(moved)
        if self._check_at_start:  # the checkpoint was written before what was due then
            self._check_at_start = False
            self._measure_if_due(trainer, trainer.lightning_module, template_of(moved))
        if len(self.buffer) == 0:
            return moved
        self._carry += len(next(iter(rows.values()))) * self.fraction / (1 - self.fraction)
        count = int(self._carry)
        self._carry -= count
        if count == 0:
            return moved
        more = self._draw(count)
        self._appended = len(next(iter(more.values())))
        return with_rows(moved, self._joined(rows, more))

    def _draw(self, count: int) -> dict[str, Tensor]:
        """Rows to replay: first variants, then stored ones."""
        if len(self.dreams):
            self._dream_carry += count * self.augmented_fraction
        wanted = min(count, int(self._dream_carry))
        self._dream_carry -= wanted
        dreams = self.dreams.sample(wanted, "uniform") if wanted else None
        self._num_dreams = 0 if dreams is None else len(dreams)
        if self._num_dreams < count:
            self._drawn = self.buffer.sample(count - self._num_dreams, self.strategy)
        parts = [part.rows for part in (dreams, self._drawn) if part is not None]
        return parts[0] if len(parts) == 1 else self._joined(*parts)

    def begin(self, batch: Any) -> None:
        """Called by the wrapped training step."""
        if self._batch is None:  # not after a backward pass inside the step
            rows = self._rows_of(batch)
            self._batch, self._kind = with_rows(batch, rows), template_of(batch)  # what the step takes out stays
            self._outcome = None
            assert self._scores is not None
            self._scores.begin(self._batch)

    def added(self, loss: Tensor) -> Tensor | None:
        """Called by the wrapped training step."""
        assert self._scores is not None
        try:
            new = self._scores.take(loss.detach())
        except ValueError as error:
            self._cannot_score(error)
            return None
        if not new or not self.distillation or self._measuring or self._drawn is None:
            return None
        distance = self._scores.distance(self._drawn.extras, len(self._drawn))
        return None if distance is None else self.distillation * distance

    def returned(self, outputs: Any) -> Any:
        """Called by the wrapped training step."""
        assert self._scores is not None
        assert self._trainer is not None
        skipped = outputs is None and self._trainer.lightning_module.automatic_optimization
        if skipped and not self._scores.has_logits:
            return outputs
        rows = self._rows_of(self._batch)
        count = len(next(iter(rows.values())))
        losses = successes = torch.full((count,), torch.nan)
        try:
            losses, successes = self._scores.read(outputs, count)
        except ValueError as error:
            self._cannot_score(error)
        self._outcome = (rows, losses, successes)
        asked = self._measuring or self._dreaming
        self._mean = loss_of_step(self._trainer, outputs) if asked and losses.isnan().all() else None
        fresh = self._fresh(count)
        if self.distillation and fresh and not self._measuring:
            try:
                self._logits = self._scores.logits_to_keep(successes.eq(1), self.top_k)
            except ValueError as error:
                self._cannot_score(error)
        if fresh == count or self is not self._mixer or not isinstance(outputs, Mapping):
            return outputs

        def cut(value: Any) -> Any:
            return value[:fresh] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

        return {key: cut(value) for key, value in outputs.items()}

    def _fresh(self, count: int) -> int:
        """Rows of a batch that are not replayed, by whomever."""
        if self._dreaming:
            return 0
        return count if self._mixer is None else count - self._mixer._appended

    def end(self) -> None:
        """Called by the wrapped training step."""
        self._batch = None
        if self._scores is not None:
            self._scores.end()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step
        if self._check_at_start:  # the checkpoint was written before a sleep, or within it
            self._check_at_start = False
            self._sleep_if_due(trainer, pl_module, template_of(batch), interruptible=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._off:
            return
        self._store(trainer)
        if trainer.global_step == self._step_before:
            return
        self._steps += 1
        if is_logging_step(trainer):
            self._log_step(trainer, pl_module)

    def _after_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """After all callbacks' ``on_train_batch_end``, also those that write checkpoints: these hold what is due."""
        if trainer.global_step == self._step_before or self._kind is None:
            return  # gradients are being accumulated, or nothing was trained on
        if self.mode == "cycle":
            self._sleep_if_due(trainer, pl_module, self._kind)
        else:
            self._measure_if_due(trainer, pl_module, self._kind)

    def _measure_if_due(self, trainer: Trainer, pl_module: LightningModule, template: Any) -> None:
        """What "mix" does every so often."""
        due = self._steps and self._steps % self.every_n_steps == 0 and self._steps != self._last_sleep
        if due or is_dev_run(trainer):
            self._last_sleep = self._steps
            self._augment(trainer, pl_module)
            self.log_metrics(trainer, self._probed(trainer, pl_module, template) | self._yields(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Collective where there are several processes: call it on every one."""
        if self._off:
            return {}
        return dict(self._restored) or {"ranks": of_all_processes(self._own_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        if self._trainer is not None:  # some strategies restore after `on_fit_start`, others before
            self._take_restored()

    # What is stored.

    def _rows_of(self, batch: Any) -> dict[str, Tensor]:
        try:
            return rows_of(batch)
        except ValueError as error:
            raise MisconfigurationException(f"`DreamReplay`: {error}") from None

    def _joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            known = self.buffer
            return joined(first, second, known.pads, known.sequences, known.padded_at_front)
        except ValueError as error:
            raise MisconfigurationException(f"`DreamReplay`: {error}") from None

    def _store(self, trainer: Trainer) -> None:
        """Admit the batch's fresh rows, and take note of how the replayed ones did."""
        outcome, drawn, logits = self._outcome, self._drawn, self._logits
        self._forget_step()
        if outcome is None:
            return
        rows, losses, successes = outcome
        fresh = self._fresh(len(losses))
        self._size = max(self._size, fresh)
        first = next(iter(rows.values()))
        self._computed[0] += first[:fresh].numel()
        if self is self._mixer:
            self._note_replay(drawn, first[fresh:].numel(), losses[fresh:], successes[fresh:])
        numbers = {
            "sample_id": self._numbers("sample_id", rows, ("sample_id",)),
            "family": self._numbers("family", rows, ("family", "arm", "level")),
        }
        extras = {name: [each[i] for each in logits[:fresh]] for i, name in enumerate(KEPT)} if logits else {}
        kept = {name: tensor[:fresh] for name, tensor in rows.items()}
        given = {name: None if tensor is None else tensor[:fresh] for name, tensor in numbers.items()}
        self._push(kept, losses[:fresh], successes[:fresh], given, extras, self._stage_now(trainer))

    def _push(
        self,
        rows: dict[str, Tensor],
        losses: Tensor,
        successes: Tensor,
        numbers: Mapping[str, Tensor | None],
        extras: dict[str, list[Tensor]],
        stage: int,
    ) -> None:
        """Every fourth to the probe while it has room; what is in it is never stored elsewhere."""
        rows = {name: tensor.detach().cpu() for name, tensor in rows.items()}
        ids = numbers["sample_id"]
        try:
            ids = self.probe.ids_of(rows) if ids is None else self._ids_of_this_fit(ids.cpu(), rows)
            for i, id in enumerate(ids.tolist()):
                self._offered += 1
                if not self._probe_closed and self._offered % 4 == 1 and id not in self.buffer:
                    one = {name: tensor[i : i + 1] for name, tensor in rows.items()}
                    self.probe.push(one, losses[i : i + 1], successes[i : i + 1], ids[i : i + 1])
                    self._probe_closed = len(self.probe) == self.probe_size
            free = [i for i, id in enumerate(ids.tolist()) if id not in self.probe]
            if free:
                family = numbers["family"]
                self.buffer.push(
                    {name: tensor[free] for name, tensor in rows.items()},
                    losses.cpu()[free],
                    successes.cpu()[free],
                    ids[free],
                    None if family is None else family.cpu()[free],
                    {name: [values[i] for i in free] for name, values in extras.items()},
                    stage=stage,
                    step=self._steps,
                )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None

    def _ids_of_this_fit(self, ids: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """Numbers of examples that an earlier fit's other examples do not have: data sets all number from 0."""
        if not self._fits:
            return ids
        contents, found = self.probe.ids_of(rows).tolist(), []
        for id, content in zip(ids.tolist(), contents, strict=True):
            numbers = [_number_in_fit(id, fit) for fit in range(self._fits + 1)]
            earlier = (n for n in numbers[:-1] for store in (self.buffer, self.probe) if store.content_of(n) == content)
            found.append(next(earlier, numbers[-1]))
        return torch.tensor(found)

    def _numbers(self, argument: str, rows: Mapping[str, Tensor], usual: tuple[str, ...]) -> Tensor | None:
        key: Any = getattr(self, argument)
        if key is None:
            return None
        if isinstance(key, int) and key < 0:
            key += len(rows)
        names = usual if key == "auto" else (str(key),)
        found = next((rows[name] for name in names if name in rows), None)
        if key == "auto":
            return found if found is not None and found.ndim == 1 and not found.is_floating_point() else None
        if found is None or found.ndim != 1 or found.is_floating_point():
            raise MisconfigurationException(
                f"`DreamReplay({argument}={getattr(self, argument)!r})`: the batch has no whole numbers (B,) there. It"
                f" has { {name: tuple(tensor.shape) for name, tensor in rows.items()} }."
            )
        return found

    def _cannot_score(self, error: ValueError) -> None:
        if self.distillation:
            raise MisconfigurationException(f"`DreamReplay(distillation={self.distillation})`: {error}") from None
        if self._told:
            return
        self._told = True
        self.warn_once(
            f"nothing tells how single examples do ({error}), so that none is near the threshold, rows are drawn from"
            " the reservoir, and the losses that are logged are means of what `training_step` returned. Return"
            " `example_loss` and `example_success`, (B,), from `training_step`, or name"
            ' `labels` ("input_ids" where all tokens are text to learn) and `network`.'
        )

    # Sleeping.

    def _interval(self, trainer: Trainer) -> int:
        if not self.every_n_steps_by_stage:
            return self.every_n_steps
        stage = self._stage_now(trainer)
        self._stage = trainer.strategy.broadcast(stage) if trainer.world_size > 1 else stage
        return self.every_n_steps_by_stage.get(self._stage or 0, self.every_n_steps)

    def _stage_now(self, trainer: Trainer) -> int:
        value = float(trainer.callback_metrics.get(self.stage_monitor, math.nan))
        return int(value) if math.isfinite(value) else -1 if self._stage is None else self._stage

    def _sleep_if_due(
        self, trainer: Trainer, pl_module: LightningModule, template: Any, interruptible: bool = True
    ) -> None:
        if not self._remaining:
            interval = self._interval(trainer)
            due = is_dev_run(trainer) or (interval and self._steps - self._last_sleep >= interval)
            if not due or _least(trainer, len(self.buffer)) == 0:
                return
            self._augment(trainer, pl_module)
            self._last_sleep, self._most_rows = self._steps, _most(trainer, self._size)
            self._remaining = 1 if is_dev_run(trainer) else self.num_steps
            self._watched = self._new_buffer(_NUM_WATCHED, 0.0)
            some = self._some_stored()
            self._watched.push(some.rows, some.loss, some.success)
            self._before = self._measured(trainer, pl_module, template, self._watched)
        while self._remaining:
            self._dream(trainer, pl_module, template)
            self._remaining -= 1
            for callback in trainer.callbacks if self._remaining and interruptible else ():  # type: ignore[attr-defined]
                if isinstance(callback, SupportsInterrupt):
                    callback.stop_if_asked(trainer)
        after = self._measured(trainer, pl_module, template, self._watched)
        self._cycles += 1
        metrics = {"cycles": float(self._cycles), "loss_before": self._before[0], "success_before": self._before[1]}
        metrics |= {"loss_after": after[0], "success_after": after[1]}
        metrics |= self._probed(trainer, pl_module, template) | self._yields(trainer, pl_module)
        self.log_metrics(trainer, metrics)

    def _some_stored(self) -> Replay:
        """Rows spread evenly over the buffer."""
        slots = self.buffer.slots()
        every = max(1, len(slots) // _NUM_WATCHED)
        return self.buffer.read(slots[::every][:_NUM_WATCHED])

    def _dream(self, trainer: Trainer, pl_module: LightningModule, template: Any) -> None:
        self._extra_steps += 1
        rows = self._draw(self.batch_size or self._most_rows)
        drawn = self._drawn
        seed = (self.seed * _SEED_STEP + self._extra_steps) * _SEED_STEP + trainer.global_rank
        asleep = apart(trainer, pl_module, self, seed % (1 << 63), self.with_callbacks)
        self._dreaming = True
        mixer = self._mixer or self
        appended, mixer._appended = mixer._appended, 0
        try:
            with asleep, scaled_lr(trainer.optimizers, self.lr_scale):
                extra_step(trainer, pl_module, _on_device(pl_module, template, rows))
        finally:
            self._dreaming, mixer._appended = False, appended
        if self._outcome is not None:
            self._note_replay(drawn, next(iter(rows.values())).numel(), *self._outcome[1:])
            if drawn is not None and self._mean is not None and not self._num_dreams:
                self._replayed[0] += float(self._mean) * len(drawn)
                self._replayed[1] += len(drawn)
        self._forget_step()

    def _note_replay(self, drawn: Replay | None, entries: int, losses: Tensor, successes: Tensor) -> None:
        """Of all rows that were replayed, the stored ones last."""
        self._computed[1] += entries
        if drawn is None:
            return
        losses, successes = losses[-len(drawn) :].cpu(), successes[-len(drawn) :].cpu()
        for place, values in enumerate((losses, successes)):
            known = values[values.isfinite()]
            self._replayed[2 * place] += float(known.sum())
            self._replayed[2 * place + 1] += len(known)
        self.buffer.update(drawn, losses, successes)

    # Variants.

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.timeout, allow_weaker=self.allow_weaker)

    def _augment(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make programs of those near the threshold, and store the ones that hold."""
        source = _source_of_programs(trainer, pl_module) if self._programs.is_on else None
        if source is None or len(self.buffer) == 0:
            return
        parents = self.buffer.sample(self.problems_per_cycle, "near_threshold", counted=False)
        found = ((i, source.problem_of(_row(parents.rows, i))) for i in range(len(parents)))
        problems = {i: problem for i, problem in found if problem is not None}
        self._programs.rounds += 1
        seed = (self.seed * _SEED_STEP + self._programs.rounds) * _SEED_STEP + trainer.global_rank
        complete = pl_module.complete if isinstance(pl_module, SupportsGenerate) else None
        with self._sandbox() as sandbox:

            def run(chosen: Sequence[CodeExample]) -> list[Verdict]:
                return sandbox.run_many([Task(e.program, e.tests, e.entry_point, e.setup) for e in chosen])

            made = [*self._programs.make(problems, run, sandbox.run_many, complete, seed)]
        network = self._scores and self._scores.network
        longest = getattr(getattr(network, "config", None), "max_position_embeddings", None)
        for i, prompt, completion in made:
            row = source.row_of(prompt, completion)
            if row is not None and all(longest is None or t.shape[1] <= longest for t in row.values()):
                self._store_variant(_row(parents.rows, i, keep=True), row)

    def _store_variant(self, parent: dict[str, Tensor], row: dict[str, Tensor]) -> None:
        missing = [name for name in row if name not in parent]
        if missing:
            raise MisconfigurationException(
                f"`DreamReplay`: `row_of` gives {list(row)}, and batches have {list(parent)}."
            )
        ids = self.dreams.ids_of(parent | row)
        named = {name: ids for name in ("sample_id",) if name in parent}
        self.dreams.push(parent | row | named, sample_id=ids)

    def _yields(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Over all processes."""
        counts = torch.tensor(self._programs.counts())
        if trainer.world_size > 1 and self._programs.is_on:
            counts = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum")
        return self._programs.metrics(counts.tolist())

    # Measuring.

    def _measured(
        self, trainer: Trainer, pl_module: LightningModule, template: Any, store: ReplayBuffer
    ) -> list[float]:
        """Loss and success on a store's rows, over all processes; all make the same number of forward passes."""
        if not pl_module.automatic_optimization or _least(trainer, len(store)) == 0:
            return [math.nan, math.nan]
        slots, size = store.slots(), self.batch_size or max(1, _most(trainer, self._size))
        sums = torch.zeros(4, dtype=torch.float64)
        for start in range(0, store.capacity, size):
            chunk = slots[start : start + size]
            batch = _on_device(pl_module, template, store.read(chunk or slots[:size]).rows)
            self._measuring = True
            try:
                with apart(trainer, pl_module, self, seed=0):
                    extra_evaluation(trainer, pl_module, batch)
            finally:
                self._measuring = False
            if self._outcome is not None and chunk:
                _, losses, successes = self._outcome
                losses = losses if self._mean is None else self._mean.expand(len(chunk))
                for place, values in enumerate((losses, successes)):
                    known = values[values.isfinite()].double().cpu()
                    sums[2 * place : 2 * place + 2] += torch.tensor([known.sum(), len(known)])
            self._forget_step()
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.float().to(pl_module.device), reduce_op="sum").cpu().double()
        loss, num_losses, success, num_successes = sums.tolist()
        return [loss / num_losses if num_losses else math.nan, success / num_successes if num_successes else math.nan]

    def _probed(self, trainer: Trainer, pl_module: LightningModule, template: Any) -> dict[str, float]:
        if not self.probe_size:
            return {}
        loss = self._measured(trainer, pl_module, template, self.probe)[0]
        self._lowest = loss if math.isnan(self._lowest) else min(self._lowest, loss)
        return {"probe_loss": loss, "forgetting": loss - self._lowest}

    def _log_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (loss, num_losses, success, num_successes), self._replayed = self._replayed, [0.0] * 4
        fresh, replayed = self._computed
        self.log_metrics(
            trainer,
            {
                "stored": float(len(self.buffer)),
                "frontier": float(sum(self.buffer.categories.values())),
                "share": replayed / max(1, fresh + replayed),
                "replay_loss": loss / num_losses if num_losses else math.nan,
                "replay_success": success / num_successes if num_successes else math.nan,
            },
        )

    # State.

    def _own_state(self) -> dict[str, Any]:
        counters = {name: copy(getattr(self, f"_{name}")) for name in _COUNTERS}
        counters["distilled"] = self._distilled_as
        counters["outputs"] = None if self._scores is None else self._scores.reader.state_dict()
        if not self.save_buffer:
            fresh = {"remaining": 0, "offered": 0, "probe_closed": self.probe_size == 0, "lowest": math.nan}
            return {"counters": counters | fresh}
        made = {"programs": self._programs.state_dict()}
        return {"counters": counters, **made} | {name: store.state_dict() for name, store in self._stores.items()}

    @property
    def _distilled_as(self) -> list[int]:
        """What rows are stored with."""
        return [1, self.top_k] if self.distillation else [0, 0]

    @property
    def _stores(self) -> dict[str, ReplayBuffer]:
        return {"buffer": self.buffer, "probe": self.probe, "dreams": self.dreams, "watched": self._watched}

    def _take_restored(self) -> None:
        states, self._restored = self._restored.get("ranks", []), {}
        trainer = self._trainer
        assert trainer is not None
        if not states:
            return
        same = len(states) == trainer.world_size
        state = states[trainer.global_rank if same else 0]
        kept = state["counters"]["distilled"]
        if kept != self._distilled_as and any(len(other["buffer"]["slots"]) for other in states if "buffer" in other):
            how = f"with the logits of {kept[1]} classes" if kept[0] else "without logits"
            raise MisconfigurationException(
                f"`DreamReplay(distillation={self.distillation}, top_k={self.top_k})`: the checkpoint's rows were"
                f" stored {how}. Keep to that, or leave `DreamReplay` out and begin anew."
            )
        for name in _COUNTERS:  # no other: a checkpoint does not decide what is set
            if name in state["counters"]:  # one of an earlier release may lack some
                setattr(self, f"_{name}", copy(state["counters"][name]))
        if self._scores is not None and state["counters"].get("outputs") is not None:
            self._scores.reader.load_state_dict(state["counters"]["outputs"])
        if "programs" in state:
            self._programs.load_state_dict(state["programs"])
        for name, store in self._stores.items():
            if name not in state:
                continue
            if same:
                store.load_state_dict(state[name])
            else:
                store.load_shard([other[name] for other in states], trainer.global_rank, trainer.world_size)
        self._check_at_start = True
        self._probe_closed |= not same and self._offered > 0

    def _leave(self, pl_module: LightningModule) -> None:
        remove_loss_term(pl_module, self)
        if self._scores is not None:
            self._scores.detach()
        trainer = self._trainer
        if trainer is not None and self._after is not None:
            remaining = [callback for callback in trainer.callbacks if callback is not self._after]  # type: ignore[attr-defined]
            vars(trainer)["callbacks"] = remaining
        if trainer is not None and self._to_device is not None:
            vars(trainer.strategy).pop("batch_to_device", None)
        self._scores = self._trainer = self._after = self._to_device = self._mixer = None
        self._forget_step()


class _AfterAll(Callback):
    """Stands last in the list of callbacks while fitting."""

    def __init__(self, act: Any) -> None:
        self._act = act

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._act(trainer, pl_module, batch)


def _source_of_programs(trainer: Trainer, pl_module: LightningModule) -> SupportsAugmentation | None:
    sources = (getattr(trainer, "datamodule", None), pl_module)
    return next((source for source in sources if isinstance(source, SupportsAugmentation)), None)


def _number_in_fit(id: int, fit: int) -> int:
    """Another number for an example in each later fit; its own in the first."""
    if fit == 0:
        return id
    digest = hashlib.blake2b(f"{fit}/{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _row(rows: Mapping[str, Tensor], i: int, keep: bool = False) -> dict[str, Tensor]:
    """One row, with its dimension or without."""
    return {name: tensor[i : i + 1] if keep else tensor[i] for name, tensor in rows.items()}


def _on_device(pl_module: LightningModule, template: Any, rows: Mapping[str, Tensor]) -> Any:
    return with_rows(template, {name: tensor.to(pl_module.device) for name, tensor in rows.items()})


def _least(trainer: Trainer, value: int) -> int:
    """The smallest of all processes'."""
    if trainer.world_size == 1:
        return value
    mine = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.all_gather(mine).min())


def _most(trainer: Trainer, value: int) -> int:
    """The largest of all processes'."""
    return -_least(trainer, -value)
