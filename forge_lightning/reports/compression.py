"""The page of a compressed model: size against loss, and what each layer got."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge_lightning.reports import figures
from forge_lightning.reports.page import Pictures, document, table, words


def write_page(folder: Path) -> Path:
    """Draw ``compression.json`` of a folder as ``report.html``, with its pictures beside it.

    Args:
        folder: Written by `forge-fit compress`.

    Returns:
        The page.
    """
    report = json.loads((folder / "compression.json").read_text())
    pictures = Pictures(folder, [])
    parts = [_summary(report)]
    for place, stage in enumerate(report["stages"]):
        parts += _stage(stage, report, pictures, place)
    path = folder / "report.html"
    path.write_text(document(f"{Path(report['model']).name}, compressed", parts))
    return path


def _summary(report: Mapping[str, Any]) -> str:
    refused = [stage["name"] for stage in report["stages"] if not stage["accepted"]]
    accepted = len(report["stages"]) - len(refused)
    ratio = report["bytes_before"] / max(1, report["file_bytes"])
    text = (
        f"<p>{report['file_bytes'] / 1e6:.2f} MB in place of {report['bytes_before'] / 1e6:.2f} MB"
        f" ({ratio:.2f} times smaller): {report['bits_per_parameter']:.2f} bits a parameter, embeddings, norms, scales,"
        f" codebooks and the file's header included. {accepted} of {len(report['stages'])} stages accepted.</p>"
    )
    rows = [
        ["model", str(report["model"])],
        ["weights", f"{report['num_weights']:,}"],
        [
            "calibration, tuning, held-out sequences",
            f"{report['calibration_sequences']}, {report['tuning_sequences']}, {report['num_held_out']}",
        ],
        ["held-out loss before", _number(report["loss_before"]) + " nats"],
        ["time", f"{report['cpu_seconds']:.0f} s of CPU"],
        ["versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())],
    ]
    return text + table(rows)


def _stage(stage: Mapping[str, Any], report: Mapping[str, Any], pictures: Pictures, place: int) -> list[str]:
    verdict = stage["verdict"]
    state = "accepted" if stage["accepted"] else "refused, and its weights restored bit by bit"
    reason = "there is no gate" if verdict is None else verdict["reason"]
    parts = [f"<h2>{words(stage['name'])}: {state}</h2><p>{words(reason[:1].upper() + reason[1:])}.</p>"]
    if verdict is not None:
        rows = [
            ["loss, mean difference", f"{_number(verdict['mean'])} nats"],
            ["its upper bound", f"{_number(verdict['upper'])} nats"],
            ["allowed", f"{_number(verdict['limit'])} nats"],
            ["sequences compared", str(verdict["num_sequences"])],
            ["bits a weight of the stage", f"{stage['bits_per_weight']:.3f}"],
        ]
        if verdict["pass_rates"] is not None:
            rows.append(["problems solved", " to ".join(f"{rate:.1%}" for rate in verdict["pass_rates"])])
        parts.append(table(rows))
    parts.append(
        pictures.figure(
            f"candidates_{place + 1}",
            "Each dot is one codec on all weights of the stage: bits a weight against the expected rise of the loss."
            " The line is what was measured on tuning data, where the smallest choice was searched.",
            lambda: _candidates(stage),
        )
    )
    parts.append(
        pictures.figure(
            f"layers_{place + 1}",
            "Bits and error of each weight, in the order of the model.",
            lambda: _layers(stage),
        )
    )
    rows = [
        [
            name,
            row["codec"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['relative_error']:.4f}",
            f"{row['expected_loss']:.2e}",
        ]
        for name, row in stage["tensors"].items()
    ]
    if stage["left_alone"]:
        names = ", ".join(stage["left_alone"])
        parts.append(f"<p>Left as they are, since no calibration data has reached them: {words(names)}.</p>")
    header = ("weight", "codec", "bits", "relative error", "expected rise of the loss (nats)")
    parts.append(f"<details><summary>All {len(rows)} weights</summary>{table(rows, header)}</details>")
    return parts


def _totals(stage: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Bits a weight and expected loss of each codec, if all weights of the stage had it."""
    sums: dict[str, list[float]] = {}
    for row in stage["tensors"].values():
        for candidate in row["candidates"]:
            weights = 8 * candidate["num_bytes"] / candidate["bits_per_weight"]
            total = sums.setdefault(candidate["codec"], [0.0, 0.0, 0.0])
            total[0] += 8 * candidate["num_bytes"]
            total[1] += weights
            total[2] += candidate["expected_loss"]
    return {codec: (bits / weights, loss) for codec, (bits, weights, loss) in sums.items()}


def _candidates(stage: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    totals = _totals(stage)
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    axis = figure.subplots()
    by_class: dict[str, list[tuple[float, float]]] = {}
    for codec, point in totals.items():
        by_class.setdefault(codec.split("(")[0], []).append(point)
    for name, points in by_class.items():
        points.sort()
        axis.plot([bits for bits, _ in points], [max(loss, 1e-7) for _, loss in points], "o", label=name)
    trials = sorted((trial["bits_per_weight"], trial["loss"]) for trial in stage["trials"] if trial["loss"] is not None)
    trials = [(bits, loss) for bits, loss in trials if loss > 0]
    if trials:
        axis.plot([bits for bits, _ in trials], [loss for _, loss in trials], "-", label="measured choices")
    if stage["verdict"] is not None and (stage["verdict"]["mean"] or 0) > 0:
        axis.plot([stage["bits_per_weight"]], [stage["verdict"]["mean"]], "*", markersize=14, label="held out")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_xlabel("bits a weight")
    axis.set_ylabel("rise of the loss (nats)")
    axis.legend(fontsize=8)
    return figure


def _layers(stage: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = list(stage["tensors"].values())
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([row["bits_per_weight"] for row in rows], ".-", label="bits a weight")
    above.set_title("Bits a weight")
    below.plot([row["relative_error"] for row in rows], ".-", color=figures.ORANGE, label="relative error")
    below.set_title("Relative error")
    below.set_xlabel("weight, in the order of the model")
    for axis in (above, below):
        axis.set_ylim(bottom=0)
    return figure


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"
