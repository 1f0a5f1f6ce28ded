"""How often to probe, so that probes stay within their share of training time."""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median

_MOST_STRETCH = 4
"""How many times less often than was asked for a probe may come before it takes fewer points."""
_FEWEST = 128


class ProbePace:
    """Plans the next probe from the times of steps and probes.

    Args:
        every_n_steps: Optimizer steps between probes, if they are cheap enough.
        max_overhead: Largest share of training time; ``None`` for no limit.
    """

    def __init__(self, every_n_steps: int, max_overhead: float | None) -> None:
        self.every_n_steps, self.max_overhead = every_n_steps, max_overhead
        self.interval = self.next_due = every_n_steps
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.probe_seconds: deque[float] = deque(maxlen=3)
        self._ended: float | None = None

    def start_fit(self) -> None:
        """Drop measured times."""
        self.step_seconds.clear()
        self.probe_seconds.clear()
        self._ended = None

    def end_step(self) -> None:
        """Measure the time since the last step or probe."""
        now = time.perf_counter()
        if self._ended is not None:
            self.step_seconds.append(now - self._ended)
        self._ended = now

    def end_probe(self) -> None:
        """Start the time of the next step."""
        self._ended = time.perf_counter()

    def overhead(self, interval: int | None = None) -> float:
        """Share of training time that probes take; NaN before the first step was timed."""
        if not self.step_seconds:
            return math.nan
        return min(self.probe_seconds) / ((interval or self.interval) * median(self.step_seconds))

    def fewer_points(self, points: int, broadcast: Callable[[float], float]) -> int:
        """Points that a probe should take, where with these it would come far less often than was asked for.

        Their cost grows with their square. Not below 128, of which a dimension can still be told.

        Args:
            points: Points of the probes that were timed.
            broadcast: Returns rank 0's number on all ranks.
        """
        if self.max_overhead is None or len(self.probe_seconds) < 2 or not self.step_seconds:
            return points
        stretch = broadcast(self.overhead(self.every_n_steps)) / self.max_overhead
        if stretch <= _MOST_STRETCH:
            return points
        return min(points, max(_FEWEST, math.floor(points * math.sqrt(_MOST_STRETCH / stretch))))

    def forget_probes(self) -> None:
        """Drop the times of probes, and come as often as was asked for until new ones are known."""
        self.probe_seconds.clear()
        self.interval = self.every_n_steps

    def plan_next(self, step: int, broadcast: Callable[[float], float]) -> str:
        """Set the next step to probe at: a multiple of ``every_n_steps``, which a costly probe stretches.

        Args:
            step: Optimizer steps done.
            broadcast: Returns rank 0's number on all ranks.

        Returns:
            A warning if probes come less often from here on; empty otherwise.
        """
        interval, warning = self.interval, ""  # until two probes were timed, as before a resume
        if self.max_overhead is not None and len(self.probe_seconds) > 1 and self.step_seconds:
            share = broadcast(self.overhead(self.every_n_steps))
            interval = self.every_n_steps * max(1, math.ceil(share / self.max_overhead))
            if interval > self.interval and interval > self.every_n_steps:
                warning = (
                    f"GeometryProbe: a probe takes {1000 * min(self.probe_seconds):.3g} ms and a step"
                    f" {1000 * median(self.step_seconds):.3g} ms. It comes every {interval} steps from here on, not"
                    f" every {self.every_n_steps}, to stay within `max_overhead={self.max_overhead}`. Probe fewer"
                    " layers or points, or raise `max_overhead`."
                )
        self.interval = interval
        self.next_due = (step // self.every_n_steps) * self.every_n_steps + interval
        return warning
