"""A run as it goes, on the terminal: curves, stage, speed, time left, and what looks wrong."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forge_lightning.core.metric_names import VAL_LOSS, plain_metric
from forge_lightning.core.mistakes import UsageError
from forge_lightning.core.trace import FILE_NAME, number

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a Braille letter: its left and right column, from the top."""
_MOST_POINTS = 4000
_LOSS = ("forge/telemetry/loss", "train/loss", "train_loss")
_SILENT = 120.0
"""Seconds without a new row after which a run may have been killed."""


class LiveRun:
    """What a run has recorded so far; `poll` reads what is new.

    Args:
        run: Run directory, or its trace.
    """

    def __init__(self, run: Path) -> None:
        self.directory = run if run.is_dir() else run.parent
        found = sorted(self.directory.glob("trace*.jsonl")) if run.is_dir() else [run]
        self.trace = found[0] if found else self.directory / FILE_NAME
        self.facts: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.step = 0
        self._place, self._rest = 0, b""
        self._series: dict[str, tuple[list[int], list[float]]] = {}
        self._pace: list[tuple[int, float]] = []  # steps and seconds of the last rows

    def poll(self) -> None:
        """Read what was written since."""
        try:
            size = self.trace.stat().st_size
            if size < self._place:  # a resume has replaced the file
                self.__init__(self.trace)  # type: ignore[misc]
            with open(self.trace, "rb") as file:
                file.seek(self._place)
                new = self._rest + file.read()
                self._place = file.tell()
        except OSError:
            return
        *lines, self._rest = new.split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        if row.get("kind") == "header":
            self.facts = row
        elif row.get("kind") == "event":
            self.events = [*self.events, row][-50:]
        if not isinstance(row.get("step"), int):
            return
        self.step = max(self.step, row["step"])
        if row.get("kind") == "step" and isinstance(row.get("seconds"), int | float):
            self._pace = [*self._pace, (row["step"], float(row["seconds"]))][-50:]
        metrics = row.get("metrics")
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            steps, values = self._series.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(number(value))
            if len(steps) > _MOST_POINTS:
                del steps[1::2], values[1::2]

    def find(self, *names: str) -> tuple[list[int], list[float]]:
        """The first of these series that there is."""
        for name in names:
            if name in self._series:
                return self._series[name]
        return next((s for key, s in self._series.items() if plain_metric(key) in names), ([], []))

    def last(self, *names: str) -> float | None:
        """The last value of a series."""
        values = self.find(*names)[1]
        return values[-1] if values else None

    @property
    def steps_per_second(self) -> float | None:
        """Over the last rows, validations included."""
        if len(self._pace) < 2:
            return None
        (first, begin), (last, end) = self._pace[0], self._pace[-1]
        return (last - first) / (end - begin) if end > begin else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the speed of the last rows."""
        total, speed = self.total_steps, self.steps_per_second
        return (total - self.step) / speed if total is not None and speed else None

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; ``None`` where that is not known, or was wrong."""
        total = self.facts.get("total_steps")
        return total if isinstance(total, int) and total >= max(1, self.step) else None

    @property
    def status(self) -> str:
        """How it ended, or how it is going."""
        try:
            summary = json.loads((self.directory / "summary.json").read_text())
            steps = summary.get("steps") if isinstance(summary, dict) else None
            if isinstance(steps, int) and steps >= self.step > 0:
                return str(summary.get("status"))
        except (OSError, ValueError):
            pass
        try:
            silent = time.time() - self.trace.stat().st_mtime
        except OSError:
            return "no trace yet: a run with `Telemetry` writes one"
        return "running" if silent < _SILENT else f"silent for {_time(silent)}: killed, or in a long validation"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status == "finished" or self.status.startswith(("interrupted", "failed"))

    @property
    def stage(self) -> str:
        """The stage of training."""
        stages = [event for event in self.events if event.get("event") == "stage"]
        return str(stages[-1].get("after")).replace("_", "-") if stages else "unknown"

    def warnings(self) -> list[str]:
        """What looks wrong."""
        found = []
        steps, losses = self.find(*_LOSS)
        if losses and not math.isfinite(losses[-1]):
            found.append(f"the training loss is not finite since step {_first_bad(steps, losses):,}")
        finite = [loss for loss in losses if math.isfinite(loss)]
        if len(finite) > 20 and min(finite[-5:]) > max(2 * abs(min(finite)), min(finite) + 0.5):
            found.append(f"the training loss has risen from {min(finite):.3g} to {finite[-1]:.3g}")
        steps, validation = self.find(*VAL_LOSS)
        known = [(loss, step) for step, loss in zip(steps, validation, strict=True) if math.isfinite(loss)]
        if len(known) >= 4 and min(known)[0] < known[-1][0] * 0.97 and known[-3][1] > min(known)[1]:
            found.append(f"the validation loss was best at step {min(known)[1]:,}, and rises since: over-fitting?")
        skipped = self.last("forge/grokfast/skipped_steps")
        if skipped:
            found.append(f"{skipped:.0f} steps with gradients that are not finite")
        return found


def _first_bad(steps: Sequence[int], values: Sequence[float]) -> int:
    """First step of the values at the end that are not finite."""
    place = len(values) - 1
    while place > 0 and not math.isfinite(values[place - 1]):
        place -= 1
    return steps[place]


def view(run: LiveRun, width: int) -> RenderableType:
    """All of it, as wide as the terminal."""
    total = run.total_steps
    facts = Table.grid(padding=(0, 2))
    progress = f"{run.step:,}" + (f" of {total:,} ({100 * run.step / total:.0f} %)" if total is not None else "")
    rows = [("state", run.status), ("step", progress), ("stage", run.stage)]
    left, speed = run.seconds_left, run.steps_per_second
    if left is not None and not run.is_over:
        rows.append(("time left", _time(left)))
    tokens = run.last("forge/telemetry/tokens_per_second")
    told = [f"{speed:.3g} steps" if speed else "", f"{tokens:,.0f} tokens" if tokens else ""]
    if any(told):
        rows.append(("a second", ", ".join(filter(None, told))))
    for label, names in (("training loss", _LOSS), ("validation loss", VAL_LOSS), ("learning rate", _RATE)):
        steps, values = run.find(*names)
        if values:
            best = [v for v in values if math.isfinite(v)]
            least = f" (least {min(best):.4g})" if best and label != "learning rate" else ""
            rows.append((label, f"{values[-1]:.4g}{least}"))
    for label, value in rows:
        facts.add_row(Text(label, style="dim"), Text(value))
    parts: list[RenderableType] = [Text(str(run.directory), style="bold"), facts]
    parts += [Text(f"! {warning}", style="yellow") for warning in run.warnings()]
    for label, names, color in (("training loss", _LOSS, "dark_orange"), ("validation loss", VAL_LOSS, "blue")):
        steps, values = run.find(*names)
        curve = plot(steps, values, min(width, 100) - 12, 6)
        if curve:
            parts += [Text(label, style="dim"), Text("\n".join(curve), style=color)]
    for event in run.events[-3:]:
        parts.append(Text(f"step {number(event.get('step')):,.0f}: {_told(event)}", style="dim"))
    return Group(*parts)


_RATE = ("forge/telemetry/lr",)


def _told(event: dict[str, Any]) -> str:
    if event.get("event") == "stage":
        return f"{event.get('before')} → {event.get('after')}: {event.get('reason', '')}".replace("_", "-")
    return f"{event.get('layer', '')} {event.get('direction', event.get('event', ''))}".strip()


def plot(steps: Sequence[int], values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve of Braille letters, with its largest and least value in front. Nothing where there is no curve."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(points) < 2 or width < 4:
        return []
    points = [(step, min(1e300, max(-1e300, value))) for step, value in points]  # whose difference is finite
    low, high = min(v for _, v in points), max(v for _, v in points)
    first, last = points[0][0], points[-1][0]
    cells = [[0] * width for _ in range(height)]
    before, place = -1, 0
    for x in range(2 * width):  # on a line from point to point
        step = first + x / (2 * width - 1) * (last - first)
        while place < len(points) - 2 and points[place + 1][0] <= step:
            place += 1
        (left, one), (right, other) = points[place], points[place + 1]
        value = one + (other - one) * min(1.0, max(0.0, (step - left) / (right - left or 1)))
        y = round((high - value) / (high - low or 1.0) * (4 * height - 1))
        for filled in range(min(y, before), max(y, before) + 1) if before >= 0 else (y,):
            cells[filled // 4][x // 2] |= _DOTS[x % 2][filled % 4]
        before = y
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    return [f"{label:>9} {''.join(chr(0x2800 + c) for c in row)}" for label, row in zip(labels, cells, strict=True)]


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def watch(
    path: Path, every: float, once: bool, console: Console | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show a run until it ends, or Ctrl-C.

    Args:
        path: Run directory, or its trace.
        every: Seconds between two looks.
        once: Show it once.
        console: Where to.
        sleep: How to wait.
    """
    console = console or Console()
    run = LiveRun(path)
    run.poll()
    below = sorted({str(found.parent) for found in path.glob("*/trace*.jsonl")}) if path.is_dir() else []
    if not run.trace.exists() and below:
        raise UsageError(f"`{path}` holds no trace. There are runs below it: {', '.join(below)}")
    if once or not console.is_terminal:
        console.print(view(run, console.width))
        return
    with Live(view(run, console.width), console=console, auto_refresh=False, screen=False) as live:
        while not run.is_over:
            sleep(every)
            run.poll()
            live.update(view(run, console.width), refresh=True)
