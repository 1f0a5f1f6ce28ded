"""What each callback adds to a training step: GPT-2 small, a small and a tiny one.

    python -m benchmarks.overhead [--only tiny small gpt2]

GPT-2's shapes with random weights and tokens, fp32, AdamW, one thread, CPU time of the process: 124 M parameters at 4 ×
256 tokens; 2 M (4 layers of 192, 1,024 tokens of vocabulary) at 8 × 256; 0.1 M (2 layers of 64) at 32 × 32. What works
between forward and backward passes is timed by its own hooks, in one fit with all of them, logging every 10 steps to a
CSV file: median of a step's sum, but means for what comes only every so often (`GeometryProbe`: a probe of all blocks,
copying included, over 50 steps; `EdgeController` without the sampler's draws, which edge.md has). Of
`DreamReplay(schedule=Mix())`, in a fit of its own, all that it does beside the rows' own compute. `SelfModel` and
`TemperatureCurriculum` add to the loss in every other step: the median difference of neighbouring steps, plus what
their hooks take. What only works at checkpoints, in validation or at the end (`RNGState`, `Calibration`,
`CodeEvaluation`, `RunSummary`, most of `StageClassifier`) adds nothing to a step. Rows are kept in overhead.jsonl; to
measure afresh, delete it.
"""

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from benchmarks.environment import FOLDER, QUIET, keep, of_rows, stored, table
from benchmarks.geometry import _StepTimes, _TimedProbe
from forge_lightning import callbacks as forge
from forge_lightning.data import DifficultySampler
from forge_lightning.models import ForgeModule

ROWS, OUT = FOLDER / "overhead.jsonl", FOLDER / "overhead.md"
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)
PROBE_EVERY = 50


class Size(NamedTuple):
    """A model, its batch, and how long it is measured."""

    what: str
    shape: dict[str, int]
    batch: int
    tokens: int
    steps: int
    turns: int


SIZES = {
    "tiny": Size("0.1 M, 32 × 32", {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512}, 32, 32, 60, 7),
    "small": Size("2 M, 8 × 256", {"n_layer": 4, "n_embd": 192, "n_head": 4, "vocab_size": 1024}, 8, 256, 24, 5),
    "gpt2": Size("GPT-2 small, 4 × 256", {"vocab_size": 50257}, 4, 256, 6, 3),
}
QUARTER = "TemperatureCurriculum(fraction=0.25)"
INSIDE: dict[str, Callable[[], forge.SelfModel | forge.TemperatureCurriculum]] = {
    "SelfModel": forge.SelfModel,
    "TemperatureCurriculum": forge.TemperatureCurriculum,
    QUARTER: lambda: forge.TemperatureCurriculum(fraction=0.25),
}


class Hooks:
    """CPU seconds of a callback's hooks, of every step."""

    def __init__(self, callback: Callback, more: tuple[str, ...] = ()) -> None:
        self.steps, self.now = [], 0.0
        last = more[-1] if more else HOOKS[-1]
        for name in (*HOOKS, *more):
            setattr(callback, name, self.timed(getattr(callback, name), last=name == last))

    def timed(self, hook: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                self.now += time.process_time() - start
                if last:
                    self.steps.append(self.now)
                    self.now = 0.0

        return call


def fit(size: Size, callbacks: list[Callback], rows: int, steps: int) -> list[float]:
    """CPU seconds of each step of a fit, the callbacks' included."""
    seed_everything(0, verbose=False)
    shape = {"model_type": "gpt2", "n_positions": size.tokens, **size.shape}
    module = ForgeModule(config=shape)
    ids = torch.randint(0, shape["vocab_size"], (64, size.tokens), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    sampler = DifficultySampler(data, torch.linspace(0, 1, 64), batch_size=rows, num_samples=rows * (steps + 2))
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **QUIET | {"logger": CSVLogger(folder)},
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            log_every_n_steps=10,
            callbacks=[times, *callbacks, _Last(times)],
        )
        trainer.fit(module, DataLoader(data, batch_size=rows, sampler=sampler))
    gc.collect()
    return times.seconds[1:]


class _Last(Callback):
    """Ends the step after all other callbacks."""

    def __init__(self, times: _StepTimes) -> None:
        self.times = times

    def on_train_batch_end(self, *_: object) -> None:
        self.times.seconds[-1] = time.process_time() - self.times.started


class _TimedReplay(forge.DreamReplay):
    """Times what replay does inside the step too."""

    hooks: Hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self._session is not None
        for part, names in (
            (self._session.step, ("begin", "added", "returned", "end")),
            (trainer.strategy, ("batch_to_device",)),
        ):
            for name in names:
                setattr(part, name, self.hooks.timed(getattr(part, name), last=False))


def between(size: Size) -> dict[str, float]:
    """Milliseconds a step of what works between the passes, by its hooks."""
    probe = _TimedProbe(layers="all", every_n_steps=2)
    built = [
        forge.EdgeController(signal="loss", loss_threshold=5.0, policy="bandit"),
        forge.StageClassifier(),
        forge.Grokfast(schedule="constant"),
        forge.InterruptCheckpoint(),
        forge.Telemetry(),
    ]
    hooks = {type(callback).__name__: Hooks(callback) for callback in built}
    fit(size, [probe, *built], size.batch, max(size.steps, 12))
    replay = _TimedReplay(schedule=forge.Mix(fraction=0.25), probe_size=0)
    hooks["DreamReplay"] = replay.hooks = Hooks(replay, ("end_step",))
    fit(size, [replay], size.batch, max(size.steps, 12))
    often = {name: 1e3 * median(kept.steps[1:]) for name, kept in hooks.items()}
    often["Telemetry"] = 1e3 * mean(hooks["Telemetry"].steps[1:])  # loggers are written to every 10 steps
    return often | {"GeometryProbe": 1e3 * median(probe.cpu_seconds[1:]) / PROBE_EVERY}


def inside(size: Size) -> tuple[float, dict[str, float]]:
    """Milliseconds of a plain step, and what a step takes more that adds to the loss."""
    plain, more = [], {}
    for name, build in INSIDE.items():
        callback = build()
        hooks, added = Hooks(callback), callback.added
        counts = iter(range(10**9))
        callback.added = lambda loss, a=added, c=counts: a(loss) if next(c) % 2 == 0 else None
        steps = fit(size, [callback], size.batch, 2 * size.steps * size.turns)[1:]  # from the third on
        of_hooks = median(hooks.steps[2:])
        off = 1e3 * (median(steps[1::2]) - of_hooks)
        more[name] = 1e3 * median(a - b for a, b in zip(steps[::2], steps[1::2], strict=False)) + 1e3 * of_hooks
        plain.append(off)
    return mean(plain), more


def report() -> None:
    found = {row["size"]: row for row in stored(ROWS)}
    sizes = [name for name in SIZES if name in found]
    lines, (between_total, total, of_quarter) = [], (dict.fromkeys(sizes, 0.0) for _ in range(3))
    for name in (*found[sizes[0]]["between"], *INSIDE):
        line = [f"`{name}`"]
        for size in sizes:
            row = found[size]
            added = row["between"].get(name, row["inside"].get(name))
            share = 100 * added / row["step"]
            between_total[size] += share if name in row["between"] else 0.0
            total[size] += share if name != QUARTER else 0.0
            of_quarter[size] += share if name != "TemperatureCurriculum" else 0.0
            line += [f"{added:.2f}", f"{share:.2f} %"]
        lines.append(line)
    sums_of = {"all that works between passes": between_total, "everything": total}
    for what, sums in (sums_of | {f"everything, with `{QUARTER}`": of_quarter}).items():
        lines.append([what, *(text for size in sizes for text in ("", f"**{sums[size]:.1f} %**"))])
    columns = ["callback", *(text for size in sizes for text in (f"{SIZES[size].what}: ms a step", "share"))]
    steps = ", ".join(f"{SIZES[size].what} {found[size]['step']:,.0f} ms" for size in sizes)
    about = __doc__.split("\n\n", 2)[2]
    OUT.write_text(
        f"# What everything costs\n\n{of_rows('python -m benchmarks.overhead', found.values())}\n{about}\n"
        f"A plain step: {steps}.\n\n{table(columns, lines)}"
    )
    print(OUT.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in args.only:
        if any(row["size"] == name for row in stored(ROWS)):
            continue
        of_hooks = between(SIZES[name])
        step, of_steps = inside(SIZES[name])
        keep(ROWS, {"size": name, "step": step, "between": of_hooks, "inside": of_steps})
        print(json.dumps(stored(ROWS)[-1]), flush=True)
    report()


if __name__ == "__main__":
    main()
