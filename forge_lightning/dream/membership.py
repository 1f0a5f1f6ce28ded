"""Which slots hold an example, and who holds it: the reservoir, the frontier or both."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from forge_lightning.dream.frontier import CATEGORIES, Frontier
from forge_lightning.dream.reservoir import Reservoir, draw
from forge_lightning.dream.score_table import ScoreTable


class Membership:
    """Slots of a buffer's examples. An example that neither reservoir nor frontier holds any longer is dropped.

    Args:
        capacity: Number of slots.
        frontier: Share of them for the frontier, in [0, 1).
        max_bytes: Bytes at most, divided like the slots.
        scores: The table where membership is noted: its columns "in_reservoir" and "category".
        bytes_of: Bytes that the example in a slot takes.
        rng: Random generator for who leaves.
        drop: Called with the slot of an example that is dropped.
    """

    def __init__(
        self,
        capacity: int,
        frontier: float,
        max_bytes: int,
        scores: ScoreTable,
        bytes_of: Callable[[int], int],
        rng: np.random.Generator,
        drop: Callable[[int], None],
    ) -> None:
        quota = int(capacity * frontier) // len(CATEGORIES)
        byte_quota = int(max_bytes * frontier) // len(CATEGORIES) if quota else 0
        limit, budget = capacity - len(CATEGORIES) * quota, max_bytes - len(CATEGORIES) * byte_quota
        self.reservoir = Reservoir(limit, budget, capacity, bytes_of)
        self.frontier = Frontier(quota, byte_quota, capacity, bytes_of)
        self.limits = [capacity, quota, max_bytes]
        self.slot_of: dict[int, int] = {}
        """Slot of each stored example, by its identifier."""
        self._free = list(range(capacity - 1, -1, -1))
        self._scores, self._bytes_of, self._rng, self._drop = scores, bytes_of, rng, drop

    def make_room(
        self, family: int, category: int, chance: float, place: float, priority: float, length: int
    ) -> tuple[bool, int]:
        """Decide whether a new example enters, and make room for it.

        Args:
            family: As `Reservoir.count` returned it.
            category: Part of the frontier that it is for, 1 to 3, or 0.
            chance: Uniform in [0, 1), decides whether the reservoir takes it.
            place: Uniform in [0, 1), decides who leaves the reservoir.
            priority: Its priority.
            length: Bytes that it takes.

        Returns:
            Whether the reservoir takes it, and the part of the frontier that does, or 0.
        """
        lengths = self.reservoir.lengths
        self.reservoir.lengths = [lengths[0] + length, lengths[1] + 1]
        if category and not self._make_room_in_frontier(category, priority, length):
            category = 0
        fair = self.reservoir.make_room(family, chance, place, length, self._rng, self._evict_from_reservoir)
        return fair, category

    def room_for(self, row: Mapping[str, Any], length: int) -> tuple[bool, int]:
        """As `make_room`, for an example that was stored elsewhere; no other one leaves for it."""
        if row["sample_id"] in self.slot_of:
            return False, 0
        category = row["category"]
        fair = row["in_reservoir"] and self.reservoir.has_room(length)
        return fair, category if category and self.frontier.has_room(category, length) else 0

    def take_slot(self, sample_id: int) -> int:
        """Give a new example a slot. It has to `join` next."""
        slot = self.slot_of[sample_id] = self._free.pop()
        return slot

    def join(self, slot: int, family: int, fair: bool, category: int) -> None:
        """Hold a stored example, in the reservoir if ``fair``, and in a part of the frontier if ``category``."""
        if fair:
            self.reservoir.join(slot, family)
            self._scores.arrays["in_reservoir"][slot] = True
        if category:
            self._join_frontier(slot, category)

    def rescore(self, slot: int, loss: float, success: float, priority: float) -> None:
        """Write an example's scores. It may enter the frontier, change its part, or leave it."""
        arrays = self._scores.arrays
        success = float(arrays["success"][slot]) if math.isnan(success) else success
        self._scores.rescore(slot, loss, success)
        before, now = int(arrays["category"][slot]), self._scores.quantiles.category(loss, success)
        if before == now:
            return
        arrays["priority"][slot] = priority
        if now and not self._make_room_in_frontier(now, priority, self._bytes_of(slot)):
            now = 0
        if before:
            self._leave_frontier(slot)
        if now:
            self._join_frontier(slot, now)
        else:
            self._drop_if_unused(slot)

    def recount(self) -> None:
        """Count bytes again, after examples have changed their size."""
        self.reservoir.recount()
        self.frontier.recount()

    def filled_up(self, slots: list[int], count: int) -> list[int]:
        """Add examples of the reservoir, then any others, up to ``count``."""
        taken = set(slots)
        while len(slots) < count and self.reservoir.num_held > 4 * count:
            more = [s for s in self.reservoir.sample(count - len(slots), self._rng) if s not in taken]
            slots, taken = slots + more, taken | set(more)
        if len(slots) >= count:
            return slots
        for source in (self.reservoir.slots(), self._scores.used().tolist()):
            slots = slots + draw([s for s in source if s not in taken], count - len(slots), self._rng)
            taken.update(slots)
        return slots

    def state_dict(self) -> dict[str, Any]:
        """Who is held where, as plain numbers and lists."""
        return {
            "free": list(self._free),
            "held": {family: list(held) for family, held in self.reservoir.held.items()},
            "frontier": [list(part) for part in self.frontier.parts],
            "seen": dict(self.reservoir.seen),
            "lengths": [*self.reservoir.lengths, self.reservoir.was_full],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], slot_of: dict[int, int]) -> None:
        """Restore from `state_dict`, with the slot of each identifier."""
        self.slot_of, self._free = slot_of, list(map(int, state_dict["free"]))
        self.reservoir.load(state_dict["held"], state_dict["seen"], state_dict["lengths"])
        self.frontier.load(state_dict["frontier"])

    def _make_room_in_frontier(self, category: int, priority: float, length: int) -> bool:
        priorities = self._scores.arrays["priority"]
        return self.frontier.make_room(category, priority, length, priorities, self._rng, self._evict_from_frontier)

    def _join_frontier(self, slot: int, category: int) -> None:
        self.frontier.join(slot, category)
        self._scores.arrays["category"][slot] = category

    def _leave_frontier(self, slot: int) -> None:
        self.frontier.leave(slot, int(self._scores.arrays["category"][slot]))
        self._scores.arrays["category"][slot] = 0

    def _evict_from_reservoir(self, slot: int) -> None:
        self.reservoir.leave(slot, int(self._scores.arrays["family"][slot]))
        self._scores.arrays["in_reservoir"][slot] = False
        self._drop_if_unused(slot)

    def _evict_from_frontier(self, slot: int) -> None:
        self._leave_frontier(slot)
        self._drop_if_unused(slot)

    def _drop_if_unused(self, slot: int) -> None:
        if self._scores.arrays["in_reservoir"][slot] or self._scores.arrays["category"][slot]:
            return
        self._drop(slot)
        del self.slot_of[int(self._scores.arrays["sample_id"][slot])]
        self._free.append(slot)
