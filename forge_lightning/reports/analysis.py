"""The report of one or several runs: a page that needs no network, its pictures, and its numbers."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from forge_lightning.core.extras import require_extra
from forge_lightning.core.trace import number
from forge_lightning.reports import comparison, dream, figures, self_knowledge
from forge_lightning.reports.facts import best, first_step, headline, last, makeup, middle, outcome, steps_of
from forge_lightning.reports.page import Pictures, details, document, slug, table, words
from forge_lightning.reports.trace import (
    SUCCESS,
    RunTrace,
    config_text,
    differences,
    group_names,
    join_resumed,
    read_run,
    stage_spans,
)
from forge_lightning.telemetry.step_timer import CATEGORIES

_FIGURES: dict[str, tuple[Callable[[RunTrace], Any], str]] = {
    "overview": (
        figures.overview,
        "What was recorded of stages, success, loss and dimension. Bands of the dimension are one standard error, and"
        " a triangle marks a transition.",
    ),
    "dimensions": (figures.dimensions, "Every estimator. Values compare only at the same number of points."),
    "edge": (figures.edge, "What `EdgeController` held, and what it drew to hold it."),
    "dream": (dream.dream, "What `DreamReplay` stored and replayed, and what sleeping and forgetting did."),
    "optimizer": (
        figures.optimizer,
        "Learning rate and gradients, and what `Grokfast` did to them where it was there.",
    ),
    "self_model": (
        self_knowledge.self_model,
        "What the head of `SelfModel` predicts: 1 is all of it, 0 no more than a constant. Dashed: a copy of"
        " what it predicts from.",
    ),
    "temperature": (self_knowledge.temperature, "What `TemperatureCurriculum` compared, and how the model does there."),
    "calibration": (
        self_knowledge.reliability,
        "On the dotted line confidence is accuracy. Dots are as large as their share of the predictions.",
    ),
    "sampling": (self_knowledge.sampling, "Generated programs that pass their tests. Bars are two standard errors."),
    "step_time": (figures.step_time, "Times of the host."),
    "others": (figures.others, "What other callbacks logged."),
}


_MOST_POINTS = 2000  # of a series in the JSON


def analyze(paths: Sequence[Path | RunTrace], output: Path) -> Path:
    """Report on run directories, or trace files.

    Args:
        paths: One run, or several to compare, by directory or as `read_run` gave them. Runs of one directory
            that differ by seeds alone are one group.
        output: Folder for ``report.html``, ``analysis.json`` and the pictures. Pictures that an earlier report has left
            there go.

    Returns:
        The page.

    Raises:
        ValueError: If a path is no run.
    """
    runs = [_read(path) for path in paths]
    output.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(output, _written_before(output))
    page: list[str] = []
    whole = join_resumed(runs)
    if len(runs) > 1:
        page += _comparison(whole, pictures, len(whole) < len(runs))
    labels = _labels(runs)
    used: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        prefix = f"{slug(label)}_" if len(runs) > 1 else ""
        prefix = prefix if prefix not in used else f"{len(used)}_{prefix}"
        used.append(prefix)
        page.append(_section(run, pictures, label if len(runs) > 1 else "", prefix))
    numbers: dict[str, Any] = {"runs": [numbers_of(run) for run in runs]}
    if len(runs) > 1:
        numbers["comparison"] = {
            "groups": _groups(whole),
            "series": _bands(whole),
            "differences": differences(whole),
        }
    pictures.sweep()
    numbers["files"] = pictures.names
    (output / "analysis.json").write_text(json.dumps(_json(numbers), indent=2, allow_nan=False) + "\n")
    return _write(output, runs[0].name if len(runs) == 1 else " and ".join(_few(labels)), page)


def show(run: RunTrace | str | Path) -> Any:
    """A run as a notebook shows it: its numbers and pictures.

    Args:
        run: From `read_run`, or its directory.

    Returns:
        What IPython displays.

    Raises:
        MissingExtraError: If IPython is not installed.
    """
    display = require_extra("IPython.display", "notebooks", "`show`")
    run = _read(run)
    style = "<style>figure img { max-width: 100%; }</style>"
    return display.HTML(f"{style}<h2>{words(run.name)}</h2>{_section(run, Pictures(None), '')}")


def summary_table(paths: Sequence[Path | RunTrace]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of runs by group, as text."""
    return _comparison_rows(join_resumed([_read(path) for path in paths]))


def _read(run: RunTrace | str | Path) -> RunTrace:
    return run if isinstance(run, RunTrace) else read_run(run)


def _written_before(output: Path) -> list[str]:
    """Pictures that the last report here has written, by its own list."""
    try:
        report = json.loads((output / "analysis.json").read_text())
        found = report.get("files") if "runs" in report else None  # one of ours
    except (OSError, ValueError, AttributeError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _labels(runs: Sequence[RunTrace]) -> list[str]:
    """Names of runs, each its own: with as much of its path as that takes."""
    names = [run.name for run in runs]
    for depth in range(3, max(len(run.path.parts) for run in runs)):
        alike = {name for name in names if names.count(name) > 1}
        names = ["/".join(r.path.parts[-depth:]) if n in alike else n for r, n in zip(runs, names, strict=True)]
    return names


def _few(names: Sequence[str], most: int = 3) -> list[str]:
    return list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]


def default_output(paths: Sequence[Path]) -> Path:
    """Where a report goes: into its one run, or into a folder of the comparison's own."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    if len(folders) == 1:
        return folders[0] / "analysis"
    names = [slug("-".join(folder.resolve().parts[-2:])) for folder in folders]
    name = "_vs_".join(_few(names))[:150]
    runs = [str(folder.resolve()) for folder in folders]
    for count in range(1, 1000):
        output = Path("comparisons") / (name if count == 1 else f"{name}_{count}")
        if not output.exists() or _runs_in(output) == runs:
            break
    return output


def _runs_in(output: Path) -> list[str]:
    """The runs that a report is about."""
    try:
        return [run["run"] for run in json.loads((output / "analysis.json").read_text())["runs"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def analyze_checkpoint(path: Path, output: Path) -> Path:
    """Report on a checkpoint alone: how far training was, what callbacks had found, and the weights.

    Raises:
        ValueError: If the file is no checkpoint with a ``state_dict``.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; it may be cut off: {error}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} holds no `state_dict`: it is no checkpoint of Lightning.")
    output.mkdir(parents=True, exist_ok=True)
    matrices = _matrices(checkpoint["state_dict"])
    found = {key: value for key, value in checkpoint.get("callbacks", {}).items() if isinstance(value, dict)}
    events = [event for state in found.values() for event in state.get("events") or [] if isinstance(event, dict)]
    facts = {
        "file": str(path),
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "parameters": sum(t.numel() for t in checkpoint["state_dict"].values() if torch.is_tensor(t)),
        "callbacks": list(dict.fromkeys(key.split("{")[0] for key in found)),
    }
    page = [table([(key, _text(value)) for key, value in facts.items()])]
    page.append("<h2>Events until then</h2>")
    page.append(_events(events) if events else "<p>None: no callback in the checkpoint had found any.</p>")
    page.append("<h2>Weights</h2>")
    caption = "Effective rank: the number of directions that share the energy, (Σ σ²)² / Σ σ⁴."
    page.append(Pictures(output).figure("weights", caption, lambda: figures.weights(matrices)))
    header = ("matrix", "shape", "norm", "effective rank", "largest singular value")
    rows = [
        (m["name"], " × ".join(map(str, m["shape"])), *(f"{m[k]:.4g}" for k in ("norm", "effective_rank", "largest")))
        for m in matrices
    ]
    page.append(table(rows, header))
    numbers = facts | {"events": events, "weights": matrices}
    (output / "analysis.json").write_text(json.dumps(_json(numbers), indent=2, allow_nan=False) + "\n")
    return _write(output, f"Checkpoint {path.name}", page)


def numbers_of(run: RunTrace) -> dict[str, Any]:
    """What the report says of a run, as numbers; and the series that its pictures draw."""
    steps = {part: middle(run, f"forge/telemetry/{part}_seconds") for part in ("step", *CATEGORIES)}
    told = {name: series for name, series in run.series.items() if name.startswith(("val", "forge/telemetry"))}
    return {
        "run": str(run.path),
        "group": run.group,
        "last_step": run.last_step,
        "steps": steps_of(run),
        "facts": run.facts,
        "outcome": outcome(run),
        "status": run.status,
        "remarks": run.remarks,
        "stages": [{"stage": name, "from": since, "to": until} for name, since, until in stage_spans(run)],
        "stages_found_afterwards": run.stages_replayed,
        "stage_changes": run.stages,
        "transitions": run.changes,
        "steps_to": {str(level): first_step(run, level) for level in (0.5, 0.95, 0.99)},
        "best": best(run, SUCCESS, least=False),
        "last": {name: values[-1] for name, (_, values) in told.items()},
        "calibration": run.calibration,
        "temperature_study": run.temperature_study,
        "median_step_seconds": {key: value for key, value in steps.items() if value is not None},
        "series": {name: _thinned(*series) for name, series in run.series.items()},
    }


def _thinned(steps: list[int], values: list[float]) -> dict[str, Any]:
    """A series for the JSON: every so many of its points, and the last, where there are more than a picture shows."""
    stride = math.ceil(len(steps) / _MOST_POINTS)
    if stride <= 1:
        return {"steps": steps, "values": values}
    places = [*range(0, len(steps) - 1, stride), len(steps) - 1]
    return {"steps": [steps[i] for i in places], "values": [values[i] for i in places], "every": stride}


def _section(run: RunTrace, pictures: Pictures, label: str, prefix: str = "") -> str:
    parts = [f"<h2>{words(label)}</h2>"] if label else []
    parts.append(table([*headline(run), *_calibration_facts(run)]))
    if run.remarks:
        parts.append("<ul class=remarks>" + "".join(f"<li>{words(remark)}</li>" for remark in run.remarks) + "</ul>")
    for name, (draw, caption) in _FIGURES.items():
        parts.append(pictures.figure(prefix + name, caption, functools.partial(draw, run)))
    if run.stages:
        parts += ["<h3>Changes of stage</h3>", _events(run.stages)]
    if run.changes:
        parts += ["<h3>Transitions of the dimension</h3>", _events(run.changes)]
    parts += ["<h3>What it was</h3>", table([("run", str(run.path)), *makeup(run)])]
    if config := config_text(run):
        parts.append(details("The whole config", config))
    return "\n".join(part for part in parts if part)


def _calibration_facts(run: RunTrace) -> list[tuple[str, str]]:
    facts = []
    for split, kept in run.calibration.items():
        metrics = kept.get("metrics", {})
        ece = [_text(metrics[name]) for name in ("ece", "ece_fitted") if metrics.get(name) is not None]
        facts.append(
            (
                f"ECE on {split} data, as it is, and at the temperature fitted in the validation before",
                ", ".join(ece) or "unknown",
            )
        )
        if kept.get("fitted") is not None:
            facts.append((f"temperature, as known after {split} data", _text(kept["fitted"])))
    return facts


def _comparison(runs: Sequence[RunTrace], pictures: Pictures, joined: bool) -> list[str]:
    """What differs, losses first, and the curves."""
    header, rows = _comparison_rows(runs)
    parts = ["<h2>Comparison</h2>", table(rows, header)]
    found = differences(runs)
    if found:
        groups = group_names(runs)
        values = [[key, *(_setting(value) for value in row)] for key, row in found.items()]
        names = [f"{group} ({run.path.name})" for run, group in zip(runs, groups, strict=True)]
        parts += ["<h3>Settings that differ</h3>", table(values, ["setting", *names])]
    caption = "Median of each group, with the band from its least to its largest run."
    caption += " Runs of one directory that differ by more than a seed are groups of their own."
    if joined:
        caption += " A run that was resumed is one with its beginning."
    drawn = pictures.figure("comparison", caption, lambda: comparison.comparison(runs))
    return [*parts, drawn or "<p>The runs share no series.</p>"]


def _setting(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _comparison_rows(runs: Sequence[RunTrace]) -> tuple[list[str], list[list[str]]]:
    """A row a group: losses and their distance to the best; successes where any run has one."""
    groups = _groups(runs)
    losses = {name: found["best_validation_loss"] for name, found in groups.items()}
    known = [loss for loss in losses.values() if loss is not None]
    with_success = any(found["last_validation_success"] for found in groups.values())
    header = ["group", "runs", "best validation loss", "above the best", "at step", "perplexity"]
    header += ["steps to success 0.5", "to 0.95", "last validation success"] if with_success else []
    header += ["tokens a second", "a step"]
    rows = []
    for name, found in groups.items():
        loss, seconds, speed = losses[name], found["median_step_seconds"], found["tokens_per_second"]
        row = [name, str(len(found["runs"]))]
        row += [_spread(found["best_validation_losses"]), "–" if loss is None else f"{loss - min(known):.4g}"]
        row += [_listed(found["best_steps"]), "–" if found["perplexity"] is None else f"{found['perplexity']:.4g}"]
        if with_success:
            row += [_reached(steps) for steps in found["steps_to"].values()]
            row.append("–" if found["last_validation_success"] is None else f"{found['last_validation_success']:.4g}")
        row += ["–" if speed is None else f"{speed:,.0f}", "–" if seconds is None else figures.duration(seconds)]
        rows.append(row)
    empty = [column for column in range(3, len(header)) if all(row[column] == "–" for row in rows)]
    kept = [column for column in range(len(header)) if column not in empty]
    return [header[column] for column in kept], [[row[column] for column in kept] for row in rows]


def _spread(values: Sequence[float]) -> str:
    """Median, and least and largest where there are several."""
    if not values:
        return "–"
    return f"{median(values):.4g}" + (f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else "")


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps) or "–"


def _groups(runs: Sequence[RunTrace]) -> dict[str, dict[str, Any]]:
    """What the comparison says of each group."""
    found = {}
    for group, members in comparison.by_group(runs).items():
        each = [outcome(run) for run in members]
        losses = [one["best_validation_loss"] for one in each if one["best_validation_loss"] is not None]
        successes = [v for run in members if (v := last(run, SUCCESS)) is not None and math.isfinite(v)]

        def middle_of(key: str, each: list[dict[str, Any]] = each) -> float | None:
            values = [one[key] for one in each if one[key] is not None]
            return median(values) if values else None

        found[group] = {
            "runs": [str(run.path) for run in members],
            "best_validation_loss": median(loss["value"] for loss in losses) if losses else None,
            "best_validation_losses": [loss["value"] for loss in losses],
            "best_steps": [loss["step"] for loss in losses],
            "perplexity": middle_of("perplexity"),
            "steps_to": {str(level): [first_step(run, level) for run in members] for level in (0.5, 0.95)},
            "last_validation_success": median(successes) if successes else None,
            "tokens_per_second": middle_of("tokens_per_second"),
            "median_step_seconds": middle_of("median_step_seconds"),
        }
    return found


def _bands(runs: Sequence[RunTrace]) -> dict[str, Any]:
    """The curves that the comparison draws."""
    keys = ("steps", "median", "least", "largest")
    return {
        title: {
            group: {"runs": count} | dict(zip(keys, (values.tolist() for values in band), strict=True))
            for group, (count, band) in bands.items()
        }
        for title, _, bands in comparison.compared(runs)
    }


def _reached(steps: Sequence[int | None]) -> str:
    """The median, a run that did not get there counted as later than all that did, and every run."""
    each = ", ".join("–" if step is None else f"{step:,}" for step in steps)
    ordered = sorted(math.inf if step is None else step for step in steps)
    middle = ordered[(len(ordered) - 1) // 2]
    return f"{middle:,.0f} ({each})" if math.isfinite(middle) else f"not reached ({each})"


def _matrices(state: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, tensor in state.items():
        if not torch.is_tensor(tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            continue
        matrix = tensor.flatten(1).float()
        if min(matrix.shape) < 2:
            continue
        gram = (matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix).double()
        energy = torch.linalg.eigvalsh(gram).clamp(min=0) if bool(gram.isfinite().all()) else gram.diagonal() * math.nan
        found.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "norm": float(energy.sum().sqrt()),
                "effective_rank": float(energy.sum() ** 2 / energy.square().sum()),
                "full_rank": min(matrix.shape),
                "largest": float(energy.max().sqrt()),
            }
        )
    return found


def _events(events: Iterable[dict[str, Any]]) -> str:
    """One line an event, its evidence folded away."""
    lines = []
    for event in events:
        if event.get("event", event.get("kind")) == "stage":
            what = f"{event.get('before')} → {event.get('after')}: {event.get('reason', '')}".replace("_", "-")
            evidence = event.get("evidence", {})
            shown = {k: n for k, v in evidence.items() if math.isfinite(n := number(v))}
            detail = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in shown.items())
        else:
            what = f"{event.get('layer')} {event.get('direction')}: {event.get('estimator')}"
            what += f" {_text(event.get('before'))} → {_text(event.get('after'))}"
            detail = f"confidence {_text(event.get('confidence'))}"
        lines.append(details(f"step {event.get('step', 0):,}: {what}", detail or "no numbers were recorded"))
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _json(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return value


def _write(output: Path, title: str, parts: Sequence[str]) -> Path:
    page = output / "report.html"
    page.write_text(document(title, parts))
    return page
