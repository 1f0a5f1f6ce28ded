"""Whether phase transitions and stages are found in runs that grok, and only there.

    python -m benchmarks.stages record [--only NAME ...]   # trains: about 20 CPU minutes
    python -m benchmarks.stages report

A one-layer decoder on arithmetic modulo 97 (40 % to train on), AdamW lr 1e-3, GeometryProbe every 20 steps on 512
training points, validation every 24 steps. Runs that grok: weight decay 1, also with Grokfast-EMA. Runs that do not:
the same on random labels, and without weight decay. Settings of detector and classifier were chosen on the runs whose
names do not begin with "held_out"; those were trained and looked at once the settings stood. The classifier's trends
were made stricter on 2026-11-27, against noise on constants, with all these runs in view: for the stages, none is held
out any more.
"""

import argparse
import gzip
import json
import math
import tempfile
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from benchmarks.environment import FOLDER, header, table
from forge_lightning.callbacks import GeometryProbe, Grokfast, Telemetry
from forge_lightning.core.trace import read_rows
from forge_lightning.data import AlgorithmicData
from forge_lightning.geometry.change_detector import Change, ChangeDetector, LossHealth
from forge_lightning.models import AlgorithmicModule
from forge_lightning.stages.classifier import replay

RECORDED = FOLDER.parent / "tests" / "recorded_runs"
SERIES = "forge/geometry/model.layers.0/levina_bickel"
EMA = {"alpha": 0.98, "lamb": 2.0}

RUNS = {
    # name: (groks, operation, seed, weight decay, random labels, filter options, steps)
    "grok_add_0": (True, "add", 0, 1.0, False, None, 4000),
    "grok_add_1": (True, "add", 1, 1.0, False, None, 4000),
    "grok_add_2": (True, "add", 2, 1.0, False, None, 4000),
    "grok_add_3": (True, "add", 3, 1.0, False, None, 4000),
    "grok_multiply_4": (True, "multiply", 4, 1.0, False, None, 4000),
    "grok_multiply_5": (True, "multiply", 5, 1.0, False, None, 4000),
    "grok_ema_6": (True, "add", 6, 1.0, False, EMA, 4000),
    "random_0": (False, "add", 0, 1.0, True, None, 3000),
    "random_1": (False, "add", 1, 1.0, True, None, 3000),
    "random_2": (False, "multiply", 2, 1.0, True, None, 3000),
    "random_3": (False, "add", 3, 1.0, True, None, 3000),
    "no_decay_0": (False, "add", 0, 0.0, False, None, 3000),
    "no_decay_1": (False, "add", 1, 0.0, False, None, 3000),
    "no_decay_2": (False, "multiply", 2, 0.0, False, None, 3000),
    "held_out_grok_add_10": (True, "add", 10, 1.0, False, None, 4000),
    "held_out_random_10": (False, "add", 10, 1.0, True, None, 3000),
    "held_out_grok_add_11": (True, "add", 11, 1.0, False, None, 4000),
    "held_out_random_11": (False, "multiply", 11, 1.0, True, None, 3000),
    "held_out_grok_multiply_12": (True, "multiply", 12, 1.0, False, None, 4000),
    "held_out_random_12": (False, "subtract", 12, 1.0, True, None, 3000),
    "held_out_grok_subtract_13": (True, "subtract", 13, 1.0, False, None, 4000),
    "held_out_no_decay_13": (False, "subtract", 13, 0.0, False, None, 3000),
    "held_out_grok_ema_14": (True, "add", 14, 1.0, False, EMA, 4000),
    "held_out_no_decay_14": (False, "add", 14, 0.0, False, None, 3000),
}


class _StopOnceGeneralised(Callback):
    """600 steps after validation accuracy has reached 99 %: what comes then is of interest too."""

    def __init__(self) -> None:
        self.reached: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: AlgorithmicModule) -> None:
        if self.reached is None and trainer.callback_metrics["val/accuracy"] >= 0.99:
            self.reached = trainer.global_step
        if self.reached is not None and trainer.global_step >= self.reached + 600:
            trainer.should_stop = True


def record(name: str) -> None:
    """Train, and keep what of the trace a classifier may look at."""
    _, operation, seed, weight_decay, random_labels, filter_options, steps = RUNS[name]
    seed_everything(seed, verbose=False)
    data = AlgorithmicData(operation, train_fraction=0.4, random_labels=random_labels, seed=seed)

    def optimizer(params: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=weight_decay)

    module = AlgorithmicModule(num_layers=1, optimizer=optimizer)
    callbacks = [Grokfast(**filter_options)] if filter_options else []
    callbacks += [
        GeometryProbe(layers=[1.0], every_n_steps=20, num_points=512, positions="last", max_overhead=None),
        Telemetry(every_n_steps=20),
        _StopOnceGeneralised(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=3,
            num_sanity_val_steps=0,
            logger=CSVLogger(folder, name="", version=""),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        RECORDED.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(RECORDED / f"{name}.jsonl.gz", "wb", mtime=0) as file:
            for row in read_rows(Path(folder) / "trace.jsonl"):
                file.write((json.dumps(_kept(row), separators=(",", ":")) + "\n").encode())


def _kept(row: dict) -> dict:
    def wanted(key: str) -> bool:
        return not key.startswith("forge/telemetry/") or key.endswith(("loss", "success", "norm_before", "norm_after"))

    if "metrics" in row:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row["metrics"].items() if wanted(k)}
        row = {**row, "metrics": rounded}
    return row


def report() -> str:
    """Everything found again from the recorded values, by the settings as they are now."""
    rows, lags, found, alarms = [], [], 0, 0
    for name, (groks, *_) in RUNS.items():
        with gzip.open(RECORDED / f"{name}.jsonl.gz", "rt") as file:
            trace = [json.loads(line) for line in file]
        falls = [change.step for change in changes_of(trace) if change.direction == "down"]
        stages = replay(trace)
        memorised, half, solved = (_first(trace, key, level) for key, level in _LEVELS)
        best = max(row["metrics"]["val/accuracy"] for row in trace if row["kind"] == "validation")
        named = ", ".join(f"{t.after.label} {t.step:,}" for t in stages)
        rows.append(
            [
                name,
                *("–" if step is None else f"{step:,}" for step in (memorised, half, solved)),
                f"{100 * best:.1f} %",
                ", ".join(f"{step:,}" for step in falls) or "–",
                f"{falls[0] - half:+,}" if falls and half else "–",
                named,
            ]
        )
        if groks and falls:
            found, lags = found + 1, [*lags, falls[0] - half]
        alarms += not groks and bool(falls)
    columns = [
        "run", "training 95 %", "validation 50 %", "validation 95 %", "best validation", "falls of the dimension",
        "first fall after 50 %", "stages and the steps they were declared at",
    ]  # fmt: skip
    groks = sum(run[0] for run in RUNS.values())
    summary = (
        f"Falls found in {found} of {groks} runs that grok, {-median(lags):,.0f} steps (median) before validation"
        f" accuracy reaches 50 % ({-max(lags):,} to {-min(lags):,}); false alarms in {alarms} of"
        f" {len(RUNS) - groks} runs that do not."
    )
    about = __doc__.split("\n\n", 2)[2].strip()
    command = "python -m benchmarks.stages record && python -m benchmarks.stages report"
    return f"# Phases of training\n\n{header(command)}\n{about}\n\n{summary}\n\n{table(columns, rows)}"


_LEVELS = (("forge/telemetry/success", 0.95), ("val/accuracy", 0.5), ("val/accuracy", 0.95))


def changes_of(trace: list[dict]) -> list[Change]:
    """The detector over the recorded Levina-Bickel dimension of the layer, gated by the recorded loss."""
    detector, health, loss, found = ChangeDetector(), LossHealth(), math.nan, []
    for row in trace:
        metrics = row.get("metrics", {})
        loss = float(metrics.get("forge/telemetry/loss", loss))
        if SERIES in metrics:
            found.append(detector.update(row["step"], float(metrics[SERIES]), health.update(loss)))
    return [change for change in found if change is not None]


def _first(trace: list[dict], key: str, level: float) -> int | None:
    return next((row["step"] for row in trace if row.get("metrics", {}).get(key, 0) >= level), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["record", "report"])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "record":
        for name in args.only:
            record(name)
        return
    text = report()
    print(text)
    (FOLDER / "stages.md").write_text(text)


if __name__ == "__main__":
    main()
