"""Learning curves from the metrics that a run left on disk."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Series = tuple[list[int], list[float]]
SPLIT_COLORS = {"train": "#E69F00", "val": "#0072B2"}
"""Orange and blue of Okabe and Ito, in every picture of this package."""


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of a ``metrics.csv``: its steps, and its values.

    Cells that are no number, as text that a logger was given, are passed over; so is a last line that was cut off.

    Args:
        path: File written by Lightning's ``CSVLogger``.

    Returns:
        ``{name: (steps, values)}`` without empty cells, in the order of the file.

    Raises:
        ValueError: If the file has no ``step`` column.
    """
    metrics: dict[str, Series] = {}
    with open(path, newline="", errors="replace") as file:
        rows = csv.reader(line for line in file if line.endswith("\n"))
        names = next(rows, [])
        if "step" not in names:
            raise ValueError(f"{path} has no column 'step': it is not a metrics.csv of Lightning's CSVLogger.")
        place = names.index("step")
        for row in rows:
            step = _number(row[place]) if len(row) == len(names) else None
            if step is None or not math.isfinite(step):
                continue
            for name, text in zip(names, row, strict=True):
                if text and name not in ("step", "epoch") and (value := _number(text)) is not None:
                    steps, values = metrics.setdefault(name, ([], []))
                    steps.append(int(step))
                    values.append(value)
    return metrics


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_LONG = 3000
"""Steps of a run whose beginning would be too small to see on a linear axis."""
_SPLIT = re.compile(r"(^|[/_.])(train|training|val|valid|validation|eval)(?=$|[/_.])")


def split_of(name: str) -> tuple[str, str] | None:
    """Train or val, and the quantity, of a metric called ``train/x``, ``x_val`` and the like; ``None`` for others."""
    found = None if name.startswith("forge/") else _SPLIT.search(name)
    if found is None:
        return None
    rest = (name[: found.start()] + name[found.end() :]).strip("/_.")
    return ("train" if found[2].startswith("train") else "val", rest) if rest else None


def plot_learning_curves(
    metrics: Mapping[str, Series], path: Path, *, title: str = "", marks: Mapping[str, float] | None = None
) -> bool:
    """Draw ``train/x`` and ``val/x`` (or ``x_val`` and the like) into one panel for each ``x``.

    Args:
        metrics: From `read_metrics`.
        path: Picture to write; its suffix gives the format.
        title: Title of the picture.
        marks: Horizontal lines, by metric name.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        return _plot(metrics, path, title, marks or {})


def _plot(metrics: Mapping[str, Series], path: Path, title: str, marks: Mapping[str, float]) -> bool:
    from matplotlib.figure import Figure

    named = {found: name for name in metrics if (found := split_of(name)) is not None}
    quantities = list(dict.fromkeys(quantity for _, quantity in named))
    if not quantities:
        return False
    columns = len(quantities) if len(quantities) <= 3 else math.ceil(len(quantities) / math.ceil(len(quantities) / 3))
    rows = math.ceil(len(quantities) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(quantities) :]:
        axis.set_visible(False)
    steps = [s + 1 for name in named.values() for s in metrics[name][0]]
    steps_over_decades = _spans_decades(steps) and max(steps) >= _LONG
    for axis, quantity in zip(axes, quantities, strict=False):
        for split, color in SPLIT_COLORS.items():
            steps, values = metrics.get(named.get((split, quantity), ""), ([], []))
            points = [(s + 1, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
            if points:
                axis.plot(*zip(*points, strict=True), label=split, color=color, marker="." if len(points) < 20 else "")
        mark = marks.get(named.get(("val", quantity), ""))
        if mark is not None:
            axis.axhline(mark, color="black", linewidth=0.8, linestyle=":", label=f"{mark:g}")
        lines = [line for line in axis.get_lines() if line.get_label() in ("train", "val")]
        values = [v for line in lines for v in np.asarray(line.get_ydata())]
        if values and max(values) > 1 and _spans_decades(values):  # accuracies and rates stay linear
            logarithmic(axis, "y")
        elif values and min(values) == max(values) and 0 <= values[0] <= 1:
            axis.set_ylim(-0.03, 1.03)  # a share, though nothing moves yet
        if lines and steps_over_decades:  # of all panels alike
            logarithmic(axis, "x")
        scale = ", logarithmic" if axis.get_xscale() == "log" else ""
        axis.set(xlabel=f"optimizer step{scale}", title="")
        axis.set_title(quantity.replace("_", " "), loc="left")
        axis.grid(alpha=0.25)
        if lines:
            axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderaxespad=0.0)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return True


def logarithmic(axis: Any, which: str) -> None:
    """Give an axis of a picture a logarithmic scale, with plain numbers and few of them.

    Args:
        axis: With its data, all above 0, of which the range is taken.
        which: "x" or "y".
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = getattr(axis, f"get_{which}lim")()
    decades = math.log10(high / low)
    ticks = getattr(axis, f"{which}axis")
    parts, stride = ((1.0, 2.0, 5.0), 1) if decades < 2.5 else ((1.0,), math.ceil(decades / 7))
    exponents = range(stride * math.floor(math.log10(low) / stride), math.ceil(math.log10(high)) + 1, stride)
    places = [part * 10.0**exponent for exponent in exponents for part in parts]
    ticks.set_major_locator(FixedLocator([place for place in places if low <= place <= high]))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= 30 * min(values)
