"""What a figure was measured with."""

import datetime
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

FOLDER = Path(__file__).parent

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""Settings of a Trainer that measures."""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""97.5 % quantiles of Student's t for the mean of that many values."""


def half_width(values: Sequence[float]) -> float:
    """Half width of the 95 % interval of the mean."""
    return STUDENT.get(len(values), 2.0) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean and half of its 95 % interval."""
    return f"{mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def made() -> str:
    """When and on what a row is measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning"))
    return f"{datetime.date.today()}, {cpu_name()}, {packages}"


def stored(path: Path) -> list[dict[str, Any]]:
    """Rows that are kept, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, with when and on what it was measured."""
    with open(path, "a") as file:
        file.write(json.dumps(row | {"made": made()}) + "\n")


def of_rows(command: str, rows: Iterable[dict[str, Any]]) -> str:
    """The head of a page that is written from rows: where they come from, wherever it is written."""
    counts = sorted(Counter(row["made"] for row in rows).items())
    return f"Command: `{command}`  \nMeasured: " + " · ".join(f"{what} ({count} rows)" for what, count in counts) + "\n"


def header(command: str) -> str:
    """The head of a page whose figures were just measured."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "forge-lightning"))
    return (
        f"Command: `{command}`  \n"
        f"Date: {datetime.date.today()} · hardware: {cpu_name()}, {torch.get_num_threads()} thread(s)  \n"
        f"Versions: Python {sys.version.split()[0]}, {packages}\n"
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
