"""Pictures of what a model knows of itself: activations that it predicts, temperatures, calibration."""

import math
import re
from collections.abc import Mapping
from typing import Any

from forge_lightning.reports.figures import BLUE, COLORS, GREEN, ORANGE, STEP, cut_off, draw_series, tone
from forge_lightning.reports.trace import RunTrace

_SPLITS = {"test": "test data", "val": "validation data"}


def self_model(run: RunTrace) -> Any | None:
    """How much of each layer is predicted, the loss, and the effective rank of what is predicted."""
    from matplotlib.figure import Figure

    start = "forge/self_model/"
    by_quantity: dict[str, dict[str, Any]] = {}
    for name, series in run.series.items():
        if name.startswith(start) and "/" in name[len(start) :]:
            layer, quantity = name[len(start) :].rsplit("/", 1)
            by_quantity.setdefault(quantity, {})[layer] = series
    explained, loss = by_quantity.get("explained_variance", {}), run.find(f"{start}loss")
    if not explained or loss is None:
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    above, *below = figure.subplot_mosaic([["above", "above"], ["left", "right"]]).values()
    colors = {layer: COLORS[index % len(COLORS)] for index, layer in enumerate(explained)}
    for layer, series in explained.items():
        draw_series(above, series, layer, colors[layer])
    for layer, series in by_quantity.get("copy_explained_variance", {}).items():
        draw_series(above, series, f"{layer}, copied", colors.get(layer, COLORS[-1]))
        above.get_lines()[-1].set(linewidth=1, linestyle=(0, (3, 2)))
    later = [v for steps, values in explained.values() for v in values[len(steps) // 2 :] if math.isfinite(v)]
    above.set(xlabel=STEP, ylabel="explained variance")
    above.set_ylim(min([-0.03, *later]), 1.03)  # how bad it was at first is written in words
    whole = [v for _, values in explained.values() for v in values]
    above.set_title("Predicted, beyond the best constant" + cut_off(above, whole))
    above.legend(loc="best", ncols=2)
    for layer, (steps, ranks) in by_quantity.get("effective_rank", {}).items():
        known = [(step, rank) for step, rank in zip(steps, ranks, strict=True) if math.isfinite(rank)]
        draw_series(
            below[0], ([step for step, _ in known], [rank for _, rank in known]), layer, colors.get(layer, COLORS[-1])
        )
    below[0].set(xlabel=STEP, ylabel="directions")
    below[0].set_ylim(bottom=0)
    below[0].set_title("Effective rank of what is predicted")
    draw_series(below[1], loss, "error", BLUE)
    weight = run.find(f"{start}weight")
    if weight is not None:
        draw_series(below[1], weight, "weight in the loss", ORANGE)
    below[1].set(xlabel=STEP, ylabel="mean squared error, weight")
    below[1].set_ylim(bottom=0)
    below[1].set_title("Error (1: that of predicting 0)")
    below[1].legend(loc="best")
    return figure


def temperature(run: RunTrace) -> Any | None:
    """τ of every step, the divergence, and the held-out likelihood and calibration of each bin."""
    from matplotlib.figure import Figure

    start = "forge/temperature/"
    drawn, kl = run.find(f"{start}temperature"), run.find(f"{start}kl")
    if drawn is None:
        return None
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flatten()
    axes[0].plot(*drawn, linestyle="", marker=".", markersize=3, color=tone(BLUE))
    axes[0].set(ylabel="τ", yscale="log")
    marks = sorted({edge for name in run.series for edge in _edges(name)})
    axes[0].set_yticks(marks, [f"{edge:g}" for edge in marks])
    axes[0].minorticks_off()
    axes[0].set_title("Temperature of the step")
    if kl is not None:
        draw_series(axes[1], kl, "τ² KL", ORANGE)
    axes[1].set(ylabel="nats")
    axes[1].set_title("Divergence from the mean of the weights, τ² KL")
    for axis, quantity, label in ((axes[2], "nll", "nats"), (axes[3], "ece", "ECE")):
        bins = {
            name[len(start) :].rsplit("/", 1)[0]: series
            for name, series in run.series.items()
            if name.startswith(start) and name.endswith(f"/{quantity}")
        }
        for index, (edges, series) in enumerate(bins.items()):
            draw_series(axis, series, f"τ {edges.replace('-', ' to ')}", COLORS[index % len(COLORS)])
        axis.set(xlabel=STEP, ylabel=label)
        axis.set_title("Held-out likelihood at each bin" if quantity == "nll" else "Held-out calibration at each bin")
        if bins:
            axis.legend(loc="best")
    return figure


def _edges(name: str) -> tuple[float, ...]:
    """The bin that a metric belongs to; nothing for one of none."""
    found = re.fullmatch(r"forge/temperature/(?:.*/)?([\d.e+]+)-([\d.e+]+)/nll", name)
    return () if found is None else (float(found[1]), float(found[2]))


def reliability(run: RunTrace) -> Any | None:
    """Accuracy of predictions by their confidence, as the model is and at its fitted temperature."""
    from matplotlib.figure import Figure

    found = next(((split, run.calibration[split]) for split in _SPLITS if split in run.calibration), None)
    if found is None:
        return None
    split, kept = found
    ece = run.find("forge/calibration/ece")
    ece = ece if ece is not None and len(ece[0]) > 1 else None  # testing gives one
    figure = Figure(figsize=(9, 3.6) if ece else (5, 4), layout="constrained")
    left, *right = figure.subplots(1, 2 if ece else 1, squeeze=False)[0]
    left.plot([0, 1], [0, 1], color=tone("#999999"), linewidth=1, linestyle=":")
    metrics, fitted = kept.get("metrics", {}), kept.get("measured_at")
    labels = {
        "as it is": f"as it is: ECE {_text(metrics.get('ece'))}",
        "fitted": f"logits / {_text(fitted)}: ECE {_text(metrics.get('ece_fitted'))}",
    }
    for which, color in (("as it is", ORANGE), ("fitted", GREEN)):
        if which in kept.get("bins", {}):
            _reliability_line(left, kept["bins"][which], labels[which], color)
    left.set(xlabel="confidence", ylabel="share right", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    left.set_title(f"Reliability, {_SPLITS[split]}")
    left.legend(loc="lower right")
    if ece and right:
        draw_series(right[0], ece, "as it is", ORANGE)
        after = run.find("forge/calibration/ece_fitted")
        if after is not None:
            draw_series(right[0], after, "at the temperature of the validation before", GREEN)
        right[0].set(xlabel=STEP, ylabel="ECE")
        right[0].set_ylim(bottom=0)
        right[0].set_title("Calibration error, validation data")
        right[0].legend(loc="best")
    return figure


def _reliability_line(axis: Any, bins: Mapping[str, Any], label: str, color: str) -> None:
    """A dot for each bin, as large as its share of the predictions."""
    total = sum(bins["total"])
    points = [
        (confidence / n, correct / n, n / total)
        for n, confidence, correct in zip(bins["total"], bins["confidence"], bins["correct"], strict=True)
        if n
    ]
    x, y, share = zip(*points, strict=True)
    axis.plot(x, y, color=tone(color), label=label)
    axis.scatter(x, y, s=[20 + 400 * value for value in share], color=tone(color), alpha=0.5, linewidths=0)


def sampling(run: RunTrace) -> Any | None:
    """pass@k against the sampling temperature, with two standard errors."""
    from matplotlib.figure import Figure

    rows = [row for row in run.temperature_study if {"temperature", "k", "pass_at_k"} <= row.keys()]
    if not rows:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, k in enumerate(sorted({row["k"] for row in rows})):
        of_k = sorted((row for row in rows if row["k"] == k), key=lambda row: row["temperature"])
        x, y = ([row[name] for row in of_k] for name in ("temperature", "pass_at_k"))
        errors = [2 * (row.get("standard_error") or 0.0) for row in of_k]
        errors = [error if math.isfinite(error) else 0.0 for error in errors]
        color = tone(COLORS[index % len(COLORS)])
        axis.errorbar(x, y, yerr=errors, color=color, marker="o", capsize=3, label=f"pass@{k}")
    axis.set(xlabel="sampling temperature", ylabel="share of problems")
    axis.set_ylim(bottom=0)
    axis.set_title(f"Programs that pass, {rows[0].get('num_problems', '?')} problems")
    axis.legend(loc="lower left")
    return figure


def _text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
