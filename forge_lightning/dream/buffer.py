"""ReplayBuffer: stored examples with their scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from forge_lightning.core.tokens import IGNORED
from forge_lightning.core.validate import require
from forge_lightning.dream.batch_rows import joined, rows_of
from forge_lightning.dream.frontier import CATEGORIES
from forge_lightning.dream.membership import Membership
from forge_lightning.dream.reservoir import draw
from forge_lightning.dream.score_table import ScoreTable
from forge_lightning.dream.store import RowStore

Strategy = Literal["uniform", "balanced", "near_threshold", "edge_cases", "priority"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
_ROW_OVERHEAD = 400
"""Bytes of an example in addition to its data: scores, positions and Python objects. Measured with tracemalloc."""


@dataclass(frozen=True)
class Replay:
    """Examples drawn from a `ReplayBuffer`.

    Args:
        rows: Fields, ``(B, ...)`` each, padded at the end to the longest example.
        extras: Additional tensors of each example, lists of ``B`` tensors.
        slots: Slots in the buffer, for `ReplayBuffer.update`.
        sample_id: Identifiers, ``(B,)``.
        loss: Last known losses, ``(B,)``.
        success: Last known successes, ``(B,)``, NaN where never known.
        weights: Importance weights, ``(B,)``; ones unless the strategy is "priority".
    """

    rows: dict[str, Tensor]
    extras: dict[str, list[Tensor]]
    slots: list[int]
    sample_id: Tensor
    loss: Tensor
    success: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.slots)


class ReplayBuffer:
    """Stores examples with scores: a fair sample of everything seen, and a frontier near the threshold of success.

    The **reservoir** is a uniform sample of all examples ever pushed, with equal shares for families once it is full.
    It matters most: no way of drawing makes up for examples that were not stored. The **frontier** has three parts of
    equal size: ``near_success`` (right, at a loss in the upper third of right ones), ``near_failure`` (wrong, at a loss
    in the lower third of wrong ones) and ``edge_case`` (right at a loss in the highest tenth, or wrong at one in the
    lowest). Quantiles are taken over the last 512 losses. Without successes the frontier stays empty.

    An example with a known ``sample_id`` is not stored twice: its scores are refreshed, and it may leave the frontier.
    Examples lie on the CPU, exactly as pushed. Integers take 32 bits where they fit, and padding at the end is left
    out.

    Args:
        capacity: Number of examples at most.
        frontier: Share of the capacity for the frontier, in [0, 1).
        max_bytes: Memory at most, with about 400 bytes of bookkeeping for each example. Divided like the capacity; an
            example larger than its part is not stored.
        mask: Field that is 0 where sequences are padded.
        labels: Fields that are padded with ``label_pad``.
        label_pad: Label that the loss ignores.
        alpha: Exponent of the priority in strategy "priority", at least 0; 0 draws uniformly.
        beta: Strength of the importance weights, in [0, 1].
        memory_map: Folder for a file that holds the examples, for more than fits into memory.
        seed: Random seed for admission and draws.
        owner: Name for error messages.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Vitter, `Random Sampling with a Reservoir <https://doi.org/10.1145/3147.3165>`_, 1985.
        Chrysakis and Moens, `Online Continual Learning from Imbalanced Data
        <https://proceedings.mlr.press/v119/chrysakis20a.html>`_, 2020, on equal shares.

    Example:
        >>> buffer = ReplayBuffer(capacity=100)
        >>> rows = {"x": torch.arange(6.0).view(3, 2)}
        >>> _ = buffer.push(rows, loss=torch.tensor([0.1, 2.0, 0.7]), sample_id=torch.arange(3))
        >>> len(buffer), buffer.sample(2, "uniform").rows["x"].shape
        (3, torch.Size([2, 2]))
    """

    def __init__(
        self,
        capacity: int = 10_000,
        frontier: float = 0.3,
        max_bytes: int = 1 << 30,
        mask: str | None = "attention_mask",
        labels: Sequence[str] = ("labels",),
        label_pad: int = IGNORED,
        alpha: float = 0.6,
        beta: float = 0.4,
        memory_map: str | Path | None = None,
        seed: int = 0,
        owner: str = "ReplayBuffer",
    ) -> None:
        check_limits(owner, capacity, frontier, max_bytes, memory_map)
        require(owner, alpha >= 0, "alpha", alpha, "at least 0")
        require(owner, 0 <= beta <= 1, "beta", beta, "in [0, 1]")
        self.capacity, self.max_bytes, self.mask = capacity, max_bytes, mask
        self.alpha, self.beta, self.seed, self.owner = alpha, beta, seed, owner
        self.memory_map, self.labels, self.label_pad = memory_map, tuple(labels), label_pad
        self._clear(frontier)

    def _clear(self, frontier: float) -> None:
        self._scores = ScoreTable(self.capacity)
        self._store = RowStore(self.capacity, self.mask, self.memory_map, self.owner, self.labels, self.label_pad)
        self._rng = np.random.default_rng(self.seed)
        self._share_of_frontier = frontier
        self._members = Membership(
            self.capacity,
            frontier,
            self.max_bytes,
            self._scores,
            self._bytes_of,
            self._rng,
            self._store.free,
        )

    def __len__(self) -> int:
        return len(self._members.slot_of)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._members.slot_of

    @property
    def num_seen(self) -> int:
        """Number of examples pushed so far."""
        return sum(self._members.reservoir.seen.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the examples, with their bookkeeping."""
        return self._store.num_bytes + _ROW_OVERHEAD * len(self)

    def _bytes_of(self, slot: int) -> int:
        return self._store.length(slot) + _ROW_OVERHEAD

    @property
    def num_in_reservoir(self) -> int:
        """Number of examples in the fair sample."""
        return self._members.reservoir.num_held

    @property
    def families(self) -> dict[int, int]:
        """Number of examples in the reservoir, by family."""
        return {family: len(slots) for family, slots in self._members.reservoir.held.items() if slots}

    @property
    def categories(self) -> dict[str, int]:
        """Number of examples in each part of the frontier."""
        return {name: len(slots) for name, slots in zip(CATEGORIES, self._members.frontier.parts, strict=True)}

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Append examples to others, padded as stored ones are.

        Raises:
            ValueError: If their fields or shapes differ.
        """
        return joined(first, second, self._store.pads, self._store.sequences, self._store.padded_at_front)

    def column(self, name: str) -> Tensor:
        """A score or label of all stored examples, by slot.

        Args:
            name: "loss", "best_loss", "success", "best_success", "sample_id", "family", "stage", "step", "replays",
                "category" or "in_reservoir".
        """
        return self._scores.columns[name][self.slots()]

    def push(
        self,
        rows: Mapping[str, Tensor],
        loss: Tensor | None = None,
        success: Tensor | None = None,
        sample_id: Tensor | None = None,
        family: Tensor | None = None,
        extras: Mapping[str, Sequence[Tensor]] | None = None,
        stage: int = -1,
        step: int = 0,
    ) -> list[int]:
        """Offer examples, of which some are stored.

        Args:
            rows: Fields, ``(B, ...)`` each.
            loss: Losses, ``(B,)``; NaN where unknown.
            success: Successes in [0, 1], ``(B,)``; NaN where unknown.
            sample_id: Integers that identify examples, ``(B,)``. Default: a hash of the content.
            family: Integers that number families, ``(B,)``.
            extras: Additional tensors of any length for each example, lists of ``B`` tensors ``(n, ...)``.
            stage: Stage of training.
            step: Optimizer step of training.

        Returns:
            The slot of each example, -1 if it was not stored.

        Raises:
            ValueError: If a field is no tensor, fields differ from earlier ones, or lengths do not agree.
        """
        rows = rows_of(rows)
        size = len(next(iter(rows.values())))
        bytes_before = self._store.num_bytes
        packed = self._store.pack(rows, extras or {})
        if self._store.num_bytes != bytes_before:  # integers that no longer fit into half the bits
            self._members.recount()
        contents = packed.ids()
        ids = _listed(sample_id, size, "sample_id", whole=True) if sample_id is not None else contents
        losses = _listed(loss, size, "loss") if loss is not None else [math.nan] * size
        successes = _listed(success, size, "success") if success is not None else [math.nan] * size
        families = _listed(family, size, "family", whole=True) if family is not None else [0] * size
        chances, places = self._rng.random((2, size)).tolist()
        self._scores.refresh(size)
        priorities, quantiles = self._scores.new_priorities(losses, successes), self._scores.quantiles
        kept, members = [], self._members
        for i in range(size):
            one_family = members.reservoir.count(families[i])
            quantiles.add(losses[i], successes[i])
            slot = members.slot_of.get(ids[i])
            if slot is not None:
                members.rescore(slot, losses[i], successes[i], priorities[i])
                kept.append(slot if ids[i] in members.slot_of else -1)
                continue
            category, length = quantiles.category(losses[i], successes[i]), packed.length(i) + _ROW_OVERHEAD
            fair, category = members.make_room(one_family, category, chances[i], places[i], priorities[i], length)
            if not (fair or category):
                kept.append(-1)
                continue
            slot = members.take_slot(ids[i])
            best = {"best_loss": losses[i], "best_success": successes[i], "priority": priorities[i]}
            labels = {"sample_id": ids[i], "family": one_family, "stage": stage, "step": step, "content": contents[i]}
            self._scores.write(slot, loss=losses[i], success=successes[i], **best, **labels)
            self._store.put(slot, packed, i)
            members.join(slot, one_family, fair, category)
            kept.append(slot)
        return kept

    def content_of(self, sample_id: int) -> int | None:
        """Hash of a stored example's content, as from `ids_of`; ``None`` if it is not stored."""
        slot = self._members.slot_of.get(sample_id)
        return None if slot is None else int(self._scores.arrays["content"][slot])

    def ids_of(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Hashes of the examples' contents without padding, ``(B,)``: the default ``sample_id``."""
        return torch.tensor(self._store.pack(rows_of(rows), {}).ids())

    def sample(self, batch_size: int, strategy: Strategy = "uniform", counted: bool = True) -> Replay:
        """Draw examples without replacement.

        Args:
            batch_size: Number of examples; fewer if fewer are stored.
            strategy: "uniform" over the reservoir, which is uniform over everything seen; "balanced": families alike;
                "near_threshold": the near successes and near failures; "edge_cases": those; both filled up from the
                reservoir; "priority": in proportion to `replay_priority` to the power of ``alpha``, with importance
                weights.
            counted: Whether to increment the replay count of each drawn example, which lowers its priority.

        Raises:
            ValueError: If nothing is stored, or the strategy does not exist.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"`sample(strategy={strategy!r})` must be one of {list(STRATEGIES)}.")
        if batch_size < 1:
            raise ValueError(f"`ReplayBuffer.sample(batch_size={batch_size})` must be at least 1.")
        if not self._members.slot_of:
            raise ValueError("`ReplayBuffer.sample`: nothing is stored.")
        weights = torch.ones(min(batch_size, len(self)))
        if strategy == "priority":
            slots, weights = self._scores.draw_by_priority(len(weights), self.alpha, self.beta, self._rng)
        elif strategy == "balanced":
            slots = self._members.reservoir.balanced_sample(len(weights), self._rng)
        else:
            wanted = {"near_threshold": (0, 1), "edge_cases": (2,)}.get(strategy, ())
            slots = draw(
                [slot for place in wanted for slot in self._members.frontier.parts[place]], len(weights), self._rng
            )
        slots = self._members.filled_up(slots, len(weights))
        if counted:
            self._scores.count_replays(slots)
        return self._read(slots, weights)

    def read(self, slots: Sequence[int]) -> Replay:
        """Read examples by slot. Replay counts stay as they are."""
        return self._read([int(slot) for slot in slots], torch.ones(len(slots)))

    def _read(self, slots: list[int], weights: Tensor) -> Replay:
        rows, extras = self._store.read(slots)
        places = torch.tensor(slots, dtype=torch.int64)
        score = {name: self._scores.columns[name][places] for name in ("sample_id", "loss", "success")}
        return Replay(rows, extras, slots, weights=weights, **score)

    def slots(self) -> list[int]:
        """Slots in use, in ascending order."""
        return self._scores.used().tolist()  # type: ignore[no-any-return]

    def update(self, replay: Replay, loss: Tensor, success: Tensor | None = None) -> None:
        """Update the scores of replayed examples. Those that have left the buffer since are skipped.

        Args:
            replay: The drawn examples.
            loss: ``(B,)``.
            success: ``(B,)``, or ``None`` if unknown: the last known values stay.
        """
        losses = _listed(loss, len(replay), "loss")
        successes = [math.nan] * len(replay) if success is None else _listed(success, len(replay), "success")
        ids = replay.sample_id.tolist()
        priorities = self._scores.new_priorities(losses, successes)
        for slot, id, *scores in zip(replay.slots, ids, losses, successes, priorities, strict=True):
            if self._members.slot_of.get(id) == slot:
                self._members.rescore(slot, *scores)
        self._scores.touch(replay.slots)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as plain tensors, numbers and lists."""
        slots, members = self.slots(), self._members.state_dict()
        return {
            "rows": self._store.state_dict(slots),
            "slots": torch.tensor(slots, dtype=torch.int64),
            **members,
            "free": torch.tensor(members["free"], dtype=torch.int64),
            "rng": self._rng.bit_generator.state,
            "capacity": list(self._members.limits),
            **self._scores.state_dict(slots),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict`: exactly, or with other limits a random part that fits."""
        if state_dict["capacity"] != self._members.limits:
            self.load_shard([state_dict], rank=0, world_size=1)
            return
        self._clear(self._share_of_frontier)
        slots = state_dict["slots"].tolist()
        self._scores.load_state_dict(state_dict, slots)
        self._store.load(state_dict["rows"], dict(enumerate(slots)))
        slot_of = dict(zip(state_dict["columns"]["sample_id"].tolist(), slots, strict=True))
        self._members.load_state_dict(state_dict, slot_of)
        self._rng.bit_generator.state = state_dict["rng"]

    def load_shard(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Load this rank's share of what another number of ranks had stored.

        Args:
            states: The `state_dict` of every rank that wrote the checkpoint.
            rank: This rank.
            world_size: Number of ranks now.
        """
        self._clear(self._share_of_frontier)
        self._rng.bit_generator.state = np.random.default_rng([self.seed, rank, world_size]).bit_generator.state
        states = [state for state in states if len(state["slots"])]
        rows = [(number, i) for number, state in enumerate(states) for i in range(len(state["slots"]))]
        mine = rows[rank::world_size]
        for number, i in (mine[place] for place in self._rng.permutation(len(mine))):
            state = states[number]
            self._take_over(state["rows"], i, {name: column[i].item() for name, column in state["columns"].items()})
        seen: dict[int, int] = {}
        for state in states:
            for family, count in state["seen"].items():
                seen[int(family)] = seen.get(int(family), 0) + count
        reservoir = self._members.reservoir
        for family, count in seen.items():
            reservoir.seen[family] = max(len(reservoir.held.get(family, [])), count // world_size)
        # Any rank's quantiles will do: all ranks see the same task.
        if states:
            state = states[rank % len(states)]
            self._scores.load_quantiles(state)
            reservoir.load_lengths(state["lengths"])

    def _take_over(self, rows: Mapping[str, Any], i: int, row: dict[str, Any]) -> None:
        fair, category = self._members.room_for(row, int(rows["lengths"][i]) + _ROW_OVERHEAD)
        if not (fair or category):
            return
        slot = self._members.take_slot(row["sample_id"])
        self._scores.write(slot, **{**row, "in_reservoir": False, "category": 0})
        self._store.load(rows, {i: slot})
        self._members.join(slot, row["family"], fair, category)

    @property
    def threshold(self) -> float:
        """Loss at which success and failure meet; NaN while unknown."""
        return self._scores.quantiles.threshold


def check_limits(owner: str, capacity: int, frontier: float, max_bytes: int, memory_map: str | Path | None) -> None:
    """Raise a `ValueError` if a buffer cannot have these limits."""
    check = partial(require, owner)
    check(capacity >= 1, "capacity", capacity, "at least 1")
    check(0 <= frontier < 1, "frontier", frontier, "in [0, 1)")
    check(max_bytes >= 1, "max_bytes", max_bytes, "at least 1")
    above = memory_map is None or Path(memory_map).absolute().parent.is_dir()
    check(above, "memory_map", memory_map and str(memory_map), "a folder in one that exists")


def _listed(values: Any, size: int, name: str, whole: bool = False) -> list[Any]:
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.shape != (size,):
        raise ValueError(f"`{name}` must be ({size},) for {size} examples, not {tuple(tensor.shape)}.")
    if whole and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"`{name}` must be integers, not {str(tensor.dtype).removeprefix('torch.')}.")
    return list(tensor.tolist() if whole else tensor.float().tolist())
