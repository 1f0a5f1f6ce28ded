"""Frontier: the examples that a model gets barely right or barely wrong."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from forge_lightning.dream.reservoir import SlotLists

CATEGORIES = ("near_success", "near_failure", "edge_case")
"""Parts of the frontier, numbered from 1."""
_WINDOW = 512  # losses that quantiles are taken over
_FEWEST = 24  # losses that make a quantile
_RIVALS = 16  # of which the least important leaves
_QUANTILES = ((0, 1 / 3), (1, 2 / 3), (2, 0.1), (2, 0.9))
"""Row of the window (failures, successes, all losses) and quantile."""


class LossQuantiles:
    """Running quantiles of the last 512 losses, which say what is near the threshold of success."""

    def __init__(self) -> None:
        self._recent: Any = np.zeros((3, _WINDOW))  # losses of failures, of successes, of all
        self._num_recent = [0, 0, 0]
        self._bounds = [math.nan] * len(_QUANTILES)

    def add(self, loss: float, success: float) -> None:
        """Take the outcome of one example."""
        if not math.isfinite(loss):
            return
        rows = (2,) if math.isnan(success) else (2, int(success >= 0.5))
        for row in rows:
            self._recent[row, self._num_recent[row] % _WINDOW] = loss
            self._num_recent[row] += 1

    def refresh(self) -> None:
        """Compute the quantiles anew. A quantile of fewer than 24 losses is NaN."""
        for i, (row, quantile) in enumerate(_QUANTILES):
            count = min(self._num_recent[row], _WINDOW)
            known = count >= _FEWEST
            self._bounds[i] = float(np.quantile(self._recent[row, :count], quantile)) if known else math.nan

    def category(self, loss: float, success: float) -> int:
        """Number of the category, 1 to 3 as in `CATEGORIES`; 0 for none. A NaN bound is never passed."""
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
        known = [bound for bound in self._bounds[:2] if not math.isnan(bound)]
        return sum(known) / len(known) if known else math.nan

    @property
    def scale(self) -> float:
        """A quarter of the distance between the lowest and highest tenth of losses; 1 while unknown."""
        low, high = self._bounds[2:]
        return max(1e-3, (high - low) / 4) if high > low else 1.0

    def state(self) -> tuple[Any, list[int], list[float]]:
        """The window, its counts and the quantiles."""
        return self._recent.copy(), list(self._num_recent), list(self._bounds)

    def load(self, recent: Any, num_recent: list[int], bounds: list[float]) -> None:
        """Restore from `state`."""
        self._recent, self._num_recent, self._bounds = recent.copy(), list(num_recent), list(bounds)


class Frontier:
    """Slots of the examples near the threshold, in three parts of equal room.

    Args:
        quota: Examples of each part at most.
        byte_quota: Bytes of each part at most.
        capacity: Number of slots.
        bytes_of: Bytes that the example in a slot takes.
    """

    def __init__(self, quota: int, byte_quota: int, capacity: int, bytes_of: Callable[[int], int]) -> None:
        self.quota, self.byte_quota = quota, byte_quota
        self.parts: list[list[int]] = [[] for _ in CATEGORIES]
        self._num_bytes = [0] * len(CATEGORIES)
        self._bytes_of = bytes_of
        self._lists = SlotLists(capacity)

    def make_room(
        self, category: int, priority: float, length: int, priorities: Any, rng: Any, evict: Callable[[int], None]
    ) -> bool:
        """Decide whether an example enters a part. If so, there is room for it.

        Args:
            category: 1 to 3.
            priority: Priority of the example.
            length: Bytes of the example.
            priorities: By slot; the least important of 16 examples leaves, if the new one matters more.
            rng: Random generator, which draws the 16.
            evict: Called with each slot that leaves; has to call `leave`.
        """
        part = self.parts[category - 1]
        if self.quota == 0 or length > self.byte_quota:
            return False
        while not self.has_room(category, length):
            rivals = [part[int(u * len(part))] for u in rng.random(_RIVALS).tolist()]
            weakest = min(rivals, key=priorities.__getitem__)
            if priority < priorities[weakest]:
                return False
            evict(weakest)
        return True

    def has_room(self, category: int, length: int) -> bool:
        """Whether an example fits into a part without another one leaving."""
        place = category - 1
        return len(self.parts[place]) < self.quota and self._num_bytes[place] + length <= self.byte_quota

    def join(self, slot: int, category: int) -> None:
        """Hold the example in a slot."""
        self._lists.append(self.parts[category - 1], slot)
        self._num_bytes[category - 1] += self._bytes_of(slot)

    def leave(self, slot: int, category: int) -> None:
        """Hold it no longer."""
        self._lists.remove(self.parts[category - 1], slot)
        self._num_bytes[category - 1] -= self._bytes_of(slot)

    def recount(self) -> None:
        """Count bytes again, after examples have changed their size."""
        self._num_bytes = [sum(map(self._bytes_of, part)) for part in self.parts]

    def load(self, parts: Any) -> None:
        """Restore what was saved of ``parts``."""
        self.parts = [list(part) for part in parts]
        for part in self.parts:
            self._lists.restore(part)
        self.recount()
