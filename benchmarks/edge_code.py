"""Does the edge pay where programs are run? `EdgeController` on functions whose tests are executed.

    python -m benchmarks.edge_code tune|run|report

A GPT-2 of two layers and 64 units writes functions of one to four operations from three values that they give (the
family "python" of `GeneratedTasks`), 1,500 steps of 32 examples, AdamW. Every 300 steps it writes one program greedily,
for each of 120 problems, 30 of each level (of the first level, 27 functions in all, the same as in training); pass@1 is
the share that passes its tests in the sandbox. The controller sees exact match alone, which knows one of many right
answers. "tune", on seed 100: learning rates 1e-3 to 8e-3 of each way to choose, and of "easy to hard" ramps of 500 and
1,500 steps beside 1,000 at its best rate, judged by the mean over all five measurements. "run": the best of each on
seeds 0 to 4. Rows are kept in edge_code.jsonl, and a run goes on where it was stopped.
"""

import json
import sys
import time
from statistics import mean

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from benchmarks.environment import FOLDER, QUIET, interval, keep, of_rows, stored, table
from forge_lightning.callbacks import EdgeController
from forge_lightning.data import GeneratedTasks
from forge_lightning.models import ForgeModule
from forge_lightning.sandbox import Sandbox

ROWS, OUT = FOLDER / "edge_code.jsonl", FOLDER / "edge_code.md"
STEPS, EVERY, LEVELS, EACH = 1500, 300, 4, 30
METHODS = ("uniform", "easy to hard", "edge")
RATES, RAMPS, TUNING, SEEDS = (1e-3, 2e-3, 4e-3, 8e-3), (500, 1000, 1500), (100,), range(5)


class Executes(Callback):
    """Runs what the module writes, every so many steps."""

    def __init__(self, problems, sandbox):
        self.problems, self.sandbox, self.passed = problems, sandbox, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % EVERY:
            return
        prompts = [problem.prompt for problem in self.problems]
        completions = pl_module.complete(prompts, max_new_tokens=48)
        tasks = [problem.task(text) for problem, text in zip(self.problems, completions, strict=True)]
        verdicts = torch.tensor([float(verdict.passed) for verdict in self.sandbox.run_many(tasks)])
        self.passed.append([verdicts[level * EACH : (level + 1) * EACH].mean().item() for level in range(LEVELS)])


def train(method: str, lr: float, ramp: int, seed: int) -> dict:
    seed_everything(seed, verbose=False)
    order = "easy_to_hard" if method == "easy to hard" else "uniform"
    data = GeneratedTasks(
        ["python"], max_level=LEVELS, order=order, ramp_steps=ramp, seed=seed, steps_per_epoch=EVERY, num_val=EACH
    )
    shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128}
    module = ForgeModule(
        config=shape | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    )
    with Sandbox(timeout_seconds=3.0) as sandbox:
        executes = Executes(data.problems("test"), sandbox)
        callbacks = [EdgeController(), executes] if method == "edge" else [executes]
        start = time.process_time()
        trainer = Trainer(
            **QUIET, max_steps=STEPS, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0, callbacks=callbacks
        )
        trainer.fit(module, datamodule=data)
    return {"passed": executes.passed, "cpu_seconds": round(time.process_time() - start, 1)}


def area(row: dict) -> float:
    """Mean pass@1 over all measurements, in %."""
    return 100 * mean(mean(levels) for levels in row["passed"])


def last(row: dict) -> float:
    """At the end, in %."""
    return 100 * mean(row["passed"][-1])


def of(method: str, lr: float, ramp: int, seeds: tuple[int, ...] | range) -> list[dict]:
    cell = (method, lr, ramp)
    found = [r for r in stored(ROWS) if (r["method"], r["lr"], r["ramp"]) == cell and r["seed"] in seeds]
    return sorted(found, key=lambda row: row["seed"])


def best(method: str) -> tuple[float, int]:
    """Learning rate and ramp, by the tuning seeds."""
    cells = {(r["lr"], r["ramp"]) for r in stored(ROWS) if r["method"] == method and r["seed"] in TUNING}
    return max(sorted(cells), key=lambda cell: mean(map(area, of(method, *cell, TUNING))))


def measure(method: str, lr: float, ramp: int, seed: int) -> None:
    """One run, unless it is there."""
    if not of(method, lr, ramp, (seed,)):
        row = {"method": method, "lr": lr, "ramp": ramp, "seed": seed} | train(method, lr, ramp, seed)
        keep(ROWS, row)
        print(json.dumps(row), flush=True)


def report() -> None:
    lines = []
    for method in METHODS:
        lr, ramp = best(method)
        rows = of(method, lr, ramp, SEEDS)
        if not rows:
            continue
        settings = f"lr {lr:g}" + (f", ramp {ramp:,}" if method == "easy to hard" else "")
        easy, hard = (
            interval([100 * mean(row["passed"][-1][part]) for row in rows], 1)
            for part in (slice(0, 2), slice(2, LEVELS))
        )
        mean_over_run, at_the_end = (interval([value(row) for row in rows], 1) for value in (area, last))
        lines.append([method, settings, mean_over_run, at_the_end, easy, hard])
    columns = ["examples", "tuned", "mean over the run", "at the end", "levels 1 and 2", "levels 3 and 4"]
    grid = [
        [r["method"], f"{r['lr']:g}", f"{r['ramp']:,}" if r["method"] == "easy to hard" else "–", f"{r['seed']}",
         f"{area(r):.1f}", f"{last(r):.1f}", f"{r['cpu_seconds']:.0f}"]
        for r in sorted(stored(ROWS), key=lambda r: (r["method"], r["lr"], r["ramp"], r["seed"]))
    ]  # fmt: skip
    about = __doc__.split("\n\n", 2)[2]
    OUT.write_text(
        f"# The edge, where programs are run\n\n{of_rows('python -m benchmarks.edge_code tune, run', stored(ROWS))}\n"
        f"{about}\npass@1 in %, mean and 95 % interval over seeds 0 to 4.\n\n{table(columns, lines)}\n## Every run\n\n"
        + table(["examples", "lr", "ramp", "seed", "mean", "end", "CPU s"], grid)
    )
    print(OUT.read_text())


def main() -> None:
    torch.set_num_threads(1)
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part == "tune":
        for seed in TUNING:
            for method in METHODS:
                for lr in RATES:
                    measure(method, lr, 1000, seed)
            lr, _ = best("easy to hard")
            for ramp in RAMPS:
                measure("easy to hard", lr, ramp, seed)
    elif part == "run":
        for seed in SEEDS:
            for method in METHODS:
                measure(method, *best(method), seed)
    elif part == "report":
        report()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
