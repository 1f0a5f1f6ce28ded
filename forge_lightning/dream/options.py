"""Options of `DreamReplay` that belong together: when it replays, what it stores, and what batches hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from forge_lightning.core.batch import LABEL_NAMES
from forge_lightning.core.tokens import IGNORED
from forge_lightning.core.validate import require
from forge_lightning.dream.augmenter import DreamAugmenter
from forge_lightning.dream.buffer import check_limits


@dataclass(frozen=True)
class Mix:
    """Append stored examples to each training batch.

    Args:
        fraction: Share of replayed examples in a batch, in [0, 1). They come on top: with 0.2, 8 behind each 32. 0
            turns replay off. What the module logs of a batch covers all its examples.
        every_n_steps: Optimizer steps between two measurements of forgetting, and between two rounds of new programs.

    Raises:
        ValueError: If an argument is out of range.
    """

    fraction: float = 0.2
    every_n_steps: int = 1000

    def __post_init__(self) -> None:
        check = partial(require, "Mix")
        check(0 <= self.fraction < 1, "fraction", self.fraction, "in [0, 1)")
        check(self.every_n_steps >= 1, "every_n_steps", self.every_n_steps, "at least 1")

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever replayed."""
        return self.fraction == 0


@dataclass(frozen=True)
class Sleep:
    """Make extra optimizer steps on stored examples alone, every so often.

    Args:
        every_n_steps: Optimizer steps between sleeps.
        num_steps: Optimizer steps of a sleep; 0 turns it off.
        batch_size: Examples of each such step. Default: as many as a training batch has.
        lr_scale: Factor on all learning rates during a sleep, above 0.
        with_callbacks: Let the backward and optimizer hooks and the loss terms of other callbacks act in a sleep, so
            that Grokfast filters its gradients too. Nothing of a sleep is logged either way.
        every_n_steps_by_stage: ``every_n_steps`` for stages of training, by the stage's number; 0 for no sleep. Stages
            that are left out use ``every_n_steps``.

    Raises:
        ValueError: If an argument is out of range.
    """

    every_n_steps: int = 1000
    num_steps: int = 50
    batch_size: int | None = None
    lr_scale: float = 1.0
    with_callbacks: bool = False
    every_n_steps_by_stage: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check = partial(require, "Sleep")
        check(self.every_n_steps >= 1, "every_n_steps", self.every_n_steps, "at least 1")
        check(self.num_steps >= 0, "num_steps", self.num_steps, "at least 0")
        check(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check(self.lr_scale > 0, "lr_scale", self.lr_scale, "above 0")
        intervals = dict(self.every_n_steps_by_stage or {})
        object.__setattr__(self, "every_n_steps_by_stage", intervals)
        check(all(n >= 0 for n in intervals.values()), "every_n_steps_by_stage", intervals, "at least 0 for each stage")

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever replayed."""
        return self.num_steps == 0


@dataclass(frozen=True)
class Storage:
    """Where stored examples are kept, and how many.

    Args:
        capacity: Examples stored at most, on each rank.
        frontier: Share of the capacity for examples near the threshold of success, in [0, 1).
        max_bytes: Memory of stored examples at most, on each rank, with about 400 bytes of bookkeeping for each.
        memory_map: Folder for a file that holds the examples in place of memory.
        in_checkpoints: Save stored examples in checkpoints. Otherwise a resumed run starts with an empty buffer.

    Raises:
        ValueError: If an argument is out of range.
    """

    capacity: int = 10_000
    frontier: float = 0.3
    max_bytes: int = 1 << 30
    memory_map: str | None = None
    in_checkpoints: bool = True

    def __post_init__(self) -> None:
        check_limits("Storage", self.capacity, self.frontier, self.max_bytes, self.memory_map)


@dataclass(frozen=True)
class ProgramReplay:
    """Replay new programs for stored problems too. Each one is run in a sandbox before it is stored.

    Needs `CodeTasks` or `GeneratedTasks`, or a datamodule with ``problem_of`` and ``row_of``.

    Args:
        augmenter: Makes variants of stored programs near the threshold of success, before each sleep, or every
            ``every_n_steps`` of `Mix`. Default: no variants.
        temperatures: Sampling temperatures above 0. The model writes one program for each problem at each of them;
            those that pass the problem's tests are stored with the problem's own prompt. Default: none.
        max_new_tokens: Tokens of a written program at most.
        fraction: Share of the replayed examples that are such programs, in [0, 1], once some are stored.
        problems_per_cycle: Problems of each round, on each rank.
        timeout: Seconds that a program may run.
        allow_weaker: Run programs also where the operating system lacks a protection. Only for data that you trust.

    Raises:
        ValueError: If an argument is out of range, or neither ``augmenter`` nor ``temperatures`` is set.
    """

    augmenter: DreamAugmenter | None = None
    temperatures: Sequence[float] = ()
    max_new_tokens: int = 128
    fraction: float = 0.5
    problems_per_cycle: int = 16
    timeout: float = 2.0
    allow_weaker: bool = False

    def __post_init__(self) -> None:
        check = partial(require, "ProgramReplay")
        if self.augmenter is None and not self.temperatures:
            raise ValueError(
                "`ProgramReplay` needs `augmenter` (for variants) or `temperatures` (for sampled programs)."
            )
        check(all(t > 0 for t in self.temperatures), "temperatures", self.temperatures, "above 0 each")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check(0 <= self.fraction <= 1, "fraction", self.fraction, "in [0, 1]")
        check(self.problems_per_cycle >= 1, "problems_per_cycle", self.problems_per_cycle, "at least 1")
        check(self.timeout > 0, "timeout", self.timeout, "above 0")


@dataclass(frozen=True)
class BatchFields:
    """Which entries of a batch are what. The defaults fit the usual names.

    Args:
        labels: Key or position of the labels. "auto": the usual names, or the last entry of a tuple; for a causal
            language model whose batch has neither, the tokens of "input_ids" that ``mask`` marks as real.
        mask: Key of the attention mask: examples are stored up to its last 1.
        family: Key or position of integers ``(B,)`` that number the families of examples. Families share the reservoir
            equally. "auto": "family", "arm" or "level"; ``None``: one family.
        sample_id: Key or position of integers ``(B,)`` that identify examples. "auto": "sample_id", otherwise the
            content; ``None``: the content. In a later fit with the same callback, an example with a known number is
            the same one only if its content is too.
        network: Name of the submodule that returns the logits. Default: the only child with parameters, or "model",
            "net" or "network".
        shift: Whether position ``t`` predicts the label of ``t + 1``. Default: true for causal language models of
            Hugging Face, false otherwise.
        ignore_index: Label that the loss ignores, in addition to -100 and to a number that is no class, such as -1 or
            255. Set 0 where 0 is padding.
    """

    labels: str | int | None = "auto"
    mask: str | None = "attention_mask"
    family: str | int | None = "auto"
    sample_id: str | int | None = "auto"
    network: str | None = None
    shift: bool | None = None
    ignore_index: int | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names that the labels may have in a batch."""
        return LABEL_NAMES if self.labels == "auto" else (str(self.labels),)

    @property
    def label_pad(self) -> int:
        """Label that fills up shorter examples."""
        return IGNORED if self.ignore_index is None else self.ignore_index


MOVED = {
    "mode": "schedule=Mix(...)` or `schedule=Sleep(...)",
    "every_n_steps": "schedule=Mix(every_n_steps=...)` or `schedule=Sleep(every_n_steps=...)",
    "fraction": "schedule=Mix(fraction=...)",
    "num_steps": "schedule=Sleep(num_steps=...)",
    "batch_size": "schedule=Sleep(batch_size=...)",
    "lr_scale": "schedule=Sleep(lr_scale=...)",
    "with_callbacks": "schedule=Sleep(with_callbacks=...)",
    "every_n_steps_by_stage": "schedule=Sleep(every_n_steps_by_stage=...)",
    "capacity": "buffer=Storage(capacity=...)",
    "frontier": "buffer=Storage(frontier=...)",
    "max_bytes": "buffer=Storage(max_bytes=...)",
    "memory_map": "buffer=Storage(memory_map=...)",
    "save_buffer": "buffer=Storage(in_checkpoints=...)",
    "augmenter": "programs=ProgramReplay(augmenter=...)",
    "temperatures": "programs=ProgramReplay(temperatures=...)",
    "max_new_tokens": "programs=ProgramReplay(max_new_tokens=...)",
    "augmented_fraction": "programs=ProgramReplay(fraction=...)",
    "problems_per_cycle": "programs=ProgramReplay(problems_per_cycle=...)",
    "timeout": "programs=ProgramReplay(timeout=...)",
    "allow_weaker": "programs=ProgramReplay(allow_weaker=...)",
    "labels": "fields=BatchFields(labels=...)",
    "mask": "fields=BatchFields(mask=...)",
    "family": "fields=BatchFields(family=...)",
    "sample_id": "fields=BatchFields(sample_id=...)",
    "network": "fields=BatchFields(network=...)",
    "shift": "fields=BatchFields(shift=...)",
    "ignore_index": "fields=BatchFields(ignore_index=...)",
}
"""Where each argument that `DreamReplay` took itself is set now."""
