"""The report of one or several runs: a page that needs no network, its pictures, and its numbers."""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from forge_lightning.core.metric_names import VAL_LOSS
from forge_lightning.core.trace import number
from forge_lightning.reports import comparison, dream, figures, self_knowledge
from forge_lightning.reports.trace import SUCCESS, RunTrace, join_resumed, read_run, stage_spans
from forge_lightning.telemetry.step_timer import CATEGORIES

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d9d9d9; --soft: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181d; --line: #3a3f4a; --soft: #20242c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: 0.3rem; }
img { max-width: 100%; height: auto; } figure { margin: 0.8rem 0; } figcaption { font-size: 0.9rem; opacity: 0.8; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
td, th { border-bottom: 1px solid var(--line); padding: 0.25rem 0.7rem 0.25rem 0; text-align: left;
  vertical-align: top; }
ul.remarks { background: var(--soft); padding: 0.7rem 1rem 0.7rem 2rem; border-radius: 0.3rem; }
"""

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


def analyze(paths: Sequence[Path], output: Path) -> Path:
    """Report on run directories, or trace files.

    Args:
        paths: One run, or several to compare. Runs of one directory that differ by seeds alone are one group.
        output: Folder for ``report.html``, ``analysis.json`` and the pictures.

    Returns:
        The page.

    Raises:
        ValueError: If a path is no run.
    """
    runs = [read_run(path) for path in paths]
    output.mkdir(parents=True, exist_ok=True)
    page: list[str] = []
    whole = join_resumed(runs)
    if len(runs) > 1:
        page.append("<h2>Comparison</h2>")
        pictures = _draw(output, "comparison", lambda _: comparison.comparison(whole), runs[0])
        caption = "Median of each group, with the band from its least to its largest run."
        caption += " Runs of one directory that differ by more than a seed are groups of their own."
        if len(whole) < len(runs):
            caption += " A run that was resumed is one with its beginning."
        page += [
            _figure(pictures, caption) if pictures else "<p>The runs share no series.</p>",
            _comparison_table(whole),
        ]
    for index, run in enumerate(runs):
        prefix = "" if len(runs) == 1 else f"{index:02d}_"
        page.append(_section(run, output, prefix))
    numbers: dict[str, Any] = {"runs": [numbers_of(run) for run in runs]}
    if len(runs) > 1:
        numbers["comparison"] = {"groups": _groups(whole), "series": _bands(whole)}
    (output / "analysis.json").write_text(json.dumps(_json(numbers), indent=2, allow_nan=False) + "\n")
    title = runs[0].name if len(runs) == 1 else f"{len(whole)} run{'s' * (len(whole) > 1)}"
    return _write(output, title, page)


def analyze_checkpoint(path: Path, output: Path) -> Path:
    """Report on a checkpoint alone: how far training was, what callbacks had found, and the weights.

    Raises:
        ValueError: If the file is no checkpoint with a ``state_dict``.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint; it may be cut off: {error}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} holds no `state_dict`: it is no checkpoint of Lightning.")
    output.mkdir(parents=True, exist_ok=True)
    matrices = _matrices(checkpoint["state_dict"])
    found = {key: value for key, value in checkpoint.get("callbacks", {}).items() if isinstance(value, dict)}
    events = [event for state in found.values() for event in state.get("events", []) if isinstance(event, dict)]
    facts = {
        "file": str(path),
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "parameters": sum(t.numel() for t in checkpoint["state_dict"].values() if torch.is_tensor(t)),
        "callbacks": list(dict.fromkeys(key.split("{")[0] for key in found)),
    }
    page = [_table([(key, _text(value)) for key, value in facts.items()])]
    page.append("<h2>Events until then</h2>")
    page.append(_events(events) if events else "<p>None: no callback in the checkpoint had found any.</p>")
    page.append("<h2>Weights</h2>")
    pictures = _draw(output, "weights", lambda _: figures.weights(matrices), None)
    if pictures:
        page.append(
            _figure(pictures, "Effective rank: the number of directions that share the energy, (Σ σ²)² / Σ σ⁴.")
        )
    header = ("matrix", "shape", "norm", "effective rank", "largest singular value")
    rows = [
        (m["name"], " × ".join(map(str, m["shape"])), *(f"{m[k]:.4g}" for k in ("norm", "effective_rank", "largest")))
        for m in matrices
    ]
    page.append(_table(rows, header))
    numbers = facts | {"events": events, "weights": matrices}
    (output / "analysis.json").write_text(json.dumps(_json(numbers), indent=2, allow_nan=False) + "\n")
    return _write(output, f"Checkpoint {path.name}", page)


def numbers_of(run: RunTrace) -> dict[str, Any]:
    """What the report says of a run, as numbers; and the series that its pictures draw."""
    steps = {part: _median(run, f"forge/telemetry/{part}_seconds") for part in ("step", *CATEGORIES)}
    steps_done = run.summary.get("steps")  # more than were logged, in a run that was interrupted
    last = {name: values[-1] for name, (_, values) in run.series.items() if name.startswith(("val", "forge/telemetry"))}
    return {
        "run": str(run.path),
        "group": run.group,
        "last_step": run.last_step,
        "steps": max(run.last_step, steps_done) if isinstance(steps_done, int) else run.last_step,
        "status": run.status,
        "remarks": run.remarks,
        "stages": [{"stage": name, "from": since, "to": until} for name, since, until in stage_spans(run)],
        "stages_found_afterwards": run.stages_replayed,
        "stage_changes": run.stages,
        "transitions": run.changes,
        "steps_to": {str(level): _first_step(run, level) for level in (0.5, 0.95, 0.99)},
        "best": _best(run),
        "last": last,
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


def _section(run: RunTrace, output: Path, prefix: str) -> str:
    numbers = numbers_of(run)
    facts = [
        ("run", str(run.path)),
        ("state", numbers["status"] or "unknown"),
        ("steps", f"{numbers['steps']:,}"),
        ("stage at the end", stage_spans(run)[-1][0].replace("_", "-") if stage_spans(run) else "not known"),
    ]
    success = run.find(*SUCCESS)
    if success:
        facts.append(("last validation success", f"{success[1][-1]:.4g}"))
        if numbers["best"] is not None:
            facts.append(("best", f"{numbers['best']['value']:.4g} at step {numbers['best']['step']:,}"))
        for level, step in numbers["steps_to"].items():
            facts.append(
                (f"validation success first ≥ {float(level):g}", "not reached" if step is None else f"{step:,}")
            )
    loss = run.find(*VAL_LOSS)
    if loss:
        facts.append(("last validation loss", f"{loss[1][-1]:.4g} nats"))
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
    time = numbers["median_step_seconds"].get("step")
    if time is not None:
        facts.append(("time of a step, median", figures.duration(time)))
    parts = [f"<h2>{html.escape(run.name)}</h2>", _table(facts)]
    if run.remarks:
        parts.append("<ul class=remarks>" + "".join(f"<li>{html.escape(r)}</li>" for r in run.remarks) + "</ul>")
    for name, (draw, caption) in _FIGURES.items():
        pictures = _draw(output, prefix + name, draw, run)
        if pictures:
            parts.append(_figure(pictures, caption))
    if run.stages:
        parts += ["<h3>Changes of stage</h3>", _events(run.stages)]
    if run.changes:
        parts += ["<h3>Transitions of the dimension</h3>", _events(run.changes)]
    return "\n".join(parts)


def _comparison_table(runs: Sequence[RunTrace]) -> str:
    header = ("group", "runs", "steps to success 0.5", "to 0.95", "last validation success", "a step")
    rows = []
    for group, numbers in _groups(runs).items():
        success, seconds = numbers["last_validation_success"], numbers["median_step_seconds"]
        rows.append(
            (
                group,
                str(len(numbers["runs"])),
                *(_reached(steps) for steps in numbers["steps_to"].values()),
                "–" if success is None else f"{success:.4g}",
                "–" if seconds is None else figures.duration(seconds),
            )
        )
    return _table(rows, header)


def _groups(runs: Sequence[RunTrace]) -> dict[str, dict[str, Any]]:
    """What the comparison says of each group."""
    found = {}
    for group, members in comparison.by_group(runs).items():
        last = [s[1][-1] for run in members if (s := run.find(*SUCCESS))]
        times = [t for run in members if (t := _median(run, "forge/telemetry/step_seconds")) is not None]
        found[group] = {
            "runs": [str(run.path) for run in members],
            "steps_to": {str(level): [_first_step(run, level) for run in members] for level in (0.5, 0.95)},
            "last_validation_success": median(last) if last else None,
            "median_step_seconds": median(times) if times else None,
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


def _first_step(run: RunTrace, level: float) -> int | None:
    steps, values = run.find(*SUCCESS) or ([], [])
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), None)


def _best(run: RunTrace) -> dict[str, Any] | None:
    """The highest validation success, where it was first reached."""
    steps, values = run.find(*SUCCESS) or ([], [])
    known = [(value, -step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not known:
        return None
    value, step = max(known)
    return {"value": value, "step": -step}


def _median(run: RunTrace, name: str) -> float | None:
    values = [v for v in (run.find(name) or ([], []))[1] if math.isfinite(v)]
    return median(values) if values else None


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


def _draw(output: Path, name: str, draw: Callable[[Any], Any], run: RunTrace | None) -> dict[str, bytes]:
    """Light and dark, as files and for the page."""
    pictures: dict[str, bytes] = {}
    for mode in ("light", "dark"):
        with figures.theme(dark=mode == "dark"):
            figure = draw(run)
            if figure is None:
                return {}
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
        pictures[mode] = buffer.getvalue()
        (output / f"{name}_{mode}.png").write_bytes(pictures[mode])
    return pictures


def _figure(pictures: dict[str, bytes], caption: str) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(pictures[mode]).decode()}" for mode in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(caption)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _events(events: Iterable[dict[str, Any]]) -> str:
    rows = []
    for event in events:
        if event.get("event", event.get("kind")) == "stage":
            what = f"{event.get('before')} → {event.get('after')}: {event.get('reason', '')}".replace("_", "-")
            evidence = event.get("evidence", {})
            shown = {k: n for k, v in evidence.items() if math.isfinite(n := number(v))}
            detail = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in shown.items())
        else:
            what = f"{event.get('layer')} {event.get('direction')}: {event.get('estimator')}"
            detail = f"{_text(event.get('before'))} → {_text(event.get('after'))}, confidence"
            detail += f" {_text(event.get('confidence'))}"
        rows.append((f"{event.get('step', 0):,}", what, detail))
    return _table(rows, ("step", "what", "evidence"))


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None) -> str:
    head = "" if header is None else "<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table>{head}{body}</table></div>"


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
    page.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
    return page
