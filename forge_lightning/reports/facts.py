"""What a run was made of, and what came of it: for the page, for tables, and for people who ask."""

import json
import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import yaml

from forge_lightning.core.metric_names import VAL_LOSS
from forge_lightning.reports.figures import duration
from forge_lightning.reports.trace import SUCCESS, RunTrace, config_text, stage_spans

_PERPLEXITY = ("val/perplexity",)


def outcome(run: RunTrace) -> dict[str, Any]:
    """Numbers that runs are compared by; ``None`` where a run does not know."""
    return {
        "best_validation_loss": best(run, VAL_LOSS, least=True),
        "last_validation_loss": last(run, VAL_LOSS),
        "last_training_loss": last(run, ("forge/telemetry/loss",)),
        "perplexity": _perplexity(run),
        "best_validation_success": best(run, SUCCESS, least=False) if ever_right(run) else None,
        "tokens_per_second": middle(run, "forge/telemetry/tokens_per_second"),
        "median_step_seconds": middle(run, "forge/telemetry/step_seconds"),
        "seconds": _seconds(run).get("wall"),
    }


def best(run: RunTrace, names: tuple[str, ...], least: bool) -> dict[str, Any] | None:
    """The least or largest value of a series, and where it was first reached."""
    steps, values = run.find(*names) or ([], [])
    known = [
        (value if least else -value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)
    ]
    if not known:
        return None
    value, step = min(known)
    return {"value": value if least else -value, "step": step}


def last(run: RunTrace, names: tuple[str, ...]) -> float | None:
    """The last value of a series, which is NaN where it was no number."""
    values = (run.find(*names) or ([], []))[1]
    return values[-1] if values else None


def middle(run: RunTrace, name: str) -> float | None:
    """The median of a series."""
    values = [value for value in (run.find(name) or ([], []))[1] if math.isfinite(value)]
    return median(values) if values else None


def ever_right(run: RunTrace) -> bool:
    """Whether any validation success is above 0: that of whole texts never is."""
    return any(value > 0 for value in (run.find(*SUCCESS) or ([], []))[1])


def _perplexity(run: RunTrace) -> float | None:
    """Perplexity where the validation loss was best, of a run that logs perplexities."""
    found = best(run, VAL_LOSS, least=True)
    if run.find(*_PERPLEXITY) is None or found is None or found["value"] > 700:
        return None
    return math.exp(found["value"])


def _number(value: float | None, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.4g}{unit}"


def headline(run: RunTrace) -> list[tuple[str, str]]:
    """What a reader wants first: losses, then successes where there are any, speed, and how it ended."""
    found = outcome(run)
    rows: list[tuple[str, str]] = []
    if found["best_validation_loss"]:
        value, step = found["best_validation_loss"]["value"], found["best_validation_loss"]["step"]
        rows.append(("best validation loss", f"{value:.4g} nats at step {step:,}"))
        rows.append(("last validation loss", _number(found["last_validation_loss"], " nats")))
    if found["perplexity"] is not None:
        rows.append(("perplexity there", f"{found['perplexity']:.4g}"))
    if found["last_training_loss"] is not None:
        rows.append(("last training loss", _number(found["last_training_loss"], " nats")))
    success = found["best_validation_success"]
    if success is not None:
        rows.append(("best validation success", f"{success['value']:.4g} at step {success['step']:,}"))
        rows.append(("last validation success", _number(last(run, SUCCESS))))
        for level in (0.5, 0.95, 0.99):
            step = first_step(run, level)
            rows.append((f"success first ≥ {level:g}", "not reached" if step is None else f"step {step:,}"))
    if found["tokens_per_second"] is not None:
        rows.append(("tokens a second", f"{found['tokens_per_second']:,.0f}"))
    if found["median_step_seconds"] is not None:
        rows.append(("time of a step, median", duration(found["median_step_seconds"])))
    rows += [("state", run.status or "unknown"), ("steps", f"{steps_of(run):,}")]
    spans = stage_spans(run)
    if spans:
        rows.append(("stage at the end", spans[-1][0].replace("_", "-")))
    return rows


def steps_of(run: RunTrace) -> int:
    """Steps that were made: more than were logged, in a run that was interrupted."""
    done = run.summary.get("steps")
    return max(run.last_step, done) if isinstance(done, int) else run.last_step


def first_step(run: RunTrace, level: float) -> int | None:
    """Where validation success first was at a level."""
    steps, values = run.find(*SUCCESS) or ([], [])
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), None)


def makeup(run: RunTrace) -> list[tuple[str, str]]:
    """Model, data, settings, versions, hardware and cost, as far as the run has written them down."""
    config, facts = _config(run), run.facts
    rows: list[tuple[str, str]] = []
    model, data = _part(config.get("model")), _part(config.get("data"))
    if model or facts.get("module"):
        arguments = model[1] if model else {}
        inner = arguments.get("config")
        origin = arguments.get("pretrained") or (inner.get("model_type") if isinstance(inner, Mapping) else inner)
        size = facts.get("parameters")
        told = [model[0] if model else str(facts["module"]), *([str(origin)] if origin else [])]
        if isinstance(size, int):
            trained = facts.get("trained_parameters", size)
            told.append(f"{size:,} weights" + (f", of which {trained:,} are trained" if trained != size else ""))
        rows.append(("model", ", ".join(told)))
    if data:
        place = _places(data[1])
        kept = {key: data[1][key] for key in ("batch_size", "block_size", "max_length") if data[1].get(key) is not None}
        rows.append(("data", ", ".join([data[0], *([place] if place else []), *_settings(kept)])))
    for key in ("optimizer", "lr_scheduler", "peft"):
        found = model[1].get(key) if model else None
        part = _part(found)
        if part:
            rows.append((key.replace("lr_scheduler", "schedule"), ", ".join([part[0], *_settings(part[1])])))
        elif isinstance(found, Mapping):
            rows.append((key, ", ".join(_settings(found))))
    if config.get("seed_everything") is not None:
        rows.append(("seed", str(config["seed_everything"])))
    for key in ("hardware", "strategy", "precision", "versions"):
        value = facts.get(key)
        if value:
            rows.append((key, ", ".join(_settings(value, " ")) if isinstance(value, Mapping) else str(value)))
    seconds = _seconds(run)
    if isinstance(seconds.get("wall"), int | float):
        told_cost = [f"{_span(seconds['wall'])} of wall time"]
        if isinstance(seconds.get("cpu"), int | float):
            told_cost.append(f"{_span(seconds['cpu'])} of CPU time")
        devices = facts.get("devices")
        if isinstance(devices, int) and facts.get("accelerator") not in (None, "cpu"):
            told_cost.append(f"{seconds['wall'] * devices / 3600:.3g} device hours")
        rows.append(("cost", ", ".join(told_cost)))
    memory = [value for value in (run.find("forge/telemetry/peak_memory") or ([], []))[1] if math.isfinite(value)]
    if memory:
        rows.append(("peak memory", f"{max(memory):.3g} GiB"))
    return rows


def _places(arguments: Mapping[str, Any]) -> str:
    """Where data comes from, of arguments of any datamodule."""
    if arguments.get("path") is not None:
        return str(arguments["path"])
    sources = arguments.get("sources")
    if not isinstance(sources, list):
        return ""
    return ", ".join(str(source.get("path") if isinstance(source, Mapping) else source) for source in sources)


def _seconds(run: RunTrace) -> dict[str, Any]:
    found = run.summary.get("seconds")
    return dict(found) if isinstance(found, Mapping) else {}


def _config(run: RunTrace) -> dict[str, Any]:
    try:
        found = yaml.safe_load(config_text(run))
        json.dumps(found, default=str)  # of one that holds itself nothing can be said
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _part(value: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a class in a config."""
    if not isinstance(value, Mapping) or not isinstance(value.get("class_path"), str):
        return None
    arguments = value.get("init_args")
    return value["class_path"].split(".")[-1], dict(arguments) if isinstance(arguments, Mapping) else {}


def _settings(values: Mapping[str, Any], between: str = "=") -> list[str]:
    kept = {key: value for key, value in values.items() if value is not None and not isinstance(value, Mapping)}
    return [f"{key}{between}{value}" for key, value in kept.items()]


def _span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
