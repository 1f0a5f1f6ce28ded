"""What a run is made of, for the first row of its trace."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedParameter

from forge_lightning import __version__

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def run_facts(trainer: "Trainer", module: "LightningModule") -> dict[str, Any]:
    """Module and its size, versions, hardware, strategy and precision. Plain numbers and texts."""
    params = [param for param in module.parameters() if not isinstance(param, UninitializedParameter)]
    device = trainer.strategy.root_device
    return {
        "module": type(module).__name__,
        "parameters": sum(param.numel() for param in params),
        "trained_parameters": sum(param.numel() for param in params if param.requires_grad),
        "world_size": trainer.world_size,
        "devices": trainer.world_size,
        "accelerator": device.type,
        "hardware": _hardware(device, trainer.world_size),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "versions": _versions(),
        "total_steps": _total_steps(trainer),
    }


def _total_steps(trainer: "Trainer") -> int | None:
    """Optimizer steps of the whole run, where that is known. Once the loaders exist, asking changes nothing."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 <= steps < float("inf") else None


def _versions() -> dict[str, str]:
    found = {"forge-lightning": __version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware(device: torch.device, count: int) -> str:
    if device.type == "cuda":
        return f"{count} × {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return f"{name}, {threads}" + (f" in each of {count} processes" if count > 1 else "")
