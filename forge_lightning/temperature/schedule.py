"""Which temperature a step compares two models at: bins one after the other, then all of them, by need."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from forge_lightning.core.validate import require


class TemperatureSchedule:
    """Round 1 takes one bin at a time; round 2 draws from all, widened, in proportion to their held-out likelihood.

    A bin of round 1 ends when the likelihood measured at its middle has not improved for ``patience`` measurements, or
    after ``max_steps_per_bin``. Draws depend on the seed and the step alone: all ranks draw alike, and a resumed
    run draws what it would have.

    Args:
        bins: ``(low, high)`` of each, in the order of round 1; 0 < low < high.
        overlap: Share of a bin's width by which round 2 widens it at both ends, at least 0. Widths are ratios.
        patience: Measurements without improvement that end a bin, at least 1.
        min_improvement: Share of the best likelihood that counts as improvement, at least 0.
        max_steps_per_bin: Optimizer steps of a bin in round 1 at most; ``None`` for no limit.
        seed: Random seed for the draws.
        owner: Name in error messages.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        bins: Sequence[Sequence[float]],
        overlap: float = 0.1,
        patience: int = 2,
        min_improvement: float = 1e-3,
        max_steps_per_bin: int | None = None,
        seed: int = 0,
        *,
        owner: str = "TemperatureSchedule",
    ) -> None:
        check = partial(require, owner)
        check(bool(bins), "bins", bins, "at least one (low, high)")
        for edges in bins:
            ok = isinstance(edges, list | tuple) and len(edges) == 2 and 0 < edges[0] < edges[1] < math.inf
            check(ok, "bins", bins, f"a list of (low, high) with 0 < low < high, not {edges!r}")
        check(0 <= overlap < math.inf, "overlap", overlap, "at least 0")
        check(patience >= 1, "patience", patience, "at least 1")
        check(min_improvement >= 0, "min_improvement", min_improvement, "at least 0")
        check(
            max_steps_per_bin is None or max_steps_per_bin >= 1,
            "max_steps_per_bin",
            max_steps_per_bin,
            "at least 1, or None",
        )
        self.bins = [(float(low), float(high)) for low, high in bins]
        self.overlap = overlap
        self.patience = patience
        self.min_improvement = min_improvement
        self.max_steps_per_bin = max_steps_per_bin
        self.seed = seed
        self.round = 1
        self.index = 0
        self.nll = [math.nan] * len(self.bins)
        self._best = math.inf
        self._waited = 0
        self._steps = 0

    @property
    def middles(self) -> list[float]:
        """The temperature at which each bin is measured."""
        return [math.sqrt(low * high) for low, high in self.bins]

    def weights(self) -> list[float]:
        """How likely each bin is now."""
        if self.round == 1:
            return [float(index == self.index) for index in range(len(self.bins))]
        known = [max(nll, 0.0) for nll in self.nll if math.isfinite(nll)]
        if not known or sum(known) == 0:
            return [1 / len(self.bins)] * len(self.bins)
        mean = sum(known) / len(known)
        raw = [max(nll, 0.0) if math.isfinite(nll) else mean for nll in self.nll]
        return [value / sum(raw) for value in raw]

    def draw(self, step: int) -> tuple[int, float]:
        """Bin and temperature of a step; alike in ratio over the bin."""
        generator = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        chosen, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        total, index = 0.0, len(self.bins) - 1
        for number, weight in enumerate(self.weights()):
            total += weight
            if chosen < total:
                index = number
                break
        low, high = (math.log(edge) for edge in self.bins[index])
        margin = self.overlap * (high - low) if self.round == 2 else 0.0
        return index, math.exp(low - margin + place * (high - low + 2 * margin))

    def observe(self, nll: Sequence[float]) -> None:
        """Take the held-out negative log-likelihood at the middle of each bin; may end the current one."""
        self.nll = [float(value) for value in nll]
        if self.round == 2:
            return
        current = self.nll[self.index]
        if current < self._best - self.min_improvement * abs(self._best if math.isfinite(self._best) else 0.0):
            self._best, self._waited = current, 0
        else:
            self._waited += 1
            if self._waited >= self.patience:
                self._advance()

    def count_step(self) -> None:
        """One more optimizer step; may end the current bin."""
        self._steps += 1
        if self.round == 1 and self.max_steps_per_bin is not None and self._steps >= self.max_steps_per_bin:
            self._advance()

    def _advance(self) -> None:
        self._best, self._waited, self._steps = math.inf, 0, 0
        if self.index + 1 < len(self.bins):
            self.index += 1
        else:
            self.round = 2

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "bins": [list(edges) for edges in self.bins],
            "round": self.round,
            "index": self.index,
            "nll": list(self.nll),
            "best": self._best,
            "waited": self._waited,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict`.

        Raises:
            ValueError: If it is the state of other bins.
        """
        saved = [tuple(edges) for edges in state_dict["bins"]]
        if saved != self.bins:
            raise ValueError(
                f"The state was saved with bins={saved} and cannot be resumed with bins={self.bins}. Use the same bins."
            )
        self.round, self.index, self.nll = state_dict["round"], state_dict["index"], list(state_dict["nll"])
        self._best, self._waited, self._steps = state_dict["best"], state_dict["waited"], state_dict["steps"]
