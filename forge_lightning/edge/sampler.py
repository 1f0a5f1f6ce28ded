"""Draw training examples by difficulty, with any number of ranks and loader workers."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from forge_lightning.core.stateful_loader import ResumableSampler
from forge_lightning.edge.trackers import SkillTracker

_MOST_TIMES = 3  # that one example is drawn by its difficulty in as many draws as there are examples
_MOST_BLOCKS = 512  # drawn batches that are remembered while none is asked for


class DifficultySampler(ResumableSampler):
    """Draws examples of a chosen difficulty once `EdgeController` steers it; without one it shuffles.

    Examples of a data set that has a length: ``DifficultySampler(dataset, difficulty)`` yields their indices, in a new
    order each epoch while nothing steers it. Examples that are made when asked for: ``DifficultySampler(dataset,
    levels=...)`` yields ``(serial, level)`` with a number of its own for every example, so that the data set can make
    one of that level and put both into the batch.

    A `DistributedSampler`, the one kind that Lightning leaves alone. All ranks make the same choices, and each
    takes its share. With ``num_workers`` loader workers, choices are ``num_workers × prefetch_factor`` batches old when
    they are trained on; outcomes are credited to what was really drawn. In a `StatefulDataLoader` a run resumes inside
    an epoch with what was drawn ahead.

    Args:
        dataset: Map-style data set.
        difficulty: Difficulty of each example, ``(N,)``: a column of the data, `forge_lightning.functional`'s measures,
            or anything that orders them. Default: unknown, to be learned.
        levels: Difficulties at which examples can be made, ``(K,)``, instead of ``difficulty``.
        batch_size: Examples of a batch on one rank, as in the loader.
        num_samples: Examples of an epoch, over all ranks; needed with ``levels``. Default: the size of the data set.
        seed: Random seed for the order and the choices.

    Raises:
        TypeError: If the data set is iterable: its examples cannot be chosen.
        ValueError: If difficulties are missing, not finite, or all the same, or an argument is out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        difficulty: Any = None,
        levels: Any = None,
        batch_size: int = 32,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"`DifficultySampler` needs a data set with `__getitem__`; {type(dataset).__name__} is iterable: its"
                " examples come in their own order."
            )
        if batch_size < 1:
            raise ValueError(f"`DifficultySampler(batch_size={batch_size})` must be at least 1.")
        if levels is not None and (difficulty is not None or num_samples is None):
            raise ValueError("`DifficultySampler(levels=...)` goes with `num_samples`, and without `difficulty`.")
        self.makes_examples = levels is not None
        self.ordered = True  # by difficulty; otherwise arms of a bandit
        length = num_samples if levels is not None else len(dataset)  # type: ignore[arg-type]
        assert length is not None
        if length < 1:
            raise ValueError("`DifficultySampler`: there are no examples.")
        self.difficulty = _checked("levels", levels) if self.makes_examples else _checked("difficulty", difficulty)
        if self.difficulty is not None and not self.makes_examples and len(self.difficulty) != length:
            raise ValueError(f"`difficulty` has {len(self.difficulty)} numbers, and the data set {length} examples.")
        self.epoch_size = num_samples or length
        self.batch_size = batch_size
        self.num_arms = len(self.difficulty) if self.makes_examples and self.difficulty is not None else length
        super().__init__(range(length), shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.dataset = dataset
        self.policy: Any = None
        self._rng = np.random.default_rng(seed)
        self._serial = 0
        self.restored = False  # by the loader that holds it
        self.iteration, self.first = 0, 0  # epochs begun, and the batch that the running one began at
        self._drawn: deque[tuple[int, int, list[int]]] = deque(maxlen=_MOST_BLOCKS)  # batch of the epoch, serial, arms
        self._pending: list[tuple[int, list[int]]] = []
        self._by_difficulty = None if self.difficulty is None else np.argsort(self.difficulty, kind="stable")
        self._times = np.zeros(0 if self.makes_examples else length, np.int8)
        """How often each was drawn, in the order of difficulty, since as many were drawn as there are."""

    @property
    def num_examples(self) -> int:
        """Number of examples of an epoch, over all ranks."""
        return self.epoch_size

    def bind(self) -> None:
        """Read rank and world size from the running process group, if there is one."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.num_replicas, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.num_samples = math.ceil(self.epoch_size / self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[Any]:
        self.bind()
        start, self.start = self.start, 0
        pending, self._pending = (self._pending if start else []), []
        self._drawn.clear()
        self.iteration, self.first = self.iteration + 1, start // self.batch_size
        return self._batches(self.first, list(pending), self._order(self.epoch - self.shift))

    def _batches(self, first: int, pending: list[tuple[int, list[int]]], order: list[int]) -> Iterator[Any]:
        for block in range(first, math.ceil(self.num_samples / self.batch_size)):
            size = min(self.batch_size, self.num_samples - block * self.batch_size)
            if pending:
                serial, arms = pending.pop(0)
            else:
                begin = block * self.batch_size * self.num_replicas
                serial, arms = self._serial, self._draw(size * self.num_replicas, order, begin)
                self._serial += len(arms)
            self._drawn.append((block, serial, arms))
            for place in range(self.rank, len(arms), self.num_replicas):
                yield (serial + place, arms[place]) if self.makes_examples else arms[place]

    def _order(self, epoch: int) -> list[int]:
        """The shuffle of an epoch, over all ranks, which is drawn while nothing steers."""
        if self.makes_examples:
            return []
        order = torch.randperm(self.num_arms, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        return (order * math.ceil(self.total_size / len(order)))[: self.total_size]

    def _draw(self, count: int, order: list[int], begin: int) -> list[int]:
        """Arms of one batch over all ranks: indices of examples, or of levels."""
        if self.policy is None:
            if self.makes_examples:
                return [int(arm) for arm in self._rng.integers(0, self.num_arms, count)]
            return order[begin : begin + count]
        if isinstance(self.policy, SkillTracker):
            return self._nearest(self.policy.propose(count))
        return [int(arm) for arm in self.policy.propose(count)]

    def _nearest(self, wanted: Any) -> list[int]:
        """Arms of about these difficulties: between two levels by chance, so that their mean is what was asked for."""
        assert self.difficulty is not None
        assert self._by_difficulty is not None
        ordered = self.difficulty[self._by_difficulty]
        above = np.clip(np.searchsorted(ordered, wanted), 1, len(ordered) - 1)
        low, high = ordered[above - 1], ordered[above]
        share = np.where(high > low, (wanted - low) / np.where(high > low, high - low, 1), 0.0)
        value = np.where(self._rng.random(len(wanted)) < share, high, low)
        first = np.searchsorted(ordered, value, side="left")
        last = np.searchsorted(ordered, value, side="right")
        if not self.makes_examples:
            return [self._neighbour(int(low), int(high)) for low, high in zip(first, last, strict=True)]
        places = first + (self._rng.random(len(wanted)) * (last - first)).astype(np.int64)
        return [int(arm) for arm in self._by_difficulty[places]]

    def _neighbour(self, first: int, last: int) -> int:
        """An example near these places in the order of difficulty.

        Among neighbours, and none too often: the same few examples would be memorised.
        """
        assert self._by_difficulty is not None
        total = len(self._by_difficulty)
        if self._times.sum() >= total:
            self._times[:] = 0
        room = max(1, min(7, total // 10), total // 50)  # of few, fifteen and at most a fifth
        while True:
            low, high = max(0, first - room), min(total, last + room)
            places = low + np.flatnonzero(self._times[low:high] < _MOST_TIMES)
            if len(places):
                place = int(places[int(self._rng.random() * len(places))])
                self._times[place] += 1
                return int(self._by_difficulty[place])
            room *= 2

    def arms_of(self, batch: int) -> list[int] | None:
        """Arms drawn for a batch of the epoch, over all ranks: the ``i``-th belongs to rank ``i mod W``.

        ``None`` where it is no longer known.
        """
        return next((arms for block, _, arms in reversed(self._drawn) if block == batch), None)

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """Plain numbers and lists.

        Args:
            delivered: Batches of the running epoch that were handed out; those drawn beyond are kept.
        """
        pending = [[s, list(arms)] for block, s, arms in self._drawn if delivered is not None and block >= delivered]
        generator, times = self._rng.bit_generator.state, self._times.tolist()
        return {"serial": self._serial, "rng": generator, "pending": pending, "times": times}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.restored = True
        self._serial = state["serial"]
        self._rng.bit_generator.state = state["rng"]
        self._pending = [(serial, list(arms)) for serial, arms in state["pending"]]
        if len(state["times"]) == len(self._times):
            self._times[:] = state["times"]

    def __len__(self) -> int:
        self.bind()
        return self.num_samples


def _checked(name: str, values: Any) -> Any:
    if values is None:
        return None
    try:
        found = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(
            f"`DifficultySampler({name}=...)` must be numbers, one for each, not {type(values).__name__} of"
            f" {type(next(iter(values), None)).__name__ if hasattr(values, '__iter__') else 'nothing'}."
        ) from None
    if found.ndim != 1 or not np.isfinite(found).all():
        missing = int((~np.isfinite(found)).sum())
        raise ValueError(
            f"`DifficultySampler({name}=...)` must be one finite number for each; it is {found.shape} with {missing}"
            " that are not finite. Give every example one, or leave it out to have difficulty learned."
        )
    if len(found) < 2 or found.min() == found.max():
        raise ValueError(
            f"`DifficultySampler({name}=...)` is the same for all, {found[:1]}: there is nothing to choose by. Leave it"
            " out to have difficulty learned."
        )
    return found
