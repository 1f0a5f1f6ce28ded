"""Iterations and CPU seconds to grok the Grokfast paper's task, with the filters and with plain optimizers.

    python -m benchmarks.grokking [--seeds 0 1 2 3 4] [--only ema ma] [--max-iterations 2000]

The task, the model's initial weights, the split and the order of batches are those of the authors' published code for
each seed: its random stream is reproduced. Time is process CPU time of training and validation. "95 % for 10 epochs"
is the end of the tenth epoch in a row. A median counts a run that did not get there as later than all that did.

Every run is a line in grokking.jsonl. A run that stands there is not repeated: delete the file to measure afresh.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import forge_lightning.optim
from benchmarks.environment import FOLDER, keep, of_rows, stored, table
from forge_lightning.data.algorithmic import AlgorithmicData
from forge_lightning.grokfast.filter import GradientFilter
from forge_lightning.models.algorithmic import Decoder, scale_initial_weights

PAPER = 39_890  # iterations of the paper's baseline
ADAM = {"betas": (0.9, 0.98)}

EMA = {"filter": "ema", "alpha": 0.98, "lamb": 2.0}
ADAMW_TUNED = {"lr": 3e-3, "weight_decay": 1.0}
MUON = {"lr": 0.05, "weight_decay": 0.5, "momentum": 0.9, "adamw_lr": 5e-3}
SMALL = {"embedding_scale": 0.02, "weight_scale": 0.7}
# Found by `benchmarks.recipe`, on other seeds; what configs/grokking_fast.yaml has.
RECIPE: dict[str, Any] = {
    "options": {"lr": 0.055, "weight_decay": 0.25, "momentum": 0.86, "adamw_lr": 6e-3},
    "limit": 400,
    "initial": {"embedding_scale": 0.02, "weight_scale": 1.2},
    "averaging": 0.89,
    "warmup": 40,
}


class Configuration(NamedTuple):
    """One way to train.

    Args:
        what: Its row's name.
        optimizer: A class of `torch.optim` or `forge_lightning.optim`.
        options: Its arguments.
        filter: Arguments of a gradient filter.
        limit: Iterations at most.
        initial: Factors on the initial weights, as `AlgorithmicModule` has them.
        averaging: Decay of the running mean of the weights that is validated in their place; 0: none.
        warmup: Iterations over which the learning rate rises from 0; the paper's code has 10.
    """

    what: str
    optimizer: str
    options: dict
    filter: dict | None = None
    limit: int = 2000
    initial: dict | None = None
    averaging: float = 0.0
    warmup: int = 10


CONFIGURATIONS = {
    "adam": Configuration("Adam, no weight decay: the paper's baseline", "Adam", ADAM | {"lr": 1e-3}, limit=3000),
    "adam_l2": Configuration(
        "Adam, L2 0.005, no filter", "Adam", ADAM | {"lr": 1e-3, "weight_decay": 0.005}, limit=1500
    ),
    "ema": Configuration(
        "Grokfast-EMA, paper's flags: alpha 0.98, lamb 2, Adam L2 0.005",
        "Adam",
        ADAM | {"lr": 1e-3, "weight_decay": 0.005},
        EMA,
    ),
    "ma": Configuration(
        "Grokfast-MA, paper's flags: window 100, lamb 5, Adam L2 0.01",
        "Adam",
        ADAM | {"lr": 1e-3, "weight_decay": 0.01},
        {"filter": "ma", "window_size": 100, "lamb": 5.0},
    ),
    "projection": Configuration(
        "projection, alpha 0.98, lamb 2 by cosine, Adam L2 0.005",
        "Adam",
        ADAM | {"lr": 1e-3, "weight_decay": 0.005},
        {"filter": "projection", "alpha": 0.98, "lamb": 2.0, "lamb_init": 0.0, "schedule": "cosine_similarity"},
    ),
    "adamw": Configuration(
        "AdamW lr 1e-3, weight decay 1, no filter", "AdamW", ADAM | {"lr": 1e-3, "weight_decay": 1.0}
    ),
    "adamw_ema": Configuration(
        "the same + EMA alpha 0.98, lamb 2", "AdamW", ADAM | {"lr": 1e-3, "weight_decay": 1.0}, EMA
    ),
    "adamw_tuned": Configuration("AdamW lr 3e-3, weight decay 1, no filter", "AdamW", ADAM | ADAMW_TUNED),
    "adamw_tuned_ema": Configuration("the same + EMA alpha 0.98, lamb 2", "AdamW", ADAM | ADAMW_TUNED, EMA, limit=1500),
    "adamw_tuned_projection": Configuration(
        "the same + projection by cosine, lamb 0.25 (our default)",
        "AdamW",
        ADAM | ADAMW_TUNED,
        {"filter": "projection", "schedule": "cosine_similarity"},
    ),
    "adamw_tuned_averaged": Configuration(
        "AdamW lr 3e-3, weight decay 1, weights averaged (0.9)", "AdamW", ADAM | ADAMW_TUNED, averaging=0.9
    ),
    "adamw_tuned_small": Configuration(
        "the same, small initial weights", "AdamW", ADAM | ADAMW_TUNED, initial=SMALL, averaging=0.9
    ),
    "adamw_searched": Configuration(
        "AdamW by the recipe's search: lr 4.13e-3, weight decay 1, betas 0.867 and 0.971, warm-up 13",
        "AdamW",
        {"lr": 4.13e-3, "weight_decay": 1.0, "betas": (0.867, 0.971)},
        warmup=13,
    ),
    "muon": Configuration(
        "Muon lr 0.05, weight decay 0.5, small initial weights", "MuonAdamW", MUON, limit=400, initial=SMALL
    ),
    "muon_large": Configuration(
        "the same, the paper's initial weights, averaged", "MuonAdamW", MUON, limit=400, averaging=0.9
    ),
    "muon_small": Configuration(
        "the same, small initial weights, averaged", "MuonAdamW", MUON, limit=400, initial=SMALL, averaging=0.9
    ),
    "recipe": Configuration(
        "**the same, searched, learning rate warmed up over 40: grokking_fast.yaml**", "MuonAdamW", **RECIPE
    ),
    "recipe_projection": Configuration(
        "the recipe + projection by cosine, lamb 0.25",
        "MuonAdamW",
        filter={"filter": "projection", "schedule": "cosine_similarity"},
        **RECIPE,
    ),
    "recipe_ema": Configuration(
        "the recipe + EMA alpha 0.8, lamb 0.5",
        "MuonAdamW",
        filter={"filter": "ema", "alpha": 0.8, "lamb": 0.5},
        **RECIPE,
    ),
}


def run(
    seed: int,
    configuration: Configuration,
    max_iterations: int,
    data: AlgorithmicData | None = None,
    batch_size: int = 512,
    epochs: int = 10,
) -> dict:
    """One run, on the paper's task in its published random stream, until 95 % held for ``epochs`` epochs in a row.

    "crossed" is where a line between the accuracies of two validations first meets 95 %: "first" counts whole epochs.
    """
    torch.manual_seed(seed)
    data = data or AlgorithmicData("multiply")
    model = Decoder(data.num_tokens, data.seq_len)
    scale_initial_weights(model, **configuration.initial or {})
    rows = data.examples()
    order, half = torch.randperm(len(rows)), len(rows) // 2
    train, val = rows[order[:half]], rows[order[half:]]
    name = configuration.optimizer
    optim = getattr(torch.optim if hasattr(torch.optim, name) else forge_lightning.optim, name)(
        model.parameters(), **configuration.options
    )
    warmup = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: min(1.0, step / configuration.warmup))
    gradient_filter = GradientFilter(**configuration.filter) if configuration.filter else None
    mean = AveragedModel(model, avg_fn=get_ema_avg_fn(configuration.averaging)) if configuration.averaging else None

    start, iteration, streak = time.process_time(), 0, 0
    before = (0, 0.0)
    found: dict = {
        "first": None,
        "crossed": None,
        "first_seconds": None,
        "stable": None,
        "stable_seconds": None,
        "train99": None,
    }
    while iteration < max_iterations and found["stable"] is None:
        train = train[torch.randperm(len(train))]
        right = 0
        for batch in train.split(batch_size):
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits, batch[:, -1])
            model.zero_grad()
            loss.backward()
            if gradient_filter:
                gradient_filter({name: p.grad for name, p in model.named_parameters()})
            optim.step()
            warmup.step()
            if mean is not None:
                mean.update_parameters(model)
            iteration += 1
            right += int((logits.argmax(-1) == batch[:, -1]).sum())
        with torch.no_grad():
            accuracy = ((mean or model)(val[:, :-1]).argmax(-1) == val[:, -1]).float().mean().item()
        if found["train99"] is None and right >= 0.99 * len(train):
            found["train99"] = iteration
        streak = streak + 1 if accuracy >= 0.95 else 0
        if accuracy >= 0.95 and found["first"] is None:
            share = (0.95 - before[1]) / (accuracy - before[1])
            found |= {"first": iteration, "crossed": before[0] + share * (iteration - before[0])}
            found["first_seconds"] = time.process_time() - start
        before = (iteration, accuracy)
        if streak == epochs:
            found |= {"stable": iteration, "stable_seconds": time.process_time() - start}
    seconds = time.process_time() - start
    return found | {"seed": seed, "iterations": iteration, "seconds": seconds, "final_accuracy": accuracy}


def cost(turns: int = 7, iterations: int = 50) -> dict[str, float]:
    """CPU milliseconds of an iteration, validation included: the paper's baseline and the recipe in turn, medians."""
    seconds: dict[str, list[float]] = {"adam": [], "recipe": []}
    for turn in range(turns):
        for name, kept in seconds.items():
            kept.append(run(turn, CONFIGURATIONS[name], iterations)["seconds"])
    return {name: 1e3 * statistics.median(kept) / iterations for name, kept in seconds.items()}


def shipped(seed: int, threads: int) -> dict:
    """What the summary of `forge-fit fit --config grokking_fast.yaml` says, with that seed for weights and data."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["fit", "--config", "grokking_fast.yaml", f"--seed_everything={seed}", f"--data.seed={seed}"]
        subprocess.run(
            [sys.executable, "-m", "forge_lightning.cli", *command],
            check=True,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(FOLDER.parent)},
            stdout=subprocess.DEVNULL,
        )
        summary = json.loads(next(Path(folder).rglob("summary.json")).read_text())
    wanted = ("steps_to_threshold", "steps", "seconds", "status")
    return {"threads": threads, "seed": seed} | {key: summary[key] for key in wanted}


def median(values: list, digits: int = 0) -> str:
    """Median with runs that never got there counted as the worst."""
    middle = statistics.median_low([math.inf if v is None else v for v in values])
    return f"{middle:,.{digits}f}" if math.isfinite(middle) else "not reached"


def report(results: dict[str, list[dict]], command: str) -> str:
    rows = []
    for name, runs in results.items():
        what, limit = CONFIGURATIONS[name].what, CONFIGURATIONS[name].limit
        limit = max(r["iterations"] for r in runs) if all(r["first"] is None for r in runs) else limit
        firsts = [r["first"] for r in runs]
        middle = statistics.median_low([math.inf if v is None else v for v in firsts])
        rows.append(
            [
                what,
                ", ".join("–" if v is None else str(v) for v in firsts),
                median(firsts) if math.isfinite(middle) else f"not by {limit:,}",
                f"{PAPER / middle:.0f}" if math.isfinite(middle) else "–",
                median([r["first_seconds"] for r in runs], 1),
                median([r["stable"] for r in runs]),
                median([r["stable_seconds"] for r in runs], 1),
                median([r["train99"] for r in runs]),
                f"{100 * statistics.median(r['final_accuracy'] for r in runs):.1f} %",
            ]
        )
    columns = [
        "configuration", "iterations to 95 %, one per seed", "median", f"× against the paper's {PAPER:,}",
        "CPU s", "95 % for 10 epochs", "CPU s", "training 99 %", "last validation accuracy",
    ]  # fmt: skip
    seeds = sorted({r["seed"] for runs in results.values() for r in runs})
    head = of_rows(command, itertools.chain.from_iterable(results.values()))
    return (
        "# Grokking the Grokfast paper's task\n\n"
        f"{head}Seeds: {', '.join(map(str, seeds))}\n\n{__doc__.split(chr(10) * 2)[2]}\n\n"
        f"{table(columns, rows)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--max-iterations", type=int, help="for every configuration, in place of its own limit")
    parser.add_argument("--output", type=Path, default=FOLDER / "grokking.md")
    parser.add_argument(
        "--cost", action="store_true", help="time an iteration of the baseline and of the recipe, in turn"
    )
    parser.add_argument("--shipped", action="store_true", help="run the recipe's YAML, on one thread and on two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cost:
        path = FOLDER / "grokking_cost.json"
        if not path.exists():  # to time afresh, delete it
            path.write_text(json.dumps(cost()) + "\n")
        print(path.read_text())
        return
    if args.shipped:
        path = FOLDER / "grokking_fast.jsonl"
        done = {(row["threads"], row["seed"]) for row in stored(path)}
        for threads in (1, 2):
            for seed in args.seeds:
                if (threads, seed) not in done:
                    keep(path, shipped(seed, threads))
        return
    kept = args.output.with_suffix(".jsonl")
    lines = stored(kept)
    done = {(line["configuration"], line["seed"]) for line in lines}
    for name in args.only:
        for seed in args.seeds:
            if (name, seed) in done:
                continue
            result = run(seed, CONFIGURATIONS[name], args.max_iterations or CONFIGURATIONS[name].limit)
            lines.append({"configuration": name} | result)
            print(json.dumps(lines[-1]), flush=True)
            keep(kept, lines[-1])
    lines = stored(kept)
    results = {name: [line for line in lines if line["configuration"] == name] for name in CONFIGURATIONS}
    text = report({name: runs for name, runs in results.items() if runs}, "python -m benchmarks.grokking")
    print(text)
    judged = "\n## What follows\n"
    old = args.output.read_text() if args.output.exists() else ""
    args.output.write_text(text + (judged + old.split(judged, 1)[1] if judged in old else ""))


if __name__ == "__main__":
    main()
