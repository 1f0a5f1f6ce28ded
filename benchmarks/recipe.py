"""Search of the settings that `configs/grokking_fast.yaml` ships with, and of AdamW's, by the same means.

    python -m benchmarks.recipe search muon|adamw [--generations 12]
    python -m benchmarks.recipe report

The task is that of `grokking`, on seeds that no figure is taken from (100 and up). A setting's value is the mean over
seeds of the iteration at which the validation accuracy crosses 95 %. Every generation draws settings around the best
that are known by then, and gives the best of all two seeds more, so that luck on a few does not decide. Muon began with
small initial weights and averaged weights, as the recipe was before; AdamW with what `grokking` calls tuned, its
usual initial weights and no averaging, which it keeps. AdamW's runs are three times as long, and fewer; on the seeds of
`grokking` the best of them is slower than where it began (grokking.md), and so is not the baseline. What is shipped
is rounded from several of the best, so that no digit is there for one seed's sake, and was run on twelve seeds. The
search was made when `MuonAdamW` multiplied in bf16; since 2026-11-28 it does so in fp32 on CPUs.

Every run is a line in recipe.jsonl; a search that was stopped goes on from there.
"""

import argparse
import dataclasses
import math
import random
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from statistics import mean
from typing import Any, ClassVar

import torch

from benchmarks.environment import FOLDER, keep, of_rows, stored, table
from benchmarks.grokking import RECIPE, Configuration, run

PATH = FOLDER / "recipe.jsonl"
FIRST_SEED, SEEDS = 100, 16
DECAYS = ("momentum", "averaging", "beta1", "beta2")


@dataclasses.dataclass(frozen=True)
class Muon:
    """What is searched, with where the search began."""

    lr: float = 0.05
    weight_decay: float = 0.5
    momentum: float = 0.9
    adamw_lr: float = 5e-3
    averaging: float = 0.9
    embedding_scale: float = 0.02
    weight_scale: float = 0.7
    warmup: int = 10
    limit: ClassVar[int] = 260

    def configuration(self) -> Configuration:
        options = {name: getattr(self, name) for name in ("lr", "weight_decay", "momentum", "adamw_lr")}
        initial = {"embedding_scale": self.embedding_scale, "weight_scale": self.weight_scale}
        return Configuration("", "MuonAdamW", options, None, self.limit, initial, self.averaging, self.warmup)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """What is searched, with where the search began."""

    lr: float = 3e-3
    weight_decay: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    warmup: int = 10
    limit: ClassVar[int] = 700

    def configuration(self) -> Configuration:
        options = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": (self.beta1, self.beta2)}
        return Configuration("", "AdamW", options, None, self.limit, warmup=self.warmup)


SHIPPED = Muon(**RECIPE["options"], **RECIPE["initial"], averaging=RECIPE["averaging"], warmup=RECIPE["warmup"])
KINDS: dict[str, type[Muon] | type[AdamW]] = {"muon": Muon, "adamw": AdamW}


def near(settings: Any, rng: random.Random, width: float = 0.3) -> Any:
    """Half of the settings moved: rates and scales by a factor, decays by a factor on their distance from 1."""
    moved = {}
    for name, value in dataclasses.asdict(settings).items():
        if rng.random() < 0.5:
            factor = math.exp(rng.gauss(0.0, width))
            value = 1 - min(0.5, (1 - value) * factor) if name in DECAYS else value * factor
            moved[name] = max(1, round(value)) if name == "warmup" else float(f"{value:.3g}")
    return dataclasses.replace(settings, **moved)


def rows_of(kind: str) -> list[dict]:
    return [row for row in stored(PATH) if row["kind"] == kind]


def value(row: dict) -> float:
    """Iterations; what did not get there counts as the limit and what it lacked."""
    limit = KINDS[row["kind"]].limit
    return row["crossed"] if row["crossed"] is not None else limit * (1 + 0.95 - row["final_accuracy"])


def ranked(rows: list[dict]) -> list[tuple[float, int, Any]]:
    """Mean, number of seeds and settings. Few seeds cost: a mean of ``n`` is known to about 6 / sqrt(n)."""
    found = defaultdict(list)
    for row in rows:
        found[KINDS[row["kind"]](**row["settings"])].append(value(row))
    means = [(mean(values), len(values), settings) for settings, values in found.items()]
    return sorted(means, key=lambda entry: entry[0] + 6 / math.sqrt(entry[1]))


def measure(kind: str, settings: Muon | AdamW, seed: int) -> dict:
    torch.set_num_threads(1)
    found = run(seed, settings.configuration(), settings.limit, epochs=1)
    return {"kind": kind, "settings": dataclasses.asdict(settings), "seed": seed} | found


def search(kind: str, generations: int, draws: int = 8, best: int = 4) -> None:
    rows = rows_of(kind)
    with ProcessPoolExecutor(2) as pool:

        def measured(tasks: list[tuple[Any, int]]) -> None:
            for row in pool.map(measure, [kind] * len(tasks), *zip(*tasks, strict=True)) if tasks else ():
                rows.append(row)
                keep(PATH, row)

        if not rows:
            measured([(KINDS[kind](), seed) for seed in range(FIRST_SEED, FIRST_SEED + 4)])
        for generation in range(generations):
            rng = random.Random(len(rows))
            parents = [settings for _, _, settings in ranked(rows)[:best]]
            children = [near(rng.choice(parents), rng) for _ in range(draws)]
            measured([(child, FIRST_SEED) for child in children])
            bound = 1.15 * ranked(rows)[0][0]
            good = [child for child, row in zip(children, rows[-draws:], strict=True) if value(row) < bound]
            measured([(child, FIRST_SEED + 1) for child in good])
            more = [(s, seed) for _, n, s in ranked(rows)[:best] for seed in range(n, min(n + 2, SEEDS))]
            measured([(settings, FIRST_SEED + seed) for settings, seed in more])
            print(generation, [(round(m, 1), n, s) for m, n, s in ranked(rows)[:3]], flush=True)


def report() -> str:
    parts = []
    for kind, settings in KINDS.items():
        rows = rows_of(kind)
        names = [field.name for field in dataclasses.fields(settings)]
        entries = ranked(rows)
        marked = {settings(): "where it began", SHIPPED: "**shipped**"}
        shown = entries[:6] + [entry for entry in entries[6:] if entry[2] in marked]
        lines = [
            [marked.get(s, ""), *(f"{getattr(s, name):g}" for name in names), f"{m:.1f}", str(n)] for m, n, s in shown
        ]
        parts.append(
            f"## {settings.__name__}\n\n{len(rows):,} runs of {len(entries):,} settings. Few seeds count less:"
            "\n\n" + table(["", *names, "iterations to 95 %", "seeds"], lines)
        )
    about = __doc__.split("\n\n", 2)[2].strip()
    head = of_rows("python -m benchmarks.recipe", stored(PATH))
    return f"# Search of the fast recipe\n\n{head}\n{about}\n\n" + "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "report"])
    parser.add_argument("kind", nargs="?", choices=list(KINDS), default="muon")
    parser.add_argument("--generations", type=int, default=12, help="each of 8 new settings and up to 24 runs")
    args = parser.parse_args()
    if args.part == "search":
        search(args.kind, args.generations)
    PATH.with_suffix(".md").write_text(report())


if __name__ == "__main__":
    main()
