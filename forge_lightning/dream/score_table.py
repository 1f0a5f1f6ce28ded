"""Scores, labels and priorities of stored examples, by slot."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge_lightning.dream.frontier import LossQuantiles
from forge_lightning.dream.functional import gumbel_top_k, importance_weights, replay_priority

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
_MOST_TOUCHED = 256  # examples whose priority waits to be computed anew
_REFRESH = 32  # examples between computations of the quantiles


class ScoreTable:
    """Columns of numbers for all slots, and the quantiles that priorities are computed with.

    Args:
        capacity: Number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self.columns = {name: torch.zeros(capacity, dtype=dtype) for name, dtype in _COLUMNS.items()}
        self.arrays: dict[str, Any] = {name: column.numpy() for name, column in self.columns.items()}
        """The same numbers for NumPy, which reads and writes single ones faster."""
        self.quantiles = LossQuantiles()
        self._until_refresh = 0
        self._touched: set[int] = set()  # slots whose priority is out of date

    def used(self) -> Any:
        """Slots of stored examples, in ascending order."""
        return np.flatnonzero(self.arrays["in_reservoir"] | (self.arrays["category"] > 0))

    def write(self, slot: int, **numbers: Any) -> None:
        """Write a new example's numbers. It belongs to neither reservoir nor frontier yet."""
        for name, value in {"replays": 0, "category": 0, "in_reservoir": False, **numbers}.items():
            self.arrays[name][slot] = value

    def rescore(self, slot: int, loss: float, success: float) -> None:
        """Update loss and success of an example; ``success`` is known."""
        arrays = self.arrays
        arrays["loss"][slot], arrays["success"][slot] = loss, success
        arrays["best_loss"][slot] = np.fmin(arrays["best_loss"][slot], loss)
        arrays["best_success"][slot] = np.fmax(arrays["best_success"][slot], success)

    def count_replays(self, slots: Sequence[int]) -> None:
        """Count a replay of each example."""
        self.arrays["replays"][np.array(slots)] += 1
        self._touched.update(slots)

    def touch(self, slots: Iterable[int]) -> None:
        """Mark the priorities of examples as out of date."""
        self._touched.update(slots)

    def refresh(self, size: int) -> None:
        """Compute quantiles and priorities anew every 32 examples, before ``size`` more are added."""
        if self._until_refresh <= 0:
            self._until_refresh = _REFRESH
            self.quantiles.refresh()
            self._prioritise(slice(None))
        self._until_refresh -= size

    def new_priorities(self, loss: Sequence[float], success: Sequence[float]) -> list[float]:
        """Priorities of examples without a history."""
        losses, successes = torch.tensor(loss), torch.tensor(success)
        found = self._priorities(losses, successes, losses, successes, torch.zeros(len(losses)))
        return found.tolist()

    def _priorities(
        self, loss: Tensor, success: Tensor, best_loss: Tensor, best_success: Tensor, replays: Tensor
    ) -> Tensor:
        threshold, scale = self.quantiles.threshold, self.quantiles.scale
        return replay_priority(loss, best_loss, success, best_success, replays, threshold, scale)

    def _prioritise(self, slots: Any) -> None:
        self._touched.clear()
        names = ("loss", "success", "best_loss", "best_success", "replays")
        self.columns["priority"][slots] = self._priorities(*(self.columns[name][slots] for name in names))

    def draw_by_priority(self, count: int, alpha: float, beta: float, rng: Any) -> tuple[list[int], Tensor]:
        """Draw examples in proportion to their priority to the power of ``alpha``, with importance weights."""
        if len(self._touched) > _MOST_TOUCHED:
            self._prioritise(torch.tensor(sorted(self._touched), dtype=torch.int64))
        used = torch.from_numpy(self.used())
        log_weights = self.columns["priority"][used].log_().mul_(alpha)
        noise = torch.from_numpy(rng.random(len(used), dtype=np.float32))
        places = gumbel_top_k(log_weights, count, noise)
        probability = torch.exp(log_weights[places] - log_weights.logsumexp(0))
        return used[places].tolist(), importance_weights(probability, len(used), beta)

    def state_dict(self, slots: Sequence[int]) -> dict[str, Any]:
        """The numbers in these slots, the quantiles, and what is out of date."""
        recent, num_recent, bounds = self.quantiles.state()
        return {
            "columns": {name: column[slots].clone() for name, column in self.columns.items()},
            "recent": torch.from_numpy(recent),
            "num_recent": num_recent,
            "bounds": [self._until_refresh, *bounds],
            "touched": sorted(self._touched),
        }

    def load_state_dict(self, state: Mapping[str, Any], slots: Sequence[int]) -> None:
        """Restore from `state_dict`."""
        for name, column in state["columns"].items():
            self.columns[name][slots] = column
        self._touched = set(state["touched"])
        self.load_quantiles(state)

    def load_quantiles(self, state: Mapping[str, Any]) -> None:
        """Restore the quantiles alone."""
        self._until_refresh, *bounds = state["bounds"]
        self.quantiles.load(state["recent"].numpy(), state["num_recent"], bounds)
