"""The picture that compares runs by group."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from forge_lightning.core.metric_names import VAL_LOSS
from forge_lightning.reports.figures import STEP, cycle, layers_of
from forge_lightning.reports.learning_curves import Series
from forge_lightning.reports.trace import SUCCESS, RunTrace, group_names


def comparison(runs: Sequence[RunTrace]) -> Any | None:
    """Median and band over the runs of each group."""
    from matplotlib.figure import Figure

    panels = compared(runs)
    if not panels:
        return None
    groups = by_group(runs)
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9, 2.9 * rows + 0.3 * math.ceil(len(groups) / 2)), layout="constrained")
    axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
    colors = dict(zip(groups, cycle(len(groups)), strict=True))
    lines: dict[str, Any] = {}
    for axis, (title, label, bands) in zip(axes, panels, strict=False):
        fewer = []
        for group, (count, (grid, middle, low, high)) in bands.items():
            color, whole = colors[group], len(groups[group])
            name = f"{group} ({whole} run{'s' * (whole > 1)})"
            dashes = "-" if list(groups).index(group) % 2 == 0 else (0, (4, 3))  # equal lines show both
            (lines[name],) = axis.plot(
                grid, middle, color=color, linestyle=dashes, marker="." if len(grid) < 20 else ""
            )
            axis.fill_between(grid, low, high, color=color, alpha=0.18, linewidth=0)
            fewer += [f"{group}: {count} of {whole}"] if count < whole else []
        axis.set(xlabel=STEP, ylabel=label)
        if label == "share right":
            axis.set_ylim(-0.03, 1.03)
        axis.set_title("\n".join([title, *fewer]))
    names = [textwrap.fill(name, 100) for name in lines]
    figure.legend(lines.values(), names, loc="outside lower center", ncols=2 if max(map(len, names)) < 50 else 1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def by_group(runs: Sequence[RunTrace]) -> dict[str, list[RunTrace]]:
    """Runs by the name of their group."""
    groups: dict[str, list[RunTrace]] = {}
    for run, name in zip(runs, group_names(runs), strict=True):
        groups.setdefault(name, []).append(run)
    return groups


def compared(runs: Sequence[RunTrace]) -> list[tuple[str, str, dict[str, tuple[int, Any]]]]:
    """``(title, label, {group: (number of runs, band)})`` of every series that is compared and that some run has."""
    wanted = [
        ("Validation loss", "loss (nats)", VAL_LOSS),
        ("Training loss", "loss (nats)", ("forge/telemetry/loss",)),
        ("Validation success", "share right", SUCCESS),
        ("Training success", "share right", ("forge/telemetry/success",)),
        ("Token accuracy in validation", "share right", ("val/token_accuracy",)),
        ("Success of what was drawn", "share right", ("forge/edge/success_rate",)),
        ("Difficulty of what was drawn", "difficulty", ("forge/edge/difficulty",)),
        ("Dimension of the last layer probed", "Levina–Bickel", tuple(_last_layer(runs, "levina_bickel"))),
        ("Participation ratio, last layer probed", "directions", tuple(_last_layer(runs, "participation_ratio"))),
    ]
    panels = []
    for title, label, names in wanted:
        bands = {}
        for group, members in by_group(runs).items():
            found = [series for run in members if (series := run.find(*names)) is not None]
            if found:
                bands[group] = (len(found), band(found))
        never = label == "share right" and all(not np.any(high > 0) for _, (_, _, _, high) in bands.values())
        if bands and not never:
            panels.append((title, label, bands))
    return panels


def band(found: Sequence[Series]) -> tuple[Any, Any, Any, Any]:
    """Steps, median, least and largest over series, as far as all of them go; else at every step, over those there."""
    starts, ends = [s[0][0] for s in found], [s[0][-1] for s in found]
    grid = np.unique(np.concatenate([s[0] for s in found]))
    grid = grid[(grid >= max(starts)) & (grid <= min(ends))]
    if not len(grid):
        grid = np.unique(np.concatenate([s[0] for s in found]))
    values = np.stack([np.interp(grid, s[0], s[1], left=math.nan, right=math.nan) for s in found])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step where all are NaN stays so
        return grid, np.nanmedian(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)


def _last_layer(runs: Sequence[RunTrace], estimator: str) -> list[str]:
    return [f"forge/geometry/{layers[-1]}/{estimator}" for run in runs if (layers := layers_of(run))]
