"""What a run left on disk, read as far as it goes."""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from forge_lightning.core.metric_names import VAL_LOSS, VAL_SUCCESS, plain_metric
from forge_lightning.core.trace import FILE_NAME, VERSION, number, read_rows
from forge_lightning.reports.learning_curves import Series, read_metrics, split_of
from forge_lightning.stages.classifier import replay

_NO_SETTING = re.compile(r"(^|\.)(seed_everything|seed|ckpt_path|default_root_dir|dirpath|logger)(\.|$)")
"""Settings in which runs of one group may differ."""
_UNSET, _MOST_DIFFERENT = object(), 3
_MOST_POINTS = 20_000
"""Points kept of a series that was recorded at steps: more than a picture shows, and bounded however long the run."""
SUCCESS = (*VAL_SUCCESS, "val/exact_match")
"""Names of validation success."""


@dataclass
class RunTrace:
    """One run: its series, events and stages, and what there is to remark on them."""

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    """``{metric: (steps, values)}``; values may be NaN."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Transitions of the geometry."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Changes of stage."""
    stages_replayed: bool = False
    """Found again from the trace, because the run had no `StageClassifier`."""
    summary: dict[str, Any] = field(default_factory=dict)
    """``summary.json``, where `RunSummary` wrote one."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """``calibration.json``: of "val" and "test" the metrics and the bins of confidence."""
    temperature_study: list[dict[str, Any]] = field(default_factory=list)
    """``temperature_study.json``: pass@k at each sampling temperature."""
    remarks: list[str] = field(default_factory=list)
    """What is missing or odd, for the reader."""
    other_names: dict[str, str] = field(default_factory=dict)
    """What "val/loss" and "val/accuracy" are called in this run, where they have none of the usual names."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What `Telemetry` wrote of the run at its beginning: size of the model, versions, hardware."""
    begins: float = math.inf
    """First step of its own: the trace of a run that was resumed holds what came before too, metrics.csv does not."""

    def __repr__(self) -> str:
        """One line, for notebooks and terminals; `show` draws it."""
        state = self.status or "state unknown"
        return f"RunTrace({self.name}: {self.last_step:,} steps, {len(self.series)} series, {state})"

    @property
    def name(self) -> str:
        """Group and run, as in ``grokking/version_0``."""
        return f"{self.group}/{self.path.name}" if self.path.parent.name else self.path.name

    @property
    def group(self) -> str:
        """Name of the directory of the run, which may hold others that differ by seed; see `group_names`."""
        return self.path.parent.name or self.path.name

    @property
    def status(self) -> str | None:
        """How the run ended; ``None`` where nothing says so."""
        if self.trained and "RunSummary" in config_text(self) and not (self.path / "summary.json").exists():
            return f"killed after step {self.last_step:,}, or still under way"
        status = self.summary.get("status")
        return None if status is None else str(status)

    @property
    def trained(self) -> bool:
        """Whether it was a fit, and no test of one."""
        return any(name.startswith(("train", "forge/telemetry/")) for name in self.series)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        return max((steps[-1] for steps, _ in self.series.values() if steps), default=0)

    def find(self, *names: str) -> Series | None:
        """The first of these series that the run has, under that name or logged by a named instance."""
        found = next((self.series[name] for name in names if name in self.series), None)
        other = next((self.other_names[name] for name in names if name in self.other_names), None)
        if found is not None or other is not None:
            return found or self.series.get(other or "")
        return next((series for key, series in self.series.items() if plain_metric(key) in names), None)


def read_run(path: str | Path) -> RunTrace:
    """A run directory, or a trace file.

    Raises:
        ValueError: If there is neither a trace nor metrics.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    trace = path if path.is_file() else directory / FILE_NAME
    if not trace.is_file():  # of an instance with a name
        trace = min(directory.glob("trace_*.jsonl"), default=trace)
    run = RunTrace(path.resolve() if path.is_dir() else path.resolve().parent)
    logged = _logged(run, directory / "metrics.csv")
    has_trace = _take_rows(run, trace)
    if has_trace:
        for name, series in logged.items():  # of callbacks behind `Telemetry`, and the module's own of training
            if name.startswith("forge/") or (split_of(name) or ("",))[0] == "train":
                run.series.setdefault(name, series)
        _take_usual_names(run)
    elif (directory / "metrics.csv").is_file():
        run.remarks.append(
            "There is no trace, only metrics.csv: step times and events are missing. Add `Telemetry` to the callbacks."
        )
        _take_metrics(run, logged)
    _find_other_names(run)
    calibration = _read_json(run, next(iter(sorted(directory.glob("calibration*.json"))), None), {})
    run.calibration = {split: kept for split, kept in calibration.items() if isinstance(kept, dict)}
    study = _read_json(run, directory / "temperature_study.json", [])
    run.temperature_study = [row for row in study if isinstance(row, dict)]
    if not (run.series or run.calibration or run.temperature_study):
        raise ValueError(
            f"{path} holds neither a {FILE_NAME} nor a metrics.csv with anything in it: it is no run of Lightning with"
            " `Telemetry` or `CSVLogger`, or the run ended before its first record."
            + (f" There are runs below it: {', '.join(below)}" if (below := _runs_below(directory)) else "")
        )
    run.begins = min((steps[0] for steps, _ in (logged or run.series).values() if steps), default=math.inf)
    run.summary = _read_json(run, directory / "summary.json", {})
    if not run.stages and any(name.startswith("val") for name in (*run.series, *run.other_names.values())):
        found = replay(read_rows(trace)) if has_trace else replay(_rows_of(run))
        run.stages = [t.as_event() for t in found]
        run.stages_replayed = bool(run.stages)
    _remark(run)
    return run


def _find_other_names(run: RunTrace) -> None:
    """The metric of a project with its own names; ``None`` if more than one could be meant."""
    for usual, words in (("val/loss", ("loss", "nll")), ("val/accuracy", ("acc", "exact_match", "success"))):
        if run.find(*(VAL_LOSS if usual == "val/loss" else VAL_SUCCESS)) is None:
            splits = {name: split for name in run.series if (split := split_of(name)) is not None}
            found = [n for n, (split, what) in splits.items() if split == "val" and any(w in what for w in words)]
            if len(found) == 1:
                run.other_names[usual] = found[0]


def _read_json(run: RunTrace, path: Path | None, empty: Any) -> Any:
    """A file's content; ``empty`` where there is none, or none that can be read."""
    if path is None or not path.is_file():
        return empty
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, type(empty)):
        run.remarks.append(f"{path.name} cannot be read.")
        return empty
    return found


def _take_rows(run: RunTrace, trace: Path) -> bool:
    """Read a trace, row by row; whether it holds any."""
    header: dict[str, Any] = {}
    strides: dict[str, int] = {}
    seen: dict[str, int] = {}
    strange = count = 0
    for row in read_rows(trace):
        count += 1
        if row.get("kind") == "header":
            header = {**row, "version": header.get("version", row.get("version"))}  # the last, of a resume
        if row.get("kind") == "event":
            event = _event(row)
            if event is None:
                strange += 1
            else:
                (run.stages if event.get("event") == "stage" else run.changes).append(event)
            continue
        metrics = row.get("metrics")
        if not isinstance(metrics, Mapping) or not isinstance(row.get("step"), int):
            continue
        of_steps = row.get("kind") == "step"
        for name, value in metrics.items():
            if of_steps:  # of a long run, every second point, then every fourth, ...
                stride = strides.get(name, 1)
                seen[name] = seen.get(name, 0) + 1
                if (seen[name] - 1) % stride:
                    continue
            steps, values = run.series.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(number(value))
            if of_steps and len(steps) >= _MOST_POINTS:
                del steps[1::2], values[1::2]
                strides[name] = 2 * stride
    if not count:
        return False
    run.facts = {key: value for key, value in header.items() if key not in ("kind", "version", "step")}
    if header.get("version") != VERSION:
        run.remarks.append(
            f"The trace is of version {header.get('version', 'unknown')}, this package reads {VERSION}: what it could"
            " not understand is left out."
        )
    with open(trace, "rb") as file:
        lines = sum(1 for _ in file)
    if strides:
        run.remarks.append(
            f"The run is long: of what was recorded at steps, one in {max(strides.values())} is read. Validations are"
            " read whole."
        )
    if lines > count:
        run.remarks.append(f"{lines - count} lines of the trace are cut off or broken, and were passed over.")
    if strange:
        run.remarks.append(f"{strange} events of the trace are of a form that is not known, and were passed over.")
    return True


def _event(row: dict[str, Any]) -> dict[str, Any] | None:
    """An event with what a report needs of it; ``None`` where that is not there."""
    if not isinstance(row.get("step"), int):
        return None
    if row.get("event") == "stage":
        if not all(isinstance(row.get(key), str) for key in ("before", "after")):
            return None
        evidence = row.get("evidence")
        row = row | {key: "unknown" for key in ("before", "after") if row[key] == "warm_up"}  # its earlier name
        return row | {"evidence": dict(evidence) if isinstance(evidence, Mapping) else {}}
    numbers = ("before", "after", "confidence")
    return row | {key: number(row.get(key)) for key in numbers}


def differences(runs: Sequence[RunTrace]) -> dict[str, list[Any]]:
    """Settings that differ between runs, by dotted name, with the value of each run, ``None`` where it is not set."""
    settings = [_settings_of(run) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return {
        key: [_plain(each.get(key)) for each in settings]
        for key in keys
        if len({str(each.get(key)) for each in settings}) > 1
    }


def _weight_of(key: str) -> int:
    """What is named first of settings that differ: the model's, its optimizer's before all, then the data's."""
    places = ("model.init_args.optimizer", "model", "data", "trainer.callbacks")
    return next((place for place, start in enumerate(places) if key.startswith(start)), len(places))


def _plain(value: Any) -> Any:
    """A setting as JSON has it: dates of YAML as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def group_names(runs: Sequence[RunTrace]) -> list[str]:
    """The group of each run: its directory, and in it the settings that runs there differ by, seeds apart.

    The directory has as much of its path as tells it from others of that name.
    """
    names = _directory_names(runs)
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        settings = [_settings_of(runs[place]) for place in places]
        keys = list(dict.fromkeys(key for each in settings for key in each))
        differ = [key for key in sorted(keys, key=_weight_of) if len({str(each.get(key)) for each in settings}) > 1]
        for place, each in zip(places, settings, strict=True) if differ else ():
            shown = [
                f"{key.split('.')[-1]}={'not set' if each.get(key) is None else each[key]}"
                for key in differ[:_MOST_DIFFERENT]
            ]
            more = len(differ) - _MOST_DIFFERENT
            names[place] = f"{name}: {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")
    return names


def _settings_of(run: RunTrace) -> dict[str, Any]:
    """The settings of the config that a run was made with, by dotted name, without seeds and places."""
    try:
        config = yaml.safe_load(config_text(run))
        json.dumps(config, default=str)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):  # or one that holds itself
        return {}
    if not isinstance(config, Mapping):
        return {}
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                walk(inner, f"{name}.{place}")
        elif not _NO_SETTING.search(name):
            found[name] = value

    walk(config, "")
    return found


def _directory_names(runs: Sequence[RunTrace]) -> list[str]:
    parents = [run.path.parent if run.path.parent.name else run.path for run in runs]
    names = []
    for parent in parents:
        depth = 1
        while any(p != parent and p.parts[-depth:] == parent.parts[-depth:] for p in parents):
            depth += 1
        names.append("/".join(parent.parts[-depth:]))
    return names


def _logged(run: RunTrace, path: Path) -> dict[str, Series]:
    """What `CSVLogger` wrote, by optimizer steps done."""
    if not path.is_file():
        return {}
    try:
        found = read_metrics(path)
    except (OSError, ValueError, csv.Error) as error:
        run.remarks.append(f"metrics.csv cannot be read: {error}")
        return {}
    return {name: ([step + 1 for step in steps], values) for name, (steps, values) in found.items()}


def _take_metrics(run: RunTrace, logged: Mapping[str, Series]) -> None:
    run.series.update(logged)
    _take_usual_names(run)


def _take_usual_names(run: RunTrace) -> None:
    """Loss and success of training under the names of `Telemetry`, where it has not logged them."""
    for ours, names in (("loss", ("train/loss", "train_loss")), ("success", ("train/accuracy", "train_acc"))):
        series = run.find(*names)
        if series is not None:
            run.series.setdefault(f"forge/telemetry/{ours}", series)


def _rows_of(run: RunTrace) -> list[dict[str, Any]]:
    """The rows that a trace would have had, for the stages."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for name, (steps, values) in run.series.items():
        kind = "validation" if name.startswith(("val/", "val_")) else "step"
        for step, value in zip(steps, values, strict=True):
            row = rows.setdefault((step, kind), {"kind": kind, "step": step, "metrics": {}})
            row["metrics"][name] = value
    return [rows[key] for key in sorted(rows)]


def _runs_below(directory: Path) -> list[str]:
    return sorted({str(found.parent) for name in (FILE_NAME, "metrics.csv") for found in directory.glob(f"*/{name}")})


def config_text(run: RunTrace) -> str:
    """The text of the config that `forge-fit` leaves in a run; empty if it does not exist."""
    try:
        return (run.path / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def resumed_from(run: RunTrace) -> str | None:
    """The checkpoint that the run's config names."""
    found = re.search(r"^ckpt_path: (?!null)(.+(?:\n .+)*)$", config_text(run), re.MULTILINE)
    return found and " ".join(found[1].split()).strip("'\"")


def join_resumed(runs: Sequence[RunTrace]) -> list[RunTrace]:
    """Runs to compare: what goes on from a run's checkpoint in the same directory of runs is one with it.

    It is a run of its own where the other finished by itself behind that checkpoint, or another goes on further from
    it. A joined run has the path and the summary of its last part, and the series and events of an earlier part up to
    where the next one begins. A run given twice counts once.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())
    further = {run.path: found for run in runs if (found := _continuation(run, runs)) is not None}
    later = {run.path for run in further.values()}
    joined = []
    for run in (run for run in runs if run.path not in later):
        while run.path in further:
            run = _one_behind_the_other(run, further[run.path])
        joined.append(run)
    return joined


def _continuation(first: RunTrace, runs: Sequence[RunTrace]) -> RunTrace | None:
    """The run that goes on from a checkpoint of another, and did so furthest."""
    folder, found = first.path.resolve(), []
    for run in runs:
        checkpoint, path = resumed_from(run), run.path.resolve()
        if checkpoint is None or path == folder or path.parent != folder.parent:
            continue
        # It lies in the run's folder, or one below; its name may be relative to where the command was given.
        places = [(base / checkpoint).resolve() for base in (Path(), *path.parents)]
        ours = any(folder in (place.parent, place.parent.parent) for place in places)
        ends = first.status != "finished" or first.last_step < run.begins
        if ours and ends and run.trained and first.begins < run.begins:
            found.append(run)
    return max(found, key=lambda run: run.last_step, default=None)


def _one_behind_the_other(first: RunTrace, second: RunTrace) -> RunTrace:
    series, begins = {}, min((steps[0] for steps, _ in second.series.values() if steps), default=math.inf)
    for name in (*first.series, *(name for name in second.series if name not in first.series)):
        (steps, values), (more_steps, more_values) = (run.series.get(name, ([], [])) for run in (first, second))
        kept = sum(step < (more_steps[0] if more_steps else second.begins) for step in steps)
        if kept or more_steps:
            series[name] = ([*steps[:kept], *more_steps], [*values[:kept], *more_values])
    events = {
        kind: [event for event in getattr(first, kind) if event["step"] < begins] + getattr(second, kind)
        for kind in ("stages", "changes")
    }
    return replace(second, series=series, begins=first.begins, **events)


def _remark(run: RunTrace) -> None:
    if checkpoint := resumed_from(run):
        run.remarks.append(
            f"It goes on from {checkpoint}. Compared with the run that wrote that, the two count as one where they lie"
            " in one directory."
        )
    status = run.status
    if status is None:
        run.remarks.append(f"No summary.json: the run was killed after step {run.last_step:,}, or has no `RunSummary`.")
    elif status != "finished":
        run.remarks.append(f"The run did not finish: {status}.")
    if fall := _deepest_fall(run):
        (step, best), (low_step, low), last = fall
        run.remarks.append(
            f"Validation success fell from {best:.3g} at step {step:,} to {low:.3g} at step {low_step:,}, and ends at"
            f" {last:.3g}. Stages are held through a dip."
        )
    missing = {
        "geometry": not any("geometry/" in name for name in run.series),
        "validation": run.find(*VAL_LOSS) is None and not any(name.startswith("val") for name in run.series),
    }
    if missing["geometry"]:
        run.remarks.append("No dimensions: add `GeometryProbe` to the callbacks.")
    if missing["validation"]:
        run.remarks.append("No validation metrics: memorisation and generalisation cannot be distinguished.")
    if not run.stages and "StageClassifier" in config_text(run) and run.find("forge/stage/number") is None:
        run.remarks.append("No stages: `StageClassifier` names them after a validation, and none has run.")
    elif not run.stages:
        found = run.find("forge/stage/number") is not None
        run.remarks.append(
            "No change of stage: too few validations, or nothing was learned that showed."
            if found
            else "No stages: the run had no `StageClassifier`, and what it recorded did not do to find them afterwards."
        )
    elif run.stages_replayed:
        run.remarks.append(
            "The run had no `StageClassifier`: its stages were found afterwards, from what was recorded."
        )


def _deepest_fall(run: RunTrace) -> tuple[tuple[int, float], tuple[int, float], float] | None:
    """Validation success at its best and at its lowest thereafter, and the last; of a share that fell by 0.3."""
    steps, values = run.find(*SUCCESS) or ([], [])
    known = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    best, found, depth = (0, -math.inf), None, 0.3
    for point in known if all(0 <= value <= 1 for _, value in known) else []:
        if point[1] >= best[1]:
            best = point
        elif best[1] - point[1] >= depth:
            found, depth = (best, point), best[1] - point[1]
    return found and (*found, known[-1][1])


def stage_spans(run: RunTrace) -> list[tuple[str, int, int]]:
    """``(stage, from step, to step)``, without gaps; nothing where no stage is known."""
    if not run.stages and run.find("forge/stage/number") is None:
        return []
    spans, since, current = [], 0, "unknown"
    for change in run.stages:
        spans.append((current, since, int(change["step"])))
        since, current = int(change["step"]), str(change["after"])
    spans.append((current, since, max(since, run.last_step)))
    return [span for span in spans[:-1] if span[2] > span[1]] + spans[-1:]  # the last counts, however late it began
