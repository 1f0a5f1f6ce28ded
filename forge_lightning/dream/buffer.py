"""ReplayBuffer: what was trained on, kept so that it can be trained on again."""

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
from forge_lightning.dream.batch_rows import rows_of
from forge_lightning.dream.functional import gumbel_top_k, importance_weights, replay_priority
from forge_lightning.dream.store import RowStore

Strategy = Literal["uniform", "balanced", "near_threshold", "edge_cases", "priority"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
CATEGORIES = ("near_success", "near_failure", "edge_case")
"""Parts of the frontier, numbered from 1."""

_COLUMNS: dict[str, torch.dtype] = {
    "sample_id": torch.int64,
    "family": torch.int64,
    "loss": torch.float32,
    "best_loss": torch.float32,
    "success": torch.float32,
    "best_success": torch.float32,
    "stage": torch.int64,
    "step": torch.int64,
    "replays": torch.float32,
    "priority": torch.float32,
    "category": torch.int64,
    "in_reservoir": torch.bool,
    "content": torch.int64,
}
_MOST_FAMILIES = 4096  # counted apart; beyond them all are one
_WINDOW = 512  # losses that quantiles are of
_FEWEST = 24  # losses that make a quantile
_REFRESH = 32  # rows between computations of the quantiles
_MOST_TOUCHED = 256  # rows whose priority waits to be computed anew
_RIVALS = 16  # of which the least important leaves the frontier
_ROW_OVERHEAD = 400
"""Bytes that a row takes beside its data: scores, places and the objects that hold it. Measured with tracemalloc."""


@dataclass(frozen=True)
class Replay:
    """Rows drawn from a `ReplayBuffer`.

    Args:
        rows: The fields that were pushed, ``(B, ...)``, padded at the end to the longest row.
        extras: What was pushed with each, a list of ``B`` tensors.
        slots: Where they lie in the buffer, for `ReplayBuffer.update`.
        sample_id: ``(B,)``.
        loss: Last known, ``(B,)``.
        success: Last known, ``(B,)``, NaN where it never was.
        weights: Importance weights, ``(B,)``; ones but for strategy "priority".
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
    """Rows of tensors with their scores: a fair sample of everything, and a frontier of what is barely right or wrong.

    The **reservoir** is a uniform sample of all rows that were ever pushed, with equal shares for families once it is
    full. It matters most: no way of drawing makes up for rows that were not kept. The **frontier** holds, each with a
    third of its room: ``near_success`` (right, at a loss in the upper third of those that are right), ``near_failure``
    (wrong, at a loss in the lower third of those that are wrong) and ``edge_case`` (right in spite of a loss in the
    highest tenth of all, or wrong in spite of one in the lowest). Quantiles are of the last 512 losses. Where success
    is never told, the frontier stays empty.

    A row whose ``sample_id`` is known is not stored twice; its scores are refreshed, and a row that left the frontier's
    range leaves the frontier. Rows lie on the CPU, exactly as pushed; whole numbers are kept in 32 bits where they fit,
    and what a mask covers at the end is left out.

    Args:
        capacity: Rows at most.
        frontier: Share of the capacity for the frontier, in [0, 1).
        max_bytes: Memory at most, with about 400 bytes for the bookkeeping of each row; shared out as the capacity is.
            A row larger than its part is not kept.
        mask: Field that is 0 where sequences are padded.
        labels: Fields that get ``label_pad`` where shorter rows are filled up.
        label_pad: Label that the loss ignores.
        alpha: How much priority decides in strategy "priority"; 0 is uniform.
        beta: How much importance weights correct for that, in [0, 1].
        memory_map: Folder for a file that holds the rows, for more than fits into memory.
        seed: Of admission and draws.
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
        self._quota = int(capacity * frontier) // len(CATEGORIES)
        self._byte_quota = int(max_bytes * frontier) // len(CATEGORIES) if self._quota else 0
        self._clear()

    def _clear(self) -> None:
        self._columns = {name: torch.zeros(self.capacity, dtype=dtype) for name, dtype in _COLUMNS.items()}
        self._c: dict[str, Any] = {name: column.numpy() for name, column in self._columns.items()}
        self._store = RowStore(self.capacity, self.mask, self.memory_map, self.owner, self.labels, self.label_pad)
        self._rng = np.random.default_rng(self.seed)
        self._free = list(range(self.capacity - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._limit = self.capacity - self._quota * len(CATEGORIES)  # rows of the reservoir
        self._seen: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  # slots of the reservoir, by family
        self._frontier: list[list[int]] = [[] for _ in CATEGORIES]
        self._place: Any = np.zeros((2, self.capacity), np.int64)  # in those lists
        self._num_held = 0
        self._held_bytes, self._frontier_bytes = 0, [0] * len(CATEGORIES)
        self._lengths = [0, 0]  # bytes of all rows offered, and their number
        self._was_full = False  # of bytes
        self._recent: Any = np.zeros((3, _WINDOW))  # losses of failures, of successes, of all
        self._num_recent = [0, 0, 0]
        self._until_refresh = 0
        self._touched: set[int] = set()  # slots whose priority is out of date
        self._bounds = [math.nan] * 4

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._slot_of

    @property
    def num_seen(self) -> int:
        """Rows pushed so far."""
        return sum(self._seen.values())

    @property
    def num_bytes(self) -> int:
        """Memory of the rows, with their bookkeeping."""
        return self._store.num_bytes + _ROW_OVERHEAD * len(self)

    def _bytes_of(self, slot: int) -> int:
        return self._store.length(slot) + _ROW_OVERHEAD

    @property
    def num_in_reservoir(self) -> int:
        """Rows of the fair sample."""
        return self._num_held

    @property
    def families(self) -> dict[int, int]:
        """Rows of the reservoir, by family."""
        return {family: len(slots) for family, slots in self._held.items() if slots}

    @property
    def categories(self) -> dict[str, int]:
        """Rows of each part of the frontier."""
        return {name: len(slots) for name, slots in zip(CATEGORIES, self._frontier, strict=True)}

    @property
    def pads(self) -> dict[str, float]:
        """What fills up shorter rows, by field."""
        return self._store.pads

    @property
    def sequences(self) -> list[str]:
        """Fields whose rows have lengths of their own."""
        return self._store.sequences

    @property
    def padded_at_front(self) -> bool:
        """Whether rows are filled up there."""
        return self._store.padded_at_front

    def column(self, name: str) -> Tensor:
        """A score or label of all stored rows, by slot: "loss", "best_loss", "success", "best_success", "sample_id",
        "family", "stage", "step", "replays", "category" or "in_reservoir".
        """
        return self._columns[name][self.slots()]

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
        """Offer rows; they are kept or not.

        Args:
            rows: Fields, ``(B, ...)`` each.
            loss: ``(B,)``; NaN where it is not known.
            success: ``(B,)`` in [0, 1]; NaN where it is not known.
            sample_id: ``(B,)``, whole numbers. Default: one made of each row's content.
            family: ``(B,)``, whole numbers.
            extras: More for each row, of any length: ``B`` tensors ``(n, ...)`` each.
            stage: Of training.
            step: Of training.

        Returns:
            The slot of each row, -1 where it was not kept.

        Raises:
            ValueError: If rows are no tensors, fields differ from those of earlier rows, or lengths do not agree.
        """
        rows = rows_of(rows)
        size = len(next(iter(rows.values())))
        bytes_before = self._store.num_bytes
        packed = self._store.pack(rows, extras or {})
        if self._store.num_bytes != bytes_before:  # numbers came that no longer fit into half the bits
            self._count_bytes()
        contents = packed.ids()
        ids = _listed(sample_id, size, "sample_id", whole=True) if sample_id is not None else contents
        losses = _listed(loss, size, "loss") if loss is not None else [math.nan] * size
        successes = _listed(success, size, "success") if success is not None else [math.nan] * size
        families = _listed(family, size, "family", whole=True) if family is not None else [0] * size
        chances, places = self._rng.random((2, size)).tolist()
        if self._until_refresh <= 0:
            self._refresh()
        self._until_refresh -= size
        priorities = self._priorities(torch.tensor(losses), torch.tensor(successes)).tolist()
        kept = []
        for i in range(size):
            one_family = families[i]
            if one_family not in self._seen and len(self._seen) >= _MOST_FAMILIES:
                one_family = next(iter(self._seen))
            self._seen[one_family] = self._seen.get(one_family, 0) + 1
            self._remember(losses[i], successes[i])
            slot = self._slot_of.get(ids[i])
            if slot is not None:
                self._rescore(slot, losses[i], successes[i], priorities[i])
                kept.append(slot if ids[i] in self._slot_of else -1)
                continue
            length = packed.length(i) + _ROW_OVERHEAD
            self._lengths = [self._lengths[0] + length, self._lengths[1] + 1]
            category = self._category(losses[i], successes[i])
            if category and not self._makes_room_in(category, priorities[i], length):
                category = 0
            fair = self._makes_room(one_family, chances[i], places[i], length)
            if not (fair or category):
                kept.append(-1)
                continue
            slot = self._free.pop()
            self._slot_of[ids[i]] = slot
            scores = (losses[i], losses[i], successes[i], successes[i])
            values = (ids[i], one_family, *scores, stage, step, 0, priorities[i], 0, False, contents[i])
            for name, value in zip(_COLUMNS, values, strict=True):
                self._c[name][slot] = value
            self._store.put(slot, packed, i)
            if fair:
                self._join_reservoir(slot, one_family)
            if category:
                self._join_frontier(slot, category)
            kept.append(slot)
        return kept

    def content_of(self, sample_id: int) -> int | None:
        """The number made of a stored row's content, as `ids_of` makes it; ``None`` if it is not stored."""
        slot = self._slot_of.get(sample_id)
        return None if slot is None else int(self._c["content"][slot])

    def ids_of(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Numbers made of each row's content, ``(B,)``, whatever its padding: its ``sample_id`` where it has none."""
        return torch.tensor(self._store.pack(rows_of(rows), {}).ids())

    def sample(self, batch_size: int, strategy: Strategy = "uniform", counted: bool = True) -> Replay:
        """Draw rows without replacement.

        Args:
            batch_size: How many; fewer where fewer are stored.
            strategy: "uniform" over the reservoir, which is uniform over everything seen; "balanced": families alike;
                "near_threshold": the near successes and near failures; "edge_cases": those; both filled up from the
                reservoir; "priority": in proportion to `replay_priority` to the power of ``alpha``, with importance
                weights.
            counted: Whether it is a replay of each, after which others come first under "priority".

        Raises:
            ValueError: If nothing is stored, or there is no such strategy.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"`sample(strategy={strategy!r})` must be one of {list(STRATEGIES)}.")
        if batch_size < 1:
            raise ValueError(f"`ReplayBuffer.sample(batch_size={batch_size})` must be at least 1.")
        if not self._slot_of:
            raise ValueError("`ReplayBuffer.sample`: nothing is stored.")
        weights = torch.ones(min(batch_size, len(self)))
        if strategy == "priority":
            slots, weights = self._by_priority(len(weights))
        elif strategy == "balanced":
            slots = self._balanced(len(weights))
        else:
            wanted = {"near_threshold": (0, 1), "edge_cases": (2,)}.get(strategy, ())
            slots = self._drawn([slot for place in wanted for slot in self._frontier[place]], len(weights))
        slots = self._filled_up(slots, len(weights))
        if counted:
            self._c["replays"][np.array(slots)] += 1
            self._touched.update(slots)
        return self._read(slots, weights)

    def read(self, slots: Sequence[int]) -> Replay:
        """Rows by slot; no replay is counted."""
        return self._read([int(slot) for slot in slots], torch.ones(len(slots)))

    def _read(self, slots: list[int], weights: Tensor) -> Replay:
        rows, extras = self._store.read(slots)
        places = torch.tensor(slots, dtype=torch.int64)
        score = {name: self._columns[name][places] for name in ("sample_id", "loss", "success")}
        return Replay(rows, extras, slots, weights=weights, **score)

    def slots(self) -> list[int]:
        """Those in use, in order."""
        return self._used().tolist()  # type: ignore[no-any-return]

    def _used(self) -> Any:
        return np.flatnonzero(self._c["in_reservoir"] | (self._c["category"] > 0))

    def update(self, replay: Replay, loss: Tensor, success: Tensor | None = None) -> None:
        """Tell how replayed rows did. A row that has left the buffer since is passed over.

        Args:
            replay: As it was drawn.
            loss: ``(B,)``.
            success: ``(B,)``, or ``None`` where it is not known: what was known last stays.
        """
        losses = _listed(loss, len(replay), "loss")
        successes = [math.nan] * len(replay) if success is None else _listed(success, len(replay), "success")
        ids = replay.sample_id.tolist()
        priorities = self._priorities(torch.tensor(losses), torch.tensor(successes)).tolist()
        for slot, id, *scores in zip(replay.slots, ids, losses, successes, priorities, strict=True):
            if self._slot_of.get(id) == slot:
                self._rescore(slot, *scores)
        self._touched.update(replay.slots)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain tensors, numbers and lists."""
        slots = self.slots()
        return {
            "rows": self._store.state_dict(slots),
            "slots": torch.tensor(slots, dtype=torch.int64),
            "free": torch.tensor(self._free, dtype=torch.int64),
            "columns": {name: column[slots].clone() for name, column in self._columns.items()},
            "held": {family: list(held) for family, held in self._held.items()},
            "frontier": [list(part) for part in self._frontier],
            "seen": dict(self._seen),
            "lengths": [*self._lengths, self._was_full],
            "recent": torch.from_numpy(self._recent.copy()),
            "num_recent": list(self._num_recent),
            "bounds": [self._until_refresh, *self._bounds],
            "rng": self._rng.bit_generator.state,
            "touched": sorted(self._touched),
            "capacity": [self.capacity, self._quota, self.max_bytes],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, exactly; with other limits as far as its rows fit, by chance."""
        if state_dict["capacity"] != [self.capacity, self._quota, self.max_bytes]:
            self.load_shard([state_dict], rank=0, world_size=1)
            return
        self._clear()
        slots = state_dict["slots"].tolist()
        for name, column in state_dict["columns"].items():
            self._columns[name][slots] = column
        self._store.load(state_dict["rows"], dict(enumerate(slots)))
        self._slot_of = dict(zip(state_dict["columns"]["sample_id"].tolist(), slots, strict=True))
        self._free = state_dict["free"].tolist()
        self._held = {int(family): list(held) for family, held in state_dict["held"].items()}
        self._frontier = [list(part) for part in state_dict["frontier"]]
        for row, lists in enumerate((self._held.values(), self._frontier)):
            for members in lists:
                self._place[row][members] = range(len(members))
        self._num_held = sum(map(len, self._held.values()))
        self._seen = {int(family): count for family, count in state_dict["seen"].items()}
        *self._lengths, self._was_full = state_dict["lengths"]
        self._count_bytes()
        self._touched = set(state_dict["touched"])
        self._recent = state_dict["recent"].numpy().copy()
        self._num_recent = list(state_dict["num_recent"])
        self._until_refresh, *self._bounds = state_dict["bounds"]
        self._rng.bit_generator.state = state_dict["rng"]

    def load_shard(self, states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> None:
        """Take this process's share of what other numbers of processes had stored.

        Args:
            states: `state_dict` of every process that wrote the checkpoint.
            rank: Of this process.
            world_size: Number of processes now.
        """
        self._clear()
        self._rng = np.random.default_rng([self.seed, rank, world_size])
        states = [state for state in states if len(state["slots"])]
        rows = [(number, i) for number, state in enumerate(states) for i in range(len(state["slots"]))]
        mine = rows[rank::world_size]
        for number, i in (mine[place] for place in self._rng.permutation(len(mine))):  # whoever fits is a fair sample
            state = states[number]
            self._take_over(state["rows"], i, {name: column[i].item() for name, column in state["columns"].items()})
        seen: dict[int, int] = {}
        for state in states:
            for family, count in state["seen"].items():
                seen[int(family)] = seen.get(int(family), 0) + count
        for family, count in seen.items():
            self._seen[family] = max(len(self._held.get(family, [])), count // world_size)
        # Whose losses the quantiles are of makes no difference: all processes see the same task.
        if states:
            state = states[rank % len(states)]
            self._recent, self._num_recent = state["recent"].numpy().copy(), list(state["num_recent"])
            self._until_refresh, *self._bounds = state["bounds"]
            *self._lengths, self._was_full = state["lengths"]

    def _take_over(self, rows: Mapping[str, Any], i: int, row: dict[str, Any]) -> None:
        length, category = int(rows["lengths"][i]) + _ROW_OVERHEAD, row["category"]
        if row["sample_id"] in self._slot_of:
            return
        budget = self.max_bytes - self._byte_quota * len(CATEGORIES)
        fair = row["in_reservoir"] and self._num_held < self._limit and self._held_bytes + length <= budget
        if category:
            full = len(self._frontier[category - 1]) >= self._quota
            category = 0 if full or self._frontier_bytes[category - 1] + length > self._byte_quota else category
        if not (fair or category):
            return
        slot = self._free.pop()
        self._slot_of[row["sample_id"]] = slot
        for name, value in row.items():
            self._c[name][slot] = value
        self._c["in_reservoir"][slot], self._c["category"][slot] = False, 0
        self._store.load(rows, {i: slot})
        if fair:
            self._join_reservoir(slot, row["family"])
        if category:
            self._join_frontier(slot, category)

    # Who stays.

    def _makes_room(self, family: int, chance: float, place: float, length: int) -> bool:
        """Whether a new row enters the reservoir; if so, there is room for it."""
        budget = self.max_bytes - self._byte_quota * len(CATEGORIES)
        if self._limit == 0 or length > budget:
            return False
        self._was_full |= self._held_bytes + length > budget
        if not self._was_full and self._num_held < self._limit:
            return True
        # Where bytes are what is short, as many rows as fit of the mean length of all, so that none is favoured.
        room = min(self._limit, budget * self._lengths[1] / self._lengths[0]) if self._was_full else self._limit
        held = self._held.setdefault(family, [])
        share = room / len(self._held)
        largest = max(self._held.values(), key=len)
        if share < 1:  # more families than room: all are one
            if chance >= room / self.num_seen:
                return False
            from_ = None
        elif len(held) < math.floor(share) and len(largest) > len(held) + 1:
            from_ = largest
        elif chance < min(share, max(1, len(held))) / self._seen[family]:
            from_ = held
        else:
            return False
        while self._num_held >= self._limit or self._held_bytes + length > budget:
            members = from_ or self._any_held(place)
            self._leave_reservoir(members[int(place * len(members))])
            place = float(self._rng.random())
        return True

    def _count_bytes(self) -> None:
        self._held_bytes = sum(self._bytes_of(slot) for held in self._held.values() for slot in held)
        self._frontier_bytes = [sum(map(self._bytes_of, part)) for part in self._frontier]

    def _any_held(self, place: float) -> list[int]:
        """The members of a family, drawn in proportion to their number."""
        at = place * self._num_held
        for members in self._held.values():
            at -= len(members)
            if at < 0:
                return members
        return max(self._held.values(), key=len)

    def _makes_room_in(self, category: int, priority: float, length: int) -> bool:
        """Whether there is room in a part of the frontier, if need be that of the least important of a few."""
        part = self._frontier[category - 1]
        if self._quota == 0 or length > self._byte_quota:
            return False
        while len(part) >= self._quota or self._frontier_bytes[category - 1] + length > self._byte_quota:
            rivals = [part[int(u * len(part))] for u in self._rng.random(_RIVALS).tolist()]
            weakest = min(rivals, key=self._c["priority"].__getitem__)
            if priority < self._c["priority"][weakest]:
                return False
            self._leave_frontier(weakest)
        return True

    def _join_reservoir(self, slot: int, family: int) -> None:
        held = self._held.setdefault(family, [])
        self._place[0, slot] = len(held)
        held.append(slot)
        self._c["in_reservoir"][slot] = True
        self._num_held += 1
        self._held_bytes += self._bytes_of(slot)

    def _leave_reservoir(self, slot: int) -> None:
        self._swap_out(self._held[int(self._c["family"][slot])], 0, slot)
        self._c["in_reservoir"][slot] = False
        self._num_held -= 1
        self._held_bytes -= self._bytes_of(slot)
        self._drop_if_unused(slot)

    def _join_frontier(self, slot: int, category: int) -> None:
        part = self._frontier[category - 1]
        self._place[1, slot] = len(part)
        part.append(slot)
        self._frontier_bytes[category - 1] += self._bytes_of(slot)
        self._c["category"][slot] = category

    def _leave_frontier(self, slot: int) -> None:
        self._pull_from_frontier(slot)
        self._drop_if_unused(slot)

    def _pull_from_frontier(self, slot: int) -> None:
        place = int(self._c["category"][slot]) - 1
        self._swap_out(self._frontier[place], 1, slot)
        self._frontier_bytes[place] -= self._bytes_of(slot)
        self._c["category"][slot] = 0

    def _swap_out(self, members: list[int], row: int, slot: int) -> None:
        place, last = int(self._place[row, slot]), members.pop()
        if last != slot:
            members[place] = last
            self._place[row, last] = place

    def _drop_if_unused(self, slot: int) -> None:
        if self._c["in_reservoir"][slot] or self._c["category"][slot]:
            return
        self._store.free(slot)
        del self._slot_of[int(self._c["sample_id"][slot])]
        self._free.append(slot)

    # What is known of them.

    def _rescore(self, slot: int, loss: float, success: float, priority: float) -> None:
        c = self._c
        success = float(c["success"][slot]) if math.isnan(success) else success
        c["loss"][slot], c["success"][slot] = loss, success
        c["best_loss"][slot] = np.fmin(c["best_loss"][slot], loss)
        c["best_success"][slot] = np.fmax(c["best_success"][slot], success)
        before, now = int(c["category"][slot]), self._category(loss, success)
        if before == now:
            return
        c["priority"][slot] = priority
        if now and not self._makes_room_in(now, priority, self._bytes_of(slot)):
            now = 0
        if before:
            self._pull_from_frontier(slot)
        if now:
            self._join_frontier(slot, now)
        else:
            self._drop_if_unused(slot)

    def _remember(self, loss: float, success: float) -> None:
        if math.isfinite(loss):
            rows = (2,) if math.isnan(success) else (2, int(success >= 0.5))
            for row in rows:
                self._recent[row, self._num_recent[row] % _WINDOW] = loss
                self._num_recent[row] += 1

    def _refresh(self) -> None:
        """From the window: where near failures end, near successes begin, and losses are odd. And all priorities."""
        self._until_refresh = _REFRESH
        wanted = ((0, 1 / 3), (1, 2 / 3), (2, 0.1), (2, 0.9))
        for i, (row, quantile) in enumerate(wanted):
            count = min(self._num_recent[row], _WINDOW)
            known = count >= _FEWEST
            self._bounds[i] = float(np.quantile(self._recent[row, :count], quantile)) if known else math.nan
        self._prioritise(slice(None))

    def _category(self, loss: float, success: float) -> int:
        """1 to 3 as `CATEGORIES`; 0 for none. A bound that is not known yet is never passed."""
        near_failure, near_success, low, high = self._bounds
        if success >= 0.5:
            return 3 if loss >= high else 1 if loss >= near_success else 0
        if success < 0.5:
            return 3 if loss <= low else 2 if loss <= near_failure else 0
        return 0

    @property
    def threshold(self) -> float:
        """Loss at which success and failure meet, between the hardest successes and the easiest failures; NaN while
        neither is known.
        """
        near_failure, near_success = self._bounds[:2]
        known = [bound for bound in (near_failure, near_success) if not math.isnan(bound)]
        return sum(known) / len(known) if known else math.nan

    def _priorities(
        self,
        loss: Tensor,
        success: Tensor,
        best_loss: Tensor | None = None,
        best_success: Tensor | None = None,
        replays: Tensor | None = None,
    ) -> Tensor:
        """Of rows; without their history, as if they were new."""
        low, high = self._bounds[2:]
        scale = max(1e-3, (high - low) / 4) if high > low else 1.0
        best_loss, best_success = (
            loss if best_loss is None else best_loss,
            success if best_success is None else best_success,
        )
        replays = torch.zeros(len(loss)) if replays is None else replays
        return replay_priority(loss, best_loss, success, best_success, replays, self.threshold, scale)

    def _prioritise(self, slots: slice | None = None) -> None:
        """Bring priorities up to date, of rows that were touched or of these, by all that is known of them."""
        where = torch.tensor(sorted(self._touched), dtype=torch.int64) if slots is None else slots
        self._touched.clear()
        names = ("loss", "success", "best_loss", "best_success", "replays")
        known = (self._columns[name][where] for name in names)
        self._columns["priority"][where] = self._priorities(*known)

    # Who is drawn.

    def _drawn(self, slots: Sequence[int], count: int) -> list[int]:
        if len(slots) == 0:
            return []
        return [slots[i] for i in self._rng.permutation(len(slots))[:count]]

    def _filled_up(self, slots: list[int], count: int) -> list[int]:
        """With rows of the reservoir, then of anything."""
        taken = set(slots)
        while len(slots) < count and self._num_held > 4 * count:
            more = [slot for slot in self._of_reservoir(count - len(slots)) if slot not in taken]
            slots, taken = slots + more, taken | set(more)
        if len(slots) >= count:
            return slots
        for source in ([s for held in self._held.values() for s in held], self.slots()):
            slots = slots + self._drawn([s for s in source if s not in taken], count - len(slots))
            taken.update(slots)
        return slots

    def _of_reservoir(self, count: int) -> list[int]:
        """Few of many: no list of all is made."""
        lists = [held for held in self._held.values() if held]
        ends = np.cumsum([len(held) for held in lists])
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            places = self._rng.integers(0, self._num_held, count - len(chosen))
            which = np.searchsorted(ends, places, side="right")
            starts = ends[which] - [len(lists[i]) for i in which.tolist()]
            for i, place in zip(which.tolist(), (places - starts).tolist(), strict=True):
                chosen[lists[i][place]] = None
        return list(chosen)

    def _balanced(self, count: int) -> list[int]:
        """Families in turn, in random order."""
        order = [self._drawn(held, len(held) if len(held) <= count else count) for held in self._held.values() if held]
        order = [order[i] for i in self._rng.permutation(len(order))]
        turns = max((len(drawn) for drawn in order), default=0)
        return [drawn[turn] for turn in range(turns) for drawn in order if turn < len(drawn)][:count]

    def _by_priority(self, count: int) -> tuple[list[int], Tensor]:
        if len(self._touched) > _MOST_TOUCHED:
            self._prioritise()
        used = torch.from_numpy(self._used())
        log_weights = self._columns["priority"][used].log_().mul_(self.alpha)
        noise = torch.from_numpy(self._rng.random(len(used), dtype=np.float32))
        places = gumbel_top_k(log_weights, count, noise)
        probability = torch.exp(log_weights[places] - log_weights.logsumexp(0))
        return used[places].tolist(), importance_weights(probability, len(used), self.beta)


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
        raise ValueError(f"`{name}` is {tuple(tensor.shape)} for {size} rows, and must be ({size},).")
    if whole and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"`{name}` must be whole numbers, and is {str(tensor.dtype).removeprefix('torch.')}.")
    return list(tensor.tolist() if whole else tensor.float().tolist())
