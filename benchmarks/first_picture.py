"""The README's first picture, from the rows that `benchmarks.grokking` keeps: `python -m benchmarks.first_picture`.

A dot for each of seeds 0 to 4, a bar at their median, an arrow where a run was stopped before it got there.
"""

import json
import math
import statistics

from matplotlib.figure import Figure

from benchmarks.environment import FOLDER
from benchmarks.grokking import PAPER
from forge_lightning.reports.figures import BLUE, GREEN, ORANGE, RED, theme, tone

SHOWN = {
    "adam": ("Adam: the paper's baseline", RED),
    "ema": ("Adam + Grokfast-EMA, the paper's flags", ORANGE),
    "adamw_tuned": ("AdamW, tuned, no filter", BLUE),
    "recipe": ("grokking_fast.yaml: Muon,\naveraged weights, warm-up", GREEN),
}


def draw() -> Figure:
    rows = [json.loads(line) for line in (FOLDER / "grokking.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axis = figure.subplots()
    for place, (name, (_, color)) in enumerate(reversed(SHOWN.items())):
        runs = [row for row in rows if row["configuration"] == name]
        stopped = [row["iterations"] for row in runs if row["first"] is None]
        first = [math.inf if row["first"] is None else row["first"] for row in runs]
        arrived = [value for value in first if math.isfinite(value)]
        axis.plot(arrived, [place] * len(arrived), "o", color=tone(color), alpha=0.6, markersize=7)
        if stopped:
            axis.plot(stopped, [place] * len(stopped), ">", color=tone(color), alpha=0.6, markersize=7)
        middle = statistics.median_low(first)
        if math.isfinite(middle):
            axis.plot([middle] * 2, [place - 0.28, place + 0.28], color=tone(color), linewidth=3)
            axis.text(max(arrived) * 1.12, place, f"{middle:,}", va="center", color=tone(color), fontweight="bold")
        else:
            text = f"not by {max(stopped):,}; {PAPER:,} in the paper"
            axis.text(min(stopped) / 1.12, place, text, ha="right", va="center", color=tone(color), fontweight="bold")
    axis.set_yticks(range(len(SHOWN)), [label for label, _ in reversed(SHOWN.values())])
    axis.set_ylim(-0.6, len(SHOWN) - 0.4)
    axis.set_xscale("log")
    axis.set_xlim(100, 4000)
    axis.set_xticks([100, 200, 500, 1000, 2000, 4000], ["100", "200", "500", "1,000", "2,000", "4,000"])
    axis.minorticks_off()
    axis.set_xlabel("iterations to 95 % validation accuracy, x · y mod 97, five seeds")
    axis.grid(axis="y", visible=False)
    return figure


def main() -> None:
    for dark in (False, True):
        with theme(dark):
            draw().savefig(FOLDER / "pictures" / f"iterations_{'dark' if dark else 'light'}.png", dpi=150)


if __name__ == "__main__":
    main()
