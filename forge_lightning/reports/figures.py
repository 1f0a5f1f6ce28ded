"""Pictures of runs, in a light and a dark version, with colours for the colour-blind."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np

from forge_lightning.core.metric_names import VAL_LOSS
from forge_lightning.reports.learning_curves import SPLIT_COLORS, Series, logarithmic
from forge_lightning.reports.trace import SUCCESS, RunTrace, stage_spans
from forge_lightning.telemetry.step_timer import CATEGORIES

# Okabe and Ito's palette; its black is the text's colour.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442",
)  # fmt: skip
_ON_DARK = {BLUE: "#3d9be0", SKY: "#a5dcff"}  # their blue is too dark there
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW)
STAGE_COLORS = {
    "unknown": "#999999",
    "memorisation": ORANGE,
    "onset": YELLOW,
    "generalisation": SKY,
    "consolidation": GREEN,
    "plateau": PURPLE,
    "divergence": RED,
}
_PAPER = "#ffffff"
_SHORT = {"memorisation": "mem.", "generalisation": "gen.", "consolidation": "cons.", "divergence": "div."}
"""For a stage too short for its name."""
_SPLIT_COLORS = {"training": SPLIT_COLORS["train"], "validation": SPLIT_COLORS["val"]}
STEP = "optimizer step"
MAIN_ESTIMATORS = {
    "levina_bickel": "dimension (Levina–Bickel)",
    "two_nn": "dimension (TwoNN)",
    "participation_ratio": "participation ratio",
    "correlation": "correlation dimension",
    "gride_1": "dimension (Gride, 1 against 2)",
    "pca": "principal components",
}


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Colours of text, axes and background."""
    import matplotlib as mpl

    ink, paper, grid = ("#e6e6e6", "#16181d", "#3a3f4a") if dark else ("#1a1a1a", _PAPER, "#d9d9d9")
    settings = {
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": grid,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 11,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "font.size": 10,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
    with mpl.rc_context(settings):
        yield


def layers_of(run: RunTrace) -> list[str]:
    """Probed layers, in the order in which they were recorded."""
    start, end = "forge/geometry/", "/num_points"
    return [n.removeprefix(start).removesuffix(end) for n in run.series if n.startswith(start) and n.endswith(end)]


def estimators_of(run: RunTrace) -> list[str]:
    """What was estimated, without standard errors and counts."""
    layers = tuple(f"forge/geometry/{layer}/" for layer in layers_of(run))
    found = [n.rsplit("/", 1)[-1] for n in run.series if layers and n.startswith(layers)]
    return [e for e in dict.fromkeys(found) if not e.endswith("_se") and e not in ("num_points", "change")]


def overview(run: RunTrace) -> Any | None:
    """Stages, success, loss and dimension over the steps, one above the other."""
    from matplotlib.figure import Figure

    estimator = next((e for e in MAIN_ESTIMATORS if e in estimators_of(run)), None)
    success, of_what = _pairs(run, "forge/telemetry/success", SUCCESS), "Success"
    tokens = _pairs(run, "train/token_accuracy", ("val/token_accuracy",))
    if tokens and not any(value > 0 for _, values in success.values() for value in values):
        success, of_what = tokens, "Success, by tokens" + (": no sequence was right as a whole" if success else "")
    if not any(value > 0 for _, values in success.values() for value in values):
        success = {}  # a line at 0 tells nothing
    loss = _pairs(run, "forge/telemetry/loss", VAL_LOSS)
    panels = [kind for kind, there in (("loss", loss), ("success", success), ("dimension", estimator)) if there]
    if not panels:
        return None
    figure = Figure(figsize=(9, 0.7 + 2.3 * len(panels)), layout="constrained")
    heights = [0.28 if stage_spans(run) else 0.01, *(2.0 for _ in panels)]  # else it holds the title alone
    axes = figure.subplots(1 + len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_stages(axes[0], run)
    for axis, kind in zip(axes[1:], panels, strict=True):
        for name, since, until in stage_spans(run):
            axis.axvspan(since, until, color=STAGE_COLORS.get(name, "#999999"), alpha=0.10, linewidth=0)
        if kind == "dimension":
            assert estimator is not None
            draw_dimension(axis, run, estimator)
        else:
            for label, series in (success if kind == "success" else loss).items():
                draw_series(axis, series, label, _SPLIT_COLORS[label])
                if label == "training":
                    axis.get_lines()[-1].set_linewidth(2.6)  # seen beneath validation where both are equal
            axis.set_ylabel("share right" if kind == "success" else "loss (nats)")
            axis.set_title(of_what if kind == "success" else "Loss")
            if kind == "success":
                axis.set_ylim(-0.03, 1.03)
            elif _spans_decades(loss.values()):
                logarithmic(axis, "y")
            legend_above(axis)
    axes[-1].set_xlabel(STEP)
    axes[-1].set_xlim(0, 1.005 * max(1, run.last_step))
    return figure


def draw_dimension(axis: Any, run: RunTrace, estimator: str) -> None:
    """One line for each layer with a band of one standard error, and a mark at each transition."""
    layers, drawn = layers_of(run), []
    for index, layer in enumerate(layers):
        series = run.series.get(f"forge/geometry/{layer}/{estimator}")
        if series is None:
            continue
        color = _layer_color(index, len(layers))
        draw_series(axis, series, layer, color)
        drawn.append(axis.get_lines()[-1])
        errors = run.series.get(f"forge/geometry/{layer}/{estimator}_se")
        if errors is not None and errors[0] == series[0]:
            x, y, e = (np.asarray(v, dtype=float) for v in (series[0], series[1], errors[1]))
            axis.fill_between(x, y - e, y + e, color=color, alpha=0.2, linewidth=0)
    marked = False
    for change in run.changes:
        layer = "/".join(str(part) for part in (change.get("probe"), change.get("layer")) if part)
        if change.get("estimator") == estimator and layer in layers:
            marker = "v" if change.get("direction") == "down" else "^"
            color = _layer_color(layers.index(layer), len(layers))
            axis.axvline(change["step"], color=color, linewidth=1, linestyle=":")
            axis.plot(
                [change["step"]],
                [change["after"]],
                marker=marker,
                markersize=9,
                color=color,
                markeredgecolor=axis.get_facecolor(),
                linestyle="",
                label=None if marked else "transition",
            )
            marked = True
    axis.set_ylabel(MAIN_ESTIMATORS.get(estimator, estimator))
    axis.set_title("Dimension of the layers")
    if len(drawn) > 3:
        handles = [drawn[0], drawn[-1]] if len(drawn) > 8 else None
        axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)  # beside it
    elif drawn:
        legend_above(axis)


def dimensions(run: RunTrace) -> Any | None:
    """All estimators, a panel each."""
    from matplotlib.figure import Figure

    found = estimators_of(run)
    if not found:
        return None
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(9, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, estimator in zip(axes, found, strict=False):
        draw_dimension(axis, run, estimator)
        axis.set_title("")
        axis.set_xlabel(STEP)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    return figure


def optimizer(run: RunTrace) -> Any | None:
    """λ, cosine, gradient norms and learning rate."""
    panels = [
        ("Amplification", "λ", {"λ": run.find("forge/grokfast/lamb")}),
        ("Gradient and slow gradient", "cosine", {"cosine": run.find("forge/grokfast/cosine")}),
        (
            "Gradient norm, before and after filter and clipping",
            "global norm",
            {
                "before": run.find("forge/telemetry/grad_norm_before"),
                "after": run.find("forge/telemetry/grad_norm_after"),
            },
        ),
        ("Learning rate", "learning rate", {"lr": run.find("forge/telemetry/lr")}),
    ]
    return _panels(panels, {panels[2][0]})


def edge(run: RunTrace) -> Any | None:
    """Success against its band, and the difficulties that were drawn."""
    from matplotlib.figure import Figure

    success = run.find("forge/edge/success_rate")
    if success is None:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    band_low, band_high = (run.find(f"forge/edge/target_{side}") for side in ("low", "high"))
    if band_low is not None and band_high is not None:
        color = tone(GREEN)
        above.fill_between(band_low[0], band_low[1], band_high[1], color=color, alpha=0.2, linewidth=0, label="band")
    draw_series(above, success, "success", BLUE)
    expected = run.find("forge/edge/expected_success")
    if expected is not None:
        draw_series(above, expected, "expected", ORANGE)
        above.get_lines()[-1].set(linewidth=0.8, alpha=0.8)
    inside = run.find("forge/edge/in_band")
    share = f": {100 * inside[1][-1]:.0f} % of the steps in the band" if inside and math.isfinite(inside[1][-1]) else ""
    above.set(ylabel="success signal", ylim=(-0.03, 1.03))
    above.set_title(f"Success of the training examples{share}")
    legend_above(above)
    series = {key: run.find(f"forge/edge/difficulty{key}") for key in ("", "_p10", "_p90")}
    drawn, low, high = (series[key] for key in ("", "_p10", "_p90"))
    if drawn is not None and low is not None and high is not None:
        color = tone(BLUE)
        below.fill_between(low[0], low[1], high[1], color=color, alpha=0.2, linewidth=0, label="middle 80 %")
        draw_series(below, drawn, "mean drawn", BLUE)
    below.set(xlabel=STEP, ylabel="difficulty, as declared")
    title = "Difficulty drawn"
    skill = run.find("forge/edge/skill")
    if skill is not None and drawn is not None and low is not None and high is not None:
        bottom, top = min(low[1]), max(high[1])
        reach = 0.5 * (top - bottom)  # a skill far beyond what there is to draw would press the rest together
        shown = [min(top + reach, max(bottom - reach, value)) for value in skill[1]]
        limits = _with_room(low[1] + high[1] + shown)
        there = any(limits[0] <= value <= limits[1] for value in skill[1])
        draw_series(below, skill, "skill (half succeed)" + ("" if there else ", outside"), PURPLE)
        below.set_ylim(*limits)
        title += cut_off(below, skill[1], "skill, ")
    below.set_title(title)
    legend_above(below)
    return figure


def others(run: RunTrace) -> Any | None:
    """What callbacks logged that no other picture shows, a panel for each callback."""
    shown = ("telemetry", "grokfast", "geometry", "stage", "edge", "self_model", "temperature", "calibration", "dream")
    grouped: dict[tuple[str, bool], dict[str, Series | None]] = {}
    for name, series in run.series.items():
        parts = name.split("/", 2)
        if parts[0] == "forge" and len(parts) == 3 and parts[1] not in shown and len(series[0]) > 1:
            large = parts[2].startswith("num_") or any(not 0 <= v <= 1 for v in series[1] if math.isfinite(v))
            grouped.setdefault((parts[1].replace("_", " "), large), {})[parts[2]] = series  # does not press rates flat
    panels = [
        (f"{callback}: {next(iter(series)).replace('_', ' ')}" if len(series) == 1 else callback, "as logged", series)
        for (callback, _), series in grouped.items()
    ]
    return _panels(panels, set())


def step_time(run: RunTrace) -> Any | None:
    """Parts of a step over the steps, and the speed."""
    from matplotlib.figure import Figure

    parts = {key: run.find(f"forge/telemetry/{key}_seconds") for key in CATEGORIES}
    there = {key: series for key, series in parts.items() if series is not None}
    if not there:
        return None
    speeds = {name: run.find(f"forge/telemetry/{name}_per_second") for name in ("tokens", "examples")}
    told = {name: series for name, series in speeds.items() if series is not None}
    figure = Figure(figsize=(9, 5.4 if told else 3.0), layout="constrained")
    above, *below = figure.subplot_mosaic([["time"] * max(1, len(told))] + [list(told)] * bool(told)).values()
    steps = next(iter(there.values()))[0]
    heights = [1000 * np.nan_to_num(np.asarray(values)) for _, values in there.values()]
    labels = [f"{key.replace('_', ' + ')}, {duration(median(v))}" for key, (_, v) in there.items()]
    above.stackplot(steps, *heights, labels=labels, colors=cycle(len(there)), alpha=0.85)
    above.set(xlabel=STEP, ylabel="milliseconds a step", xlim=(0, max(1, run.last_step)))
    whole = np.sum(heights, axis=0)
    top = 1.25 * float(np.quantile(whole, 0.95)) or 1.0
    above.set_ylim(0, top)
    cut = int(np.sum(whole > top))
    told_cut = f"; {cut} of {len(whole)} records go up to {duration(max(whole) / 1000)}" if cut else ""
    above.set_title(f"Where the time goes (medians{told_cut})")
    above.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3)
    for axis, (name, series) in zip(below, told.items(), strict=True):
        draw_series(axis, series, name, BLUE)
        axis.set(xlabel=STEP, ylabel=f"{name} a second")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name.capitalize()} a second")
    return figure


def weights(rows: Sequence[Mapping[str, Any]]) -> Any | None:
    """Effective rank of every matrix of a checkpoint, in the order of the model."""
    from matplotlib.figure import Figure

    if not rows:
        return None
    named = len(rows) <= 40
    figure = Figure(figsize=(9, 1.0 + 0.22 * len(rows)) if named else (9, 3.2), layout="constrained")
    axis = figure.subplots()
    positions = range(len(rows))
    shares = [100 * row["effective_rank"] / row["full_rank"] for row in rows]
    axis.set_title("Weight matrices, from input to output")
    if named:
        axis.barh(positions, shares, color=tone(BLUE))
        axis.set_yticks(list(positions), [row["name"] for row in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="effective rank, % of full")
    else:
        axis.bar(positions, shares, color=tone(BLUE))
        axis.set(xlabel="matrix", ylabel="effective rank, % of full")
    return figure


def _panels(panels: Sequence[tuple[str, str, Mapping[str, Series | None]]], over_decades: set[str]) -> Any | None:
    from matplotlib.figure import Figure

    there = [(title, label, {k: v for k, v in lines.items() if v is not None}) for title, label, lines in panels]
    there = [panel for panel in there if panel[2]]
    if not there:
        return None
    rows = math.ceil(len(there) / 2)
    figure = Figure(figsize=(9, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, min(2, len(there)), squeeze=False).flatten()
    for axis, (title, label, lines) in zip(axes, there, strict=False):
        for index, (color, (name, series)) in enumerate(zip(cycle(len(lines)), lines.items(), strict=True)):
            draw_series(axis, series, name, color)
            axis.get_lines()[-1].set_linestyle("-" if index % 2 == 0 else (0, (3, 2)))  # equal lines show both
        axis.set(xlabel=STEP, ylabel=label)
        axis.set_title(title)
        if len(lines) > 1:
            legend_above(axis)
        finite = {v for _, values in lines.values() for v in values if math.isfinite(v)}
        if label == "learning rate":
            axis.set_ylim(0, 1.1 * max(finite, default=0.0) or None)
        elif len(finite) == 1:  # a constant is not to be looked at through a magnifier
            (constant,) = finite
            axis.set_ylim(constant - max(0.5, abs(constant)), constant + max(0.5, abs(constant)))
        if title in over_decades and _spans_decades(lines.values()):
            logarithmic(axis, "y")
    for axis in axes[len(there) :]:
        axis.set_visible(False)
    return figure


def _draw_stages(axis: Any, run: RunTrace) -> None:
    spans = stage_spans(run)
    for name, since, until in spans:
        axis.axvspan(since, until, color=STAGE_COLORS.get(name, "#999999"), linewidth=0)
        room = (until - since) / max(1, run.last_step) / 0.011  # characters
        names = (name.replace("_", "-"), _SHORT.get(name, ""))
        text = next((text for text in names if 0 < len(text) <= room), None)
        if text is not None:
            axis.text((since + until) / 2, 0.5, text, ha="center", va="center", color="#111111", fontsize=9)
    axis.set_yticks([])
    axis.grid(False)
    axis.set_title(run.name + ("  (stages found afterwards)" if run.stages_replayed else ""))
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.tick_params(bottom=False)


def _pairs(run: RunTrace, train: str, val: Sequence[str]) -> dict[str, Series]:
    found = {"training": run.find(train), "validation": run.find(*val)}
    return {label: series for label, series in found.items() if series is not None}


def draw_series(axis: Any, series: Series, label: str, color: Any) -> None:
    """A line, with dots where it has few points; one of no number says so."""
    steps, values = series
    values = [value if math.isfinite(value) else math.nan for value in values]
    if all(map(math.isnan, values)):
        label = f"{label}: no number"
    axis.plot(steps, values, label=label, color=tone(color), marker="." if len(steps) < 20 else "")


def _layer_color(index: int, count: int) -> Any:
    if count <= len(COLORS):
        return tone(COLORS[index])
    import matplotlib as mpl

    return mpl.colormaps["viridis"](0.1 + 0.8 * index / (count - 1))


def cycle(count: int) -> list[str]:
    """Colours of ``count`` things, as they are shown on the current background."""
    return [tone(COLORS[i % len(COLORS)]) for i in range(count)]


def tone(color: Any) -> Any:
    """A colour as it is shown on the current background."""
    import matplotlib as mpl

    dark = mpl.rcParams["figure.facecolor"] != _PAPER
    return _ON_DARK.get(color, color) if dark and isinstance(color, str) else color


def duration(seconds: float) -> str:
    """With three digits, in milliseconds or seconds."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def legend_above(axis: Any) -> None:
    """A legend where it covers nothing: beside the title."""
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=3, borderaxespad=0.0)


def cut_off(axis: Any, values: Sequence[float], what: str = "") -> str:
    """For the title of an axis whose limits are set: how far these go beyond them; nothing where they do not."""
    there = [value for value in values if math.isfinite(value)]
    bottom, top = axis.get_ylim()
    told = [f"up to {max(there):.3g}"] if there and max(there) > top else []
    told += [f"down to {min(there):.3g}"] if there and min(there) < bottom else []
    return f" ({what}cut: goes {' and '.join(told)})" if told else ""


def _with_room(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows these, with a little room."""
    there = [value for value in values if math.isfinite(value)] or [0.0]
    room = 0.08 * (max(there) - min(there)) or 1.0
    return min(there) - room, max(there) + room


def _spans_decades(lines: Any) -> bool:
    values = [v for _, series in lines for v in series if math.isfinite(v)]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)
