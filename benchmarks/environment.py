"""What a figure was measured with."""

import datetime
import platform
import sys
from importlib.metadata import version
from pathlib import Path

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


def header(command: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "forge-lightning"))
    return (
        f"Command: `{command}`  \n"
        f"Date: {datetime.date.today()} · hardware: {cpu_name()}, {torch.get_num_threads()} thread(s)  \n"
        f"Versions: Python {sys.version.split()[0]}, {packages}\n"
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
