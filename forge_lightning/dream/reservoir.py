"""Reservoir: a fair sample of everything seen, with equal shares for families."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_MOST_FAMILIES = 4096  # counted separately; beyond them all are one


class SlotLists:
    """Lists of slots, from which a slot is removed in constant time.

    Args:
        capacity: Number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self._place: Any = np.zeros(capacity, np.int64)  # of a slot, in the list that holds it

    def append(self, members: list[int], slot: int) -> None:
        """Add a slot to one of the lists."""
        self._place[slot] = len(members)
        members.append(slot)

    def remove(self, members: list[int], slot: int) -> None:
        """Remove a slot from the list that holds it. The last one takes its place."""
        place, last = int(self._place[slot]), members.pop()
        if last != slot:
            members[place] = last
            self._place[last] = place

    def restore(self, members: list[int]) -> None:
        """Take over a list that was saved."""
        self._place[members] = range(len(members))


class Reservoir:
    """Decides which examples are kept, whatever their scores; knows them by their slots.

    Args:
        limit: Examples at most.
        budget: Bytes at most.
        capacity: Number of slots.
        bytes_of: Bytes that the example in a slot takes.
    """

    def __init__(self, limit: int, budget: int, capacity: int, bytes_of: Callable[[int], int]) -> None:
        self.limit, self.budget = limit, budget
        self.seen: dict[int, int] = {}
        """Examples offered so far, by family."""
        self.held: dict[int, list[int]] = {}
        """Slots, by family."""
        self.num_held, self.num_bytes = 0, 0
        self.lengths = [0, 0]
        """Bytes of all new examples offered, and their number."""
        self.was_full = False
        """Whether it was ever full of bytes."""
        self._bytes_of = bytes_of
        self._lists = SlotLists(capacity)

    def slots(self) -> list[int]:
        """All slots, family by family."""
        return [slot for members in self.held.values() for slot in members]

    def count(self, family: int) -> int:
        """Count an example that is offered. Returns the family that it counts for."""
        if family not in self.seen and len(self.seen) >= _MOST_FAMILIES:
            family = next(iter(self.seen))
        self.seen[family] = self.seen.get(family, 0) + 1
        return family

    def make_room(
        self,
        family: int,
        chance: float,
        place: float,
        length: int,
        rng: np.random.Generator,
        evict: Callable[[int], None],
    ) -> bool:
        """Decide whether a new example enters. If so, there is room for it.

        Args:
            family: As `count` returned it.
            chance: Uniform in [0, 1), decides whether it enters.
            place: Uniform in [0, 1), decides who leaves.
            length: Bytes of the example.
            rng: Random generator, for where more than one has to leave.
            evict: Called with each slot that leaves; has to call `leave`.
        """
        if self.limit == 0 or length > self.budget:
            return False
        self.was_full |= self.num_bytes + length > self.budget
        if not self.was_full and self.num_held < self.limit:
            return True
        # Where bytes run out first, as many examples as fit at the mean length of all, so that short ones gain nothing.
        room = min(self.limit, self.budget * self.lengths[1] / self.lengths[0]) if self.was_full else self.limit
        members = self.held.setdefault(family, [])
        share = room / len(self.held)
        largest = max(self.held.values(), key=len)
        if share < 1:  # more families than room: all are one
            if chance >= room / sum(self.seen.values()):
                return False
            losers = None
        elif len(members) < math.floor(share) and len(largest) > len(members) + 1:
            losers = largest
        elif chance < min(share, max(1, len(members))) / self.seen[family]:
            losers = members
        else:
            return False
        while self.num_held >= self.limit or self.num_bytes + length > self.budget:
            chosen = losers or self._any_family(place)
            evict(chosen[int(place * len(chosen))])
            place = float(rng.random())
        return True

    def _any_family(self, place: float) -> list[int]:
        """The members of a family, drawn in proportion to their number."""
        at = place * self.num_held
        for members in self.held.values():
            at -= len(members)
            if at < 0:
                return members
        return max(self.held.values(), key=len)

    def has_room(self, length: int) -> bool:
        """Whether an example fits without another one leaving."""
        return self.num_held < self.limit and self.num_bytes + length <= self.budget

    def join(self, slot: int, family: int) -> None:
        """Hold the example in a slot."""
        self._lists.append(self.held.setdefault(family, []), slot)
        self.num_held += 1
        self.num_bytes += self._bytes_of(slot)

    def leave(self, slot: int, family: int) -> None:
        """Hold it no longer."""
        self._lists.remove(self.held[family], slot)
        self.num_held -= 1
        self.num_bytes -= self._bytes_of(slot)

    def recount(self) -> None:
        """Count bytes again, after examples have changed their size."""
        self.num_bytes = sum(map(self._bytes_of, self.slots()))

    def sample(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draw a few of many, without a list of all."""
        lists = [members for members in self.held.values() if members]
        ends = np.cumsum([len(members) for members in lists])
        chosen: dict[int, None] = {}
        while len(chosen) < count:
            places = rng.integers(0, self.num_held, count - len(chosen))
            which = np.searchsorted(ends, places, side="right")
            starts = ends[which] - [len(lists[i]) for i in which.tolist()]
            for i, place in zip(which.tolist(), (places - starts).tolist(), strict=True):
                chosen[lists[i][place]] = None
        return list(chosen)

    def balanced_sample(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draw families in turn, in random order."""
        order = [draw(members, min(count, len(members)), rng) for members in self.held.values() if members]
        order = [order[i] for i in rng.permutation(len(order))]
        turns = max((len(drawn) for drawn in order), default=0)
        return [drawn[turn] for turn in range(turns) for drawn in order if turn < len(drawn)][:count]

    def load(self, held: Mapping[Any, Any], seen: Mapping[Any, Any], lengths: Any) -> None:
        """Restore what was saved of ``held``, ``seen``, and ``lengths`` with ``was_full`` behind it."""
        self.held = {int(family): list(members) for family, members in held.items()}
        for members in self.held.values():
            self._lists.restore(members)
        self.num_held = sum(map(len, self.held.values()))
        self.seen = {int(family): count for family, count in seen.items()}
        self.load_lengths(lengths)
        self.recount()

    def load_lengths(self, lengths: Any) -> None:
        """Restore ``lengths`` and ``was_full`` alone."""
        *self.lengths, self.was_full = lengths


def draw(slots: Any, count: int, rng: np.random.Generator) -> list[int]:
    """Draw slots without replacement, in random order."""
    if len(slots) == 0:
        return []
    return [slots[i] for i in rng.permutation(len(slots))[:count]]
