"""What predicting oneself and agreeing with oneself bring: `SelfModel` and `TemperatureCurriculum`, alone and together.

    python -m benchmarks.self_knowledge tune|text|fraction|tuned|arithmetic|cost|report   (FORGE_MBPP: MBPP's file)

Text: bytes of MBPP's problems and solutions, 15,000 to train on, 10,000 to choose the best step and to fit the
temperature, 20,000 to measure; a GPT-2 of two layers and 96 units, 600 steps of 16 × 64 tokens: it over-fits. "text"
has nothing against that, as the figures that it reproduces. "tune" chooses learning rate, weight decay and dropout
of plain AdamW on seeds 100 and 101; "tuned" repeats the main rows with the best; the methods keep their settings of
"text". Arithmetic: the Grokfast paper's decoder on `a + b mod 97`, AdamW as tuned in
benchmarks/grokking.md, 1,000 steps. Cost: CPU time of a step of GPT-2's shape, in turn with and without. Rows are kept
in self_knowledge.jsonl, and a run goes on where it was stopped.
"""

import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.nn import functional as F

from benchmarks.environment import FOLDER, QUIET, half_width, keep, of_rows, stored, table
from forge_lightning.calibration.metrics import CalibrationMetric, FittedTemperature
from forge_lightning.callbacks import SelfModel, TemperatureCurriculum
from forge_lightning.components import SelfModelHead
from forge_lightning.data import AlgorithmicData, TextData
from forge_lightning.data.records import read_jsonl
from forge_lightning.models import AlgorithmicModule, ForgeModule
from forge_lightning.temperature.teacher import EMATeacher

ROWS, OUT = FOLDER / "self_knowledge.jsonl", FOLDER / "self_knowledge.md"
SIZES = {"train": 15_000, "val": 10_000, "test": 20_000}
STEPS, EVERY, BLOCK, BATCH = 600, 50, 64, 16
TUNING_SEEDS, SEEDS = (100, 101), range(5)
ONE_TEMPERATURE = {"bins": [(3.99, 4.01)], "overlap": 0.0}
WARMUP = 60

PLAIN = {"lr": 2e-3, "weight_decay": 0.1, "dropout": 0.0}
"""As in the figures that are to be reproduced: nothing against over-fitting."""
TUNED = {"lr": 2e-3, "weight_decay": 1.0, "dropout": 0.2}
"""Best of the grid by validation loss for averaged weights, and within 0.003 nats of the best for the model itself."""


def head(weight, form="paper", **more):
    return {"self_model": {"weight": weight, "form": form, **more}}


def agreement(weight=0.5, **more):
    return {"temperature": {"weight": weight, **more}}


VARIANTS = {
    "plain": {},
    "label smoothing 0.1": {"smoothing": 0.1},
    "self-model, weight 1": head(1.0),
    "self-model, weight 3": head(3.0),
    "self-model, weight 10": head(10.0),
    "next latent, weight 1": head(1.0, "next_latent"),
    "curriculum": agreement(),
    "one temperature, τ = 4": agreement(**ONE_TEMPERATURE),
    "self-model, weight 1, and curriculum": head(1.0) | agreement(),
    "self-model, weight 3, and curriculum": head(3.0) | agreement(),
}
FRACTIONS = {
    "plain": {},
    "curriculum": agreement(),
    "curriculum, on a quarter of the rows": agreement(fraction=0.25),
}
ON_TUNED = (
    "plain",
    "label smoothing 0.1",
    "self-model, weight 1",
    "self-model, weight 3",
    "curriculum",
)
GRID = [
    {"lr": 1e-3, "weight_decay": 0.1, "dropout": 0.1},
    {"lr": 1e-3, "weight_decay": 0.1, "dropout": 0.2},
    {"lr": 1e-3, "weight_decay": 0.1, "dropout": 0.3},
    {"lr": 2e-3, "weight_decay": 0.1, "dropout": 0.0},
    {"lr": 2e-3, "weight_decay": 0.1, "dropout": 0.2},
    {"lr": 2e-3, "weight_decay": 1.0, "dropout": 0.0},
    {"lr": 2e-3, "weight_decay": 1.0, "dropout": 0.2},
    {"lr": 4e-3, "weight_decay": 1.0, "dropout": 0.0},
]


def text_files(folder):
    """Files of bytes, cut one after the other from MBPP's problems in their order."""
    records = read_jsonl(os.environ["FORGE_MBPP"], {"text": str, "code": str})
    text = "\n\n".join(f"{record['text']}\n{record['code']}".replace("\r\n", "\n") for record in records)
    start, paths = 0, {}
    for split, size in SIZES.items():
        paths[split] = Path(folder) / f"{split}.txt"
        paths[split].write_text(text[start : start + size])
        start += size
    return paths


class Smoothed(ForgeModule):
    smoothing = 0.1

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=self.smoothing)


class Keeps(Callback):
    """The model, and a running mean of its weights, where their validation loss was least."""

    def __init__(self, batches, every):
        self.batches, self.every = batches, every
        self.best = {"model": (math.inf, 0, None), "mean": (math.inf, 0, None)}

    def on_train_start(self, trainer, pl_module):
        self.teacher = EMATeacher(pl_module.model, 0.995)
        self.teacher.begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.teacher.update()
        if trainer.global_step % self.every == 0:
            model = pl_module.model.eval()
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            for name, call, kept in (
                ("model", model, weights),
                ("mean", self.teacher, {k: v.clone() for k, v in self.teacher.state_dict()["means"].items()}),
            ):
                nll = likelihood(call, self.batches)
                if nll < self.best[name][0]:
                    self.best[name] = (nll, trainer.global_step, kept)
            model.train()

    def measure(self, model, which, final):
        """At the end, or where it was best."""
        weights = dict(self.teacher.state_dict()["means"]) if which == "mean" else None
        weights = weights if final else self.best[which][2]
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name] if weights is not None else p)
        return measure(model.eval(), self.batches)


def predictions(call, batches):
    for ids, labels in batches:
        out = call(input_ids=ids)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        yield (logits[:, :-1].flatten(0, 1) if logits.ndim == 3 else logits), labels


@torch.no_grad()
def likelihood(call, batches):
    found = [(F.cross_entropy(rows, labels), len(labels)) for rows, labels in predictions(call, batches["val"])]
    return float(sum(loss * size for loss, size in found) / sum(size for _, size in found))


@torch.no_grad()
def measure(call, batches):
    """On test data, and with the temperature that fits the validation data."""
    fit = FittedTemperature(max_rows=None)
    for rows, labels in predictions(call, batches["val"]):
        fit.update(rows, labels)
    temperature = float(fit.compute()["temperature"])
    plain, scaled = CalibrationMetric(), CalibrationMetric(temperature)
    for rows, labels in predictions(call, batches["test"]):
        plain.update(rows, labels)
        scaled.update(rows, labels)
    of_plain, of_scaled = plain.compute(), scaled.compute()
    found = {"temperature": temperature} | {name: float(of_plain[name]) for name in ("nll", "ece", "brier", "accuracy")}
    return found | {f"{name}_fitted": float(of_scaled[name]) for name in ("nll", "ece")}


def callbacks_of(options):
    built = []
    if "self_model" in options:
        built.append(SelfModel(warmup_steps=WARMUP, **options["self_model"]))
    if "temperature" in options:
        built.append(TemperatureCurriculum(warmup_steps=WARMUP, **options["temperature"]))
    return built


def train_text(variant, options, base, seed):
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        paths = text_files(folder)
        data = TextData(str(paths["train"]), str(paths["val"]), block_size=BLOCK, batch_size=BATCH, seed=seed)
        data.setup()
        batches = {}
        for split in ("val", "test"):
            held_out = TextData(str(paths["train"]), str(paths[split]), block_size=BLOCK)
            held_out.setup()
            rows = held_out.val_dataloader().dataset
            ids = torch.stack([torch.as_tensor(rows[i].input_ids).long() for i in range(len(rows))])
            batches[split] = [(part, part[:, 1:].flatten()) for part in ids.split(64)]
        shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": BLOCK}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), base["dropout"])
        kind = Smoothed if "smoothing" in options else ForgeModule
        module = kind(
            config=shape,
            optimizer=lambda params: torch.optim.AdamW(
                params, lr=base["lr"], betas=(0.9, 0.98), weight_decay=base["weight_decay"]
            ),
        )
        keeps = Keeps(batches, EVERY)
        trainer = Trainer(
            **QUIET, max_steps=STEPS, max_epochs=-1, limit_val_batches=4, val_check_interval=EVERY,
            check_val_every_n_epoch=None, callbacks=[*callbacks_of(options), keeps],
        )  # fmt: skip
        start = time.process_time()
        trainer.fit(module, datamodule=data)
        seconds = time.process_time() - start
    rows = []
    for which in ("model", "mean"):  # the model's own final weights first: they are overwritten
        name = variant if which == "model" else f"{variant}, averaged weights"
        row = {"task": "text", "variant": name, "seed": seed, "base": base, "cpu_seconds": round(seconds, 1)}
        final = keeps.measure(module.model, which, final=True)
        best = keeps.measure(module.model, which, final=False)
        nll, step, _ = keeps.best[which]
        rows.append(row | {"final": final, "best": best, "best_val_nll": nll, "best_step": step})
    return rows


class ReachedAt(Callback):
    def __init__(self):
        self.step, self.nll, self.accuracy = None, [], []

    def on_validation_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        if self.step is None and float(metrics["val/accuracy"]) >= 0.95:
            self.step = trainer.global_step


def train_arithmetic(variant, options, base, seed):
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    data = AlgorithmicData("add", 97, train_fraction=0.4, batch_size=512, seed=seed)
    module = AlgorithmicModule(
        num_layers=1,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.98), weight_decay=1.0),
    )
    reached = ReachedAt()
    trainer = Trainer(
        **QUIET, max_steps=1000, max_epochs=-1, val_check_interval=20, check_val_every_n_epoch=None,
        callbacks=[*callbacks_of(options), reached],
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    module.eval()
    whole = [(batch["input_ids"], batch["target"]) for batch in data.val_dataloader()]
    half = len(whole) // 2 or 1
    final = measure(lambda input_ids: module(input_ids), {"val": whole[:half], "test": whole[half:] or whole})
    row = {"task": "arithmetic", "variant": variant, "seed": seed, "reached": reached.step, "final": final}
    return [row | {"cpu_seconds": round(seconds, 1)}]


ON_ARITHMETIC = (
    "plain",
    "self-model, weight 1",
    "self-model, weight 3",
    "curriculum",
    "self-model, weight 1, and curriculum",
)


def jobs(which):
    if which == "tune":
        for number, base in enumerate(GRID):
            yield from ((train_text, f"grid {number}", {}, base, seed) for seed in TUNING_SEEDS)
    elif which == "text":
        for seed in SEEDS:
            yield from ((train_text, name, options, PLAIN, seed) for name, options in VARIANTS.items())
    elif which == "fraction":
        for seed in SEEDS:
            yield from ((train_text, f"fraction: {name}", o, PLAIN, seed) for name, o in FRACTIONS.items())
    elif which == "tuned":
        for seed in SEEDS:
            yield from ((train_text, f"tuned: {name}", VARIANTS[name], TUNED, seed) for name in ON_TUNED)
    elif which == "arithmetic":
        for seed in range(5):
            yield from ((train_arithmetic, name, VARIANTS[name], None, seed) for name in ON_ARITHMETIC)


def run(job):
    train, *arguments = job
    return train(*arguments)


def kept():
    return stored(ROWS)


def train(which, workers):
    done = {(row["task"], row["variant"], row["seed"]) for row in kept()}
    task = "arithmetic" if which == "arithmetic" else "text"
    todo = [job for job in jobs(which) if (task, job[1], job[4]) not in done]
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(run, todo):
            for row in rows:
                keep(ROWS, row)
            print(rows[0]["variant"], rows[0]["seed"], rows[0]["final"]["nll"], rows[0]["cpu_seconds"], flush=True)


def cost():
    """CPU seconds of a training step, one thread, in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head = SelfModelHead(weight=1.0)
    module = ForgeModule(config={"model_type": "gpt2", "vocab_size": 50257})
    module.build()
    head.attach(module.model)
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=1e-4)
    batch = {"input_ids": torch.randint(0, 50257, (2, 256)), "attention_mask": torch.ones(2, 256, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    teacher = EMATeacher(module.model, 0.995)
    seconds = {"plain": [], "head": [], "teacher": []}
    for turn in range(7):
        for kind, kept in seconds.items():
            start = time.process_time()
            optimizer.zero_grad()
            if kind == "head":
                head.start()
            outputs, logits, _ = module._step(batch)
            loss = outputs["loss"]
            if kind == "head":
                loss = loss + head.loss(step=turn, mask=batch["attention_mask"])
                head.stop()
            if kind == "teacher":
                taught = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                assert taught.logits[:, :-1].shape == logits.shape
            loss.backward()
            optimizer.step()
            if kind == "head":
                head.end_step(step=turn + 1, measure=True)
            if kind == "teacher":
                teacher.update()
            kept.append(time.process_time() - start)
            print(kind, round(kept[-1], 2), flush=True)
    middle = {kind: median(kept[1:]) for kind, kept in seconds.items()}
    keep(ROWS, {"task": "cost", "variant": "cost", "seed": 0, "seconds": middle})


def interval(values):
    return mean(values), half_width(values)


def shown(values, digits=3):
    middle, half = interval(values)
    return f"{middle:.{digits}f} ± {half:.{digits}f}"


def by_variant(rows, prefix):
    found = {}
    for row in rows:
        name = row["variant"]
        if name.startswith(prefix) and (prefix or ": " not in name) and not name.startswith("grid"):
            found.setdefault(name.removeprefix(prefix), {})[row["seed"]] = row
    return found


def text_table(rows, prefix):
    found = by_variant([row for row in rows if row["task"] == "text"], prefix)
    if "plain" not in found:
        return "Not run yet.\n"
    plain, lines = found["plain"], []
    for name, seeds in found.items():
        both = sorted(set(seeds) & set(plain))
        difference = [seeds[s]["final"]["nll"] - plain[s]["final"]["nll"] for s in both]
        at_best = [seeds[s]["best"]["nll"] - plain[s]["best"]["nll"] for s in both]
        final = [seeds[s]["final"] for s in both]
        lines.append(
            [
                name,
                shown([row["nll"] for row in final]),
                "–" if name == "plain" else shown(difference),
                shown([seeds[s]["best"]["nll"] for s in both]),
                "–" if name == "plain" else shown(at_best),
                shown([row["ece"] for row in final]),
                f"{mean([row['temperature'] for row in final]):.2f}",
                shown([row["nll_fitted"] for row in final]),
                shown([row["ece_fitted"] for row in final]),
            ]
        )
    columns = ["variant", "NLL at the end", "against plain", "NLL at the best step", "against plain", "ECE at the end"]
    return table([*columns, "fitted T", "NLL at T", "ECE at T"], lines)


def arithmetic_table(rows):
    found = by_variant([row for row in rows if row["task"] == "arithmetic"], "")
    lines = []
    for name, seeds in found.items():
        reached = [seeds[s]["reached"] for s in sorted(seeds)]
        known = sorted(math.inf if step is None else step for step in reached)
        middle = known[(len(known) - 1) // 2]
        each = ", ".join("–" if step is None else str(step) for step in reached)
        final = [seeds[s]["final"] for s in sorted(seeds)]
        lines.append(
            [
                name,
                f"{middle:g} ({each})" if middle < math.inf else f"not reached ({each})",
                shown([row["accuracy"] for row in final]),
                shown([row["nll"] for row in final]),
                shown([row["ece"] for row in final]),
            ]
        )
    columns = ["variant", "steps to 95 %, median (each)", "accuracy after 1,000", "NLL", "ECE"]
    return table(columns, lines) if lines else "Not run yet.\n"


def additive(rows, prefix):
    """Gains of both together, against the sum of the gains of each, paired by seed."""
    found = by_variant([row for row in rows if row["task"] == "text"], prefix)
    lines = []
    for head_name in ("self-model, weight 1", "self-model, weight 3"):
        names = ("plain", head_name, "curriculum", f"{head_name}, and curriculum")
        if not all(name in found for name in names):
            continue
        seeds = sorted(set.intersection(*(set(found[name]) for name in names)))
        for when in ("final", "best"):
            nll = {name: [found[name][s][when]["nll"] for s in seeds] for name in names}
            rest = [both - (one + other - plain) for plain, one, other, both in zip(*nll.values(), strict=True)]
            where = "at the end" if when == "final" else "at the best step"
            lines.append(f"{names[-1]}, less the sum of both gains (0 if they add up): {shown(rest)} nats {where}.  \n")
    return "".join(lines)


def report():
    rows = kept()
    grid = {}
    for row in rows:
        if row["variant"].startswith("grid"):
            base = ", ".join(f"{key} {value:g}" for key, value in row["base"].items())
            averaged = "averaged" in row["variant"]
            grid.setdefault(base, {}).setdefault(averaged, []).append(row["best_val_nll"])
    lines = [[base, f"{mean(v[False]):.3f}", f"{mean(v[True]):.3f}"] for base, v in grid.items()]
    of_cost = [row["seconds"] for row in rows if row["task"] == "cost"][-1:]
    parts = [
        "# Predicting oneself, agreeing with oneself\n",
        of_rows("python -m benchmarks.self_knowledge report", rows),
        "\nMean and 95 % interval over seeds 0 to 4; differences are paired by seed. NLL in nats a"
        " byte, on test data; T is fitted on validation data.\n",
        "\n## Text, nothing against over-fitting (lr 2e-3, weight decay 0.1, no dropout)\n\n",
        text_table(rows, ""),
        "\n" + additive(rows, ""),
        "\n## The same with a quarter of each batch's rows compared, and its neighbours anew\n\n",
        text_table(rows, "fraction: "),
        "\n## The same with plain AdamW tuned: lr 2e-3, weight decay 1, dropout 0.2\n\n",
        text_table(rows, "tuned: "),
        "\n" + additive(rows, "tuned: "),
        "\n## The grid: validation NLL at the best step, seeds 100 and 101\n\n",
        table(["plain AdamW", "model", "averaged weights"], lines) if lines else "Not run yet.\n",
        "\n## Arithmetic, `a + b mod 97`\n\n",
        arithmetic_table(rows),
    ]
    for seconds in of_cost:
        plain = seconds["plain"]
        parts.append(
            f"\n## Cost\n\nA step of GPT-2's shape, 2 × 256 tokens, fp32, AdamW, one thread: {plain:.2f} s of CPU; with"
            f" the head {100 * (seconds['head'] / plain - 1):+.1f} %, with the call and update of the teacher"
            f" {100 * (seconds['teacher'] / plain - 1):+.1f} % (medians of six, in turn); what comparing"
            " all logits adds to that stands in overhead.md.\n"
        )
    OUT.write_text("".join(parts))
    print(OUT)


if __name__ == "__main__":
    which = sys.argv[1] if len(sys.argv) > 1 else ""
    if which == "report":
        report()
    elif which == "cost":
        cost()
    elif which in ("tune", "text", "fraction", "tuned", "arithmetic"):
        train(which, int(sys.argv[2]) if len(sys.argv) > 2 else 2)
    else:
        sys.exit(__doc__)
