"""What a gradient filter adds to a tuned optimizer: four tasks beside the paper's, AdamW and Muon.

    python -m benchmarks.filter_matrix tune|run|report [--only add divide]

The paper's decoder learns `a + b` and `a / b mod 97`, the composition of permutations of five (half of all equations
to train on, batches of 512), and the parity of 3 of 24 bits (1,000 examples, batches of 256). "tune" chooses learning
rate and weight decay of each optimizer without a filter, on seed 100 alone. "run" takes the best with no filter, with
the paper's EMA (alpha 0.98, lamb 2), and with the same whose λ follows the agreement of gradient and slow gradient
(`schedule="cosine_similarity"`: 0 where there is none), on seeds 0 to 4; neither filter is tuned. Muon has the small
initial weights and the averaging of grokking_fast.yaml. Iterations to 95 % of the validation examples, read at the end
of every epoch. Rows are kept in filter_matrix.jsonl, and a run goes on where it was stopped. When they were made,
`MuonAdamW` multiplied in bf16; since 2026-11-28 it does so in fp32 on CPUs.
"""

import argparse
import json
import math
import statistics

import torch

from benchmarks.environment import FOLDER, keep, of_rows, stored, table
from benchmarks.grokking import ADAM, EMA, MUON, SMALL, Configuration, median, run
from forge_lightning.data import AlgorithmicData

ROWS, OUT = FOLDER / "filter_matrix.jsonl", FOLDER / "filter_matrix.md"
SEEDS, TUNING = range(5), 100
TASKS = {
    # name: (data, batch size, iterations at most for AdamW, for Muon)
    "add": (lambda seed: AlgorithmicData("add", seed=seed), 512, 800, 400),
    "divide": (lambda seed: AlgorithmicData("divide", seed=seed), 512, 800, 400),
    "sparse_parity": (
        lambda seed: AlgorithmicData("sparse_parity", num_bits=24, num_relevant_bits=3, num_examples=2000, seed=seed),
        256,
        400,
        200,
    ),
    "s5": (lambda seed: AlgorithmicData("s5", seed=seed), 512, 1200, 800),
}
GRIDS = {
    "AdamW": [ADAM | {"lr": lr, "weight_decay": wd} for lr in (1e-3, 3e-3) for wd in (0.3, 1.0)],
    "MuonAdamW": [MUON | {"lr": lr} for lr in (0.03, 0.05)] + [MUON | {"weight_decay": 0.3}],
}
FILTERS = {
    "none": None,
    "EMA": EMA,
    "EMA by cosine": EMA | {"lamb_init": 0.0, "schedule": "cosine_similarity"},
}


def rows() -> list[dict]:
    return stored(ROWS)


def measure(task: str, optimizer: str, cell: int, filter: str, seed: int) -> None:
    """One run, unless it is there."""
    key = {"task": task, "optimizer": optimizer, "cell": cell, "filter": filter, "seed": seed}
    if any(all(row[name] == value for name, value in key.items()) for row in rows()):
        return
    data, batch_size, *limits = TASKS[task]
    muon = optimizer == "MuonAdamW"
    configuration = Configuration(
        "",
        optimizer,
        GRIDS[optimizer][cell],
        FILTERS[filter],
        initial=SMALL if muon else None,
        averaging=0.9 if muon else 0.0,
    )
    found = run(seed, configuration, limits[muon], data(seed), batch_size, epochs=1)
    row = key | {name: found[name] for name in ("first", "first_seconds", "seconds", "iterations", "final_accuracy")}
    print(json.dumps(row), flush=True)
    keep(ROWS, row)


def best(task: str, optimizer: str) -> int:
    """The grid's cell that was there first on the tuning seed; where none was, the most accurate in the end."""
    tuned = [
        row
        for row in rows()
        if (row["task"], row["optimizer"], row["filter"], row["seed"]) == (task, optimizer, "none", TUNING)
    ]
    return min(tuned, key=lambda row: (row["first"] or math.inf, -row["final_accuracy"]))["cell"]


def difference(with_it: list[dict], without: list[dict]) -> str:
    """Median over seeds of the ratio of iterations; runs that did not get there count as later than all."""
    ratios = []
    for a, b in zip(with_it, without, strict=True):
        if a["first"] is None and b["first"] is None:
            return "–"
        ratios.append((a["first"] or math.inf) / (b["first"] or math.inf))
    middle = statistics.median_low(ratios)
    return f"{middle:.2f}" if math.isfinite(middle) else "not reached"


def report() -> None:
    lines = []
    for task in TASKS:
        for optimizer, grid in GRIDS.items():
            try:
                cell = best(task, optimizer)
            except ValueError:  # not tuned yet
                continue
            found = {}
            for name in FILTERS:
                found[name] = sorted(
                    (
                        r
                        for r in rows()
                        if (r["task"], r["optimizer"], r["cell"], r["filter"]) == (task, optimizer, cell, name)
                        and r["seed"] != TUNING
                    ),
                    key=lambda r: r["seed"],
                )
                if len(found[name]) < len(SEEDS):
                    continue
                firsts = [r["first"] for r in found[name]]
                settings = f"lr {grid[cell]['lr']:g}, weight decay {grid[cell]['weight_decay']:g}"
                each = ", ".join("–" if v is None else str(v) for v in firsts)
                ratio = (
                    "" if name == "none" or len(found["none"]) < len(SEEDS) else difference(found[name], found["none"])
                )
                lines.append([task, optimizer, settings, name, median(firsts), each, ratio])
    columns = ["task", "optimizer", "tuned", "filter", "iterations, median", "each", "× those without, by seed"]
    about = __doc__.split("\n\n", 2)[2]
    head = of_rows("python -m benchmarks.filter_matrix", rows())
    OUT.write_text(f"# What a filter adds\n\n{head}\n{about}\n{table(columns, lines)}")
    print(OUT.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tune", "run", "report"])
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.only:
        for optimizer, grid in GRIDS.items():
            if args.part == "tune":
                for cell in range(len(grid)):
                    measure(task, optimizer, cell, "none", TUNING)
            if args.part == "run":
                for name in FILTERS:
                    for seed in SEEDS:
                        measure(task, optimizer, best(task, optimizer), name, seed)
    if args.part == "report":
        report()


if __name__ == "__main__":
    main()
