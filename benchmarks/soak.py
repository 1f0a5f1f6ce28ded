"""A long fit with everything on: does memory, the number of open files or processes, or the time of a step grow?

    python -m benchmarks.soak [--steps 100000] [--every 1000]

A GPT-2 of one layer learns additions and small Python functions with every callback of the package: edge controller,
self-model, replay that sleeps and dreams up variants, temperature curriculum, geometry, stages, Grokfast, calibration,
evaluation in the sandbox, telemetry, checkpoints. Every so many steps memory, open files, processes, threads and CPU
time are read. The first fifth is not judged: buffers fill, caches warm up. After it, from its first to its last third
by medians, memory may grow by 2 %, the CPU time of a step by 15 %, and files, processes and threads not at all. In
fewer than 50,000 steps buffers go on filling, and a moment of other work on the machine counts for more: 5 % and 50 %.
What grows is named, and the command ends with 1.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from benchmarks.environment import FOLDER, QUIET, header, table
from forge_lightning import callbacks as forge
from forge_lightning.components import DreamAugmenter
from forge_lightning.data import GeneratedTasks
from forge_lightning.models import ForgeModule

WHAT = {
    "memory_mib": "memory, MiB",
    "step_ms": "CPU ms a step",
    "files": "open files",
    "processes": "processes",
    "threads": "threads",
}


def reading() -> dict[str, float]:
    """What this process and its children hold now. Linux."""
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("VmRSS", "Thr"))
    )
    children = [name for task in Path("/proc/self/task").iterdir() for name in (task / "children").read_text().split()]
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "processes": len(children),
    }


class Watch(Callback):
    """Take a reading every ``every`` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.rows, self._cpu, self._last = every, [], time.process_time(), 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every or step == self._last:
            return
        now = time.process_time()
        row = {"step": step, **reading(), "step_ms": 1e3 * (now - self._cpu) / (step - self._last)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._last, self._cpu = step, time.process_time()


def everything(folder: Path, every: int) -> list[Callback]:
    """All callbacks of the package, in their order, at the pace of a run of small steps."""
    return [
        forge.EdgeController(),
        forge.DreamReplay(
            schedule=forge.Sleep(every_n_steps=500, num_steps=4, batch_size=8),
            buffer=forge.Storage(capacity=2000),
            programs=forge.ProgramReplay(augmenter=DreamAugmenter(), problems_per_cycle=2),
        ),
        forge.TemperatureCurriculum(weight=0.3),
        forge.SelfModel(layers=["model.transformer.h.0"]),
        forge.GeometryProbe(every_n_steps=100, num_points=64),
        forge.StageClassifier(),
        forge.Grokfast(alpha=0.9, lamb=0.5, schedule="cosine_similarity"),
        forge.Calibration(),
        forge.CodeEvaluation(limit_problems=2, every_n_validations=5, max_new_tokens=8, num_workers=2),
        forge.RNGState(),
        ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_last=True),
        forge.InterruptCheckpoint(),
        forge.RunSummary(monitor="val/loss", mode="min"),
        Watch(every),
        forge.Telemetry(max_rows=10_000),
    ]


def soak(steps: int, every: int) -> list[dict[str, float]]:
    """Readings of one fit of ``steps`` steps."""
    seed_everything(0, verbose=False)
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}
    model = ForgeModule(config=config, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))
    data = GeneratedTasks(["addition", "python"], max_level=3, batch_size=8, steps_per_epoch=1000, num_val=4)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = everything(Path(folder), every)
        watch = next(c for c in callbacks if isinstance(c, Watch))
        trainer = Trainer(
            **QUIET | {"enable_checkpointing": True, "logger": CSVLogger(folder)},
            callbacks=callbacks,
            max_steps=steps,
            max_epochs=-1,
            log_every_n_steps=10,
            gradient_clip_val=1.0,
        )
        trainer.fit(model, datamodule=data)
    return watch.rows


def limits(steps: int) -> dict[str, float]:
    """The most that the last third may have, as a multiple of the first."""
    long = steps >= 50_000
    return {
        "memory_mib": 1.02 if long else 1.05,
        "step_ms": 1.15 if long else 1.5,
        "files": 1.0,
        "processes": 1.0,
        "threads": 1.0,
    }


def judged(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the first and of the last third, without the first fifth."""
    rows = rows[len(rows) // 5 :]
    third = max(1, len(rows) // 3)
    parts = rows[:third], rows[-third:]
    return {key: tuple(statistics.median(row[key] for row in part) for part in parts) for key in WHAT}


def grown(rows: list[dict[str, float]]) -> list[str]:
    """What grew by more than it may."""
    most = limits(int(rows[-1]["step"]))
    return [WHAT[key] for key, (first, last) in judged(rows).items() if last > first * most[key]]


def report(rows: list[dict[str, float]], command: str) -> str:
    most = limits(int(rows[-1]["step"]))
    lines = [
        [WHAT[key], f"{first:.1f}", f"{last:.1f}", f"{last / first:.3f}" if first else "–", f"{most[key]:.2f}"]
        for key, (first, last) in judged(rows).items()
    ]
    series = [[f"{r['step']:,}", *(f"{r[key]:.1f}" for key in WHAT)] for r in rows[:: max(1, len(rows) // 20)]]
    return (
        f"# {rows[-1]['step']:,} steps with everything on\n\n{header(command)}\n{__doc__.split(chr(10) * 2, 2)[2]}\n"
        + table(["", "first third", "last third", "ratio", "at most"], lines)
        + "\n"
        + table(["step", *WHAT.values()], series)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--every", type=int, help="steps between readings; default: a hundredth of all")
    parser.add_argument("--output", type=Path, help="default: soak.md here after 100,000 steps, else none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = soak(args.steps, args.every or max(1, args.steps // 100))
    output = args.output or (FOLDER / "soak.md" if args.steps >= 100_000 else None)
    text = report(rows, f"python -m benchmarks.soak --steps {args.steps}")
    print(text)
    if output:
        output.write_text(text)
    if names := grown(rows):
        sys.exit(f"grew: {', '.join(names)}")


if __name__ == "__main__":
    main()
