"""Pictures of replay: what is stored, what sleeping does to it, what is forgotten."""

import math
from typing import Any

from forge_lightning.reports.figures import BLUE, GREEN, ORANGE, STEP, draw_series, tone
from forge_lightning.reports.learning_curves import Series
from forge_lightning.reports.trace import RunTrace


def dream(run: RunTrace) -> Any | None:
    """The buffer, replayed rows, loss before and after each sleep, and the loss of the first examples."""
    from matplotlib.figure import Figure

    found = {
        key: _known(series)
        for key in (
            *("stored", "frontier", "share", "replay_loss", "probe_loss", "forgetting", "yield"),
            *("loss_before", "loss_after", "success_before", "success_after"),
        )
        if (series := run.find(f"forge/dream/{key}")) is not None
    }
    if "stored" not in found:
        return None
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    (buffer, shares), (sleep, probe) = figure.subplots(2, 2, sharex=True)
    for key, label, color in (("stored", "all", BLUE), ("frontier", "near the threshold", ORANGE)):
        if key in found:
            draw_series(buffer, found[key], label, color)
    buffer.set(ylabel="rows")
    buffer.set_ylim(bottom=0)
    buffer.set_title("Stored")
    buffer.legend(loc="best")

    for key, label, color in (("share", "replayed, of all compute", BLUE), ("yield", "variants that held", GREEN)):
        if found.get(key, ([], []))[0]:
            draw_series(shares, found[key], label, color)
    shares.set(ylabel="share")
    shares.set_ylim(-0.03, 1.03)
    shares.set_title("Replay's share, and what came of variants")
    if shares.get_legend_handles_labels()[0]:
        shares.legend(loc="best")

    before, after = found.get("loss_before", ([], [])), found.get("loss_after", ([], []))
    if before[0] and after[0]:
        for at, start, end in zip(before[0], before[1], after[1], strict=False):
            sleep.annotate("", (at, end), (at, start), arrowprops={"arrowstyle": "->", "color": tone("#999999")})
        sleep.plot(*before, linestyle="", marker="o", color=tone(ORANGE), label="before")
        sleep.plot(*after, linestyle="", marker="o", color=tone(GREEN), label="after")
        sleep.set_title("Loss of stored rows, before and after each sleep")
    else:
        if found.get("replay_loss", ([], []))[0]:
            draw_series(sleep, found["replay_loss"], "replayed rows", BLUE)
        sleep.set_title("Loss of replayed rows")
    sleep.set(xlabel=STEP, ylabel="loss")
    if sleep.get_legend_handles_labels()[0]:
        sleep.legend(loc="best")

    for key, label, color in (("probe_loss", "loss", BLUE), ("forgetting", "above its lowest", ORANGE)):
        if found.get(key, ([], []))[0]:
            draw_series(probe, found[key], label, color)
    for axis in (shares, sleep, probe):
        if not axis.has_data():
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
            axis.set_yticks([])
    probe.set(xlabel=STEP, ylabel="loss")
    probe.set_title("Early examples, never replayed")
    if probe.get_legend_handles_labels()[0]:
        probe.legend(loc="best")
    return figure


def _known(series: Series) -> Series:
    """Without what was not measured."""
    kept = [(step, value) for step, value in zip(*series, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]
