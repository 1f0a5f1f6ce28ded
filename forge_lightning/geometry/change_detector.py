"""Find phase transitions in a series, value by value."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """A lasting fall or rise."""

    step: int
    direction: str
    """"down" or "up"."""
    before: float
    """Smoothed level that the change is measured from."""
    after: float
    confidence: float
    """One minus the p-value of a trend of that direction over the last 15 values (Mann-Kendall), in [0, 1]."""


class ChangeDetector:
    """A change: the smoothed series is a quarter below its highest level, or a third above its lowest, twice running.

    One change is reported once; the next is measured from where the series has come to rest. Steps with an unhealthy
    loss must not enter: spikes of the loss pull every dimension down for a moment.

    False alarms in 300 series of 200 values without a change, of noise of 8 % of which a value keeps a share from the
    one before: none of a share of 0 and of 0.5, 76 of 0.9, 21 of 0.98. Noise that lasts looks like a change while it
    does; with ``relative_change=0.35`` it reports none in any of these.
    Falls by 40 % and more, and rises to double, under noise of 3 %: all found, within 25 values of their
    begin. On recorded runs: `benchmarks/stages.md`.

    Args:
        relative_change: Share by which the level must fall, in (0, 1); a rise must undo a fall of that size.
        smoothing: Weight of a new value in the moving average, in (0, 1].
        patience: Values in a row that must agree.
        warmup: Values before a level counts.
    """

    def __init__(
        self, relative_change: float = 0.25, smoothing: float = 0.2, patience: int = 2, warmup: int = 10
    ) -> None:
        if not 0 < relative_change < 1:
            raise ValueError(f"`relative_change={relative_change}` must be in (0, 1).")
        self.relative_change = relative_change
        self.smoothing = smoothing
        self.patience = patience
        self.warmup = warmup
        self._level: float | None = None
        self._count = 0
        self._highest, self._lowest = -math.inf, math.inf
        self._below, self._above = 0, 0
        self._moving = ""  # direction of a change that was reported and has not come to rest
        self._recent: deque[float] = deque(maxlen=15)
        self._levels: deque[float] = deque(maxlen=10)

    def update(self, step: int, value: float, healthy: bool = True) -> Change | None:
        """Add the next value of the series. Returns the change that it completes."""
        if not healthy or not math.isfinite(value) or value <= 0:
            return None
        self._level = value if self._level is None else self._level + self.smoothing * (value - self._level)
        self._recent.append(value)
        self._levels.append(self._level)
        self._count += 1
        if self._count <= self.warmup:
            return None
        if self._moving:
            if max(self._levels) <= 1.05 * min(self._levels):
                self._moving, self._highest, self._lowest = "", -math.inf, math.inf
            else:
                return None
        self._highest, self._lowest = max(self._highest, self._level), min(self._lowest, self._level)
        kept = 1 - self.relative_change
        self._below = self._below + 1 if self._level < kept * self._highest else 0
        self._above = self._above + 1 if self._level * kept > self._lowest else 0
        if max(self._below, self._above) < self.patience:
            return None
        direction = "down" if self._below >= self.patience else "up"
        before = self._highest if direction == "down" else self._lowest
        self._moving, self._below, self._above = direction, 0, 0
        return Change(step, direction, before, self._level, trend_confidence(list(self._recent), direction))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "level": self._level,
            "count": self._count,
            "extremes": [self._highest, self._lowest],
            "streaks": [self._below, self._above],
            "moving": self._moving,
            "recent": list(self._recent),
            "levels": list(self._levels),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._level, self._count, self._moving = state["level"], state["count"], state["moving"]
        self._highest, self._lowest = state["extremes"]
        self._below, self._above = state["streaks"]
        self._recent.clear()
        self._recent.extend(state["recent"])
        self._levels.clear()
        self._levels.extend(state["levels"])


def trend_confidence(values: list[float], direction: str) -> float:
    """One minus the one-sided p-value of the Mann-Kendall test for a trend, by its normal approximation."""
    n = len(values)
    if n < 3:
        return math.nan
    sign = -1 if direction == "down" else 1
    score = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :]) * sign
    spread = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    z = (score - 1) / spread if score > 0 else (score + 1) / spread if score < 0 else 0.0
    return 0.5 * math.erfc(-z / math.sqrt(2))


class LossHealth:
    """Detects when a loss is low enough for dimensions to mean something, and when it spikes.

    It begins once the median of five losses is below a fifth of the first; from then on a loss is healthy that is at
    most twice the median of the last 15 healthy ones, plus 0.1 nats. 30 unhealthy ones in a row are the new normal.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._recent: deque[float] = deque(maxlen=15)
        self._unhealthy = 0
        self.began = False

    def update(self, loss: float) -> bool:
        """Whether the step with this loss is healthy."""
        if not math.isfinite(loss):
            return False
        if self._first is None:
            self._first = loss
        if not self.began:
            self._recent.append(loss)
            last = sorted(list(self._recent)[-5:])
            self.began = len(last) == 5 and last[2] < 0.2 * self._first
            return self.began
        ordered = sorted(self._recent)
        middle = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
        if loss > 2 * middle + 0.1:
            self._unhealthy += 1
            if self._unhealthy < 30:
                return False
            self._recent.clear()
        self._unhealthy = 0
        self._recent.append(loss)
        return True

    def state_dict(self) -> dict[str, Any]:
        recent = list(self._recent)
        return {"first": self._first, "recent": recent, "unhealthy": self._unhealthy, "began": self.began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._unhealthy, self.began = state["first"], state["unhealthy"], state["began"]
        self._recent.clear()
        self._recent.extend(state["recent"])
