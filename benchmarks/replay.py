"""What replay brings, and costs: `ReplayBuffer`, `DreamReplay`, `DreamAugmenter`.

    python -m benchmarks.replay digits|tune|study|buffer|augment|cost|report   (FORGE_MBPP, FORGE_HUMANEVAL name files)

Digits: scikit-learn's handwritten digits, five tasks of two classes one after the other, an MLP with two layers of 256,
Adam, buffer of 200 rows, 16 fresh and 16 replayed rows a step. Study: a GPT-2 of two layers and 64 units, 32 rows and
1,200 optimizer steps whatever the method: replayed rows take the place of a quarter of the fresh ones, and sleeps that
of a quarter of the steps. "sequence": additions, then expressions; forgetting is what is lost of the first. "hard":
additions of 12 levels all along, and success on the hardest four. The baseline's learning rate is chosen on seeds 100
and 101, and the methods keep it. Rows are kept in replay.jsonl, and a run goes on where it was stopped.
"""

import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import mean, median

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.environment import FOLDER, QUIET, interval, keep, of_rows, stored, table
from forge_lightning.callbacks import BatchFields, DreamReplay, Mix, Sleep, Storage
from forge_lightning.components import DreamAugmenter, ReplayBuffer
from forge_lightning.data.code_tasks import humaneval_problem, mbpp_problem
from forge_lightning.data.generated_tasks import GeneratedDataset
from forge_lightning.data.records import read_jsonl
from forge_lightning.data.tokens import build_tokenizer
from forge_lightning.dream.buffer import STRATEGIES
from forge_lightning.dream.code_augmentation import AUGMENTATIONS, CodeExample
from forge_lightning.dream.memory import ReplayMemory
from forge_lightning.models import ForgeModule
from forge_lightning.sandbox import Sandbox, Task

ROWS, OUT = FOLDER / "replay.jsonl", FOLDER / "replay.md"
TUNING, SEEDS = (100, 101), range(6)

# Digits.

DIGITS = {
    "no replay": None,
    "first in, first out": {},
    "near the threshold only": {"buffer": Storage(200, frontier=0.99), "strategy": "near_threshold"},
    "reservoir": {},
    "reservoir by class": {"fields": BatchFields(family=1)},
    "reservoir, logits kept, weight 0.5": {"distillation": 0.5},
    "reservoir, logits kept, weight 1": {"distillation": 1.0},
    "reservoir by class, logits kept, weight 1": {"distillation": 1.0, "fields": BatchFields(family=1)},
    "priority, logits kept, weight 1": {"distillation": 1.0, "strategy": "priority"},
}


class Latest(ReplayBuffer):
    """First in, first out."""

    def _clear(self, frontier):
        super()._clear(frontier)
        self._members.reservoir.make_room = self._make_room

    def _make_room(self, family, chance, place, length, rng, evict):
        if self._members.reservoir.num_held == self._members.reservoir.limit:
            evict(min(self._members.reservoir.held[family], key=lambda slot: self._scores.arrays["step"][slot]))
        return True


class LatestMemory(ReplayMemory):
    def clear(self, rank=0):
        super().clear(rank)
        self.buffer.__class__ = Latest
        self.buffer._clear(0.0)


class Digits(LightningModule):
    """Five tasks in a row."""

    def __init__(self, x, y, seed):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        generator = torch.Generator().manual_seed(seed)
        order = []
        for task in range(5):
            own = torch.nonzero(y // 2 == task).flatten()
            order += [own[torch.randperm(len(own), generator=generator)] for _ in range(20)]
        self.data = TensorDataset(x[torch.cat(order)], y[torch.cat(order)])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=16)


def digits(variant, seed):
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(x) * 3 // 4], order[len(x) * 3 // 4 :]
    seed_everything(seed, verbose=False)
    module = Digits(x[train], y[train], seed)
    options = DIGITS[variant]
    callbacks = []
    if options is not None:
        fields, buffer = BatchFields(family=None), Storage(200, frontier=0.0)
        defaults = {"schedule": Mix(0.5), "buffer": buffer, "fields": fields, "probe_size": 0, "seed": seed}
        replay = DreamReplay(**defaults | options)
        if variant == "first in, first out":
            replay.memory = LatestMemory(buffer, fields, "uniform", probe_size=0, program_fraction=0.0, seed=seed)
        callbacks = [replay]
    Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(module)
    with torch.no_grad():
        right = (module.net(x[test]).argmax(1) == y[test]).float()
    return {"part": "digits", "variant": variant, "seed": seed, "accuracy": float(right.mean())} | {
        "old": float(right[y[test] < 8].mean())
    }


# Study.

STEPS, BATCH, EVERY, SLEEP = 1200, 32, 30, 10
RATES = (1e-3, 2e-3, 4e-3)
STREAMS = {
    "sequence": {"families": ("addition", "expression"), "levels": range(1, 5)},
    "hard": {"families": ("addition",), "levels": range(1, 13)},
}
MIX, SLEEPS = {"schedule": Mix(0.25)}, {"schedule": Sleep(EVERY, SLEEP)}
NO_FRONTIER = {"buffer": Storage(frontier=0.0)}
METHODS = {
    "no replay": None,
    "uniform": MIX | NO_FRONTIER,
    "near threshold": MIX | {"strategy": "near_threshold"},
    "priority": MIX | {"strategy": "priority"},
    "uniform, logits kept": MIX | NO_FRONTIER | {"distillation": 0.5},
    "sleeps, uniform": SLEEPS | NO_FRONTIER,
    "sleeps, near threshold": SLEEPS | {"strategy": "near_threshold"},
    "sleeps, priority": SLEEPS | {"strategy": "priority"},
}


class Stream(torch.utils.data.Dataset):
    """Examples in their order, each once."""

    def __init__(self, data, keys):
        self.data, self.keys = data, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return self.data[self.keys[index]]


def keys_of(data, stream, count, seed, held_out=False):
    """``count`` examples; of "sequence" first those of one family, then of the other."""
    rng = random.Random(f"{seed}/{held_out}")
    first = [arm for arm, (family, _, _) in enumerate(data.arms) if family == "addition"]
    second = [arm for arm in range(len(data.arms)) if arm not in first] or first
    arms = [rng.choice(first if i < count // 2 else second) for i in range(count)]
    return [(-1 - i if held_out else i, arm) for i, arm in enumerate(arms)]


def study(stream, method, lr, seed):
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    options, tokenizer = METHODS[method], build_tokenizer("bytes")
    settings = STREAMS[stream]
    data = GeneratedDataset(settings["families"], settings["levels"], [1], tokenizer, seed)
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    optimizer = lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)  # noqa: E731
    module = ForgeModule(config=config, optimizer=optimizer)
    module.build(tokenizer)
    schedule = None if options is None else options["schedule"]
    mixing, sleeping = isinstance(schedule, Mix), isinstance(schedule, Sleep)
    size = BATCH * 3 // 4 if mixing else BATCH
    steps = STEPS * EVERY // (EVERY + SLEEP) if sleeping else STEPS
    keys = keys_of(data, stream, steps * size, seed)
    loader = DataLoader(Stream(data, keys), batch_size=size, collate_fn=data.collate)
    callbacks = [] if options is None else [DreamReplay(**options, probe_size=0, seed=seed)]
    start = time.process_time()
    Trainer(max_epochs=1, gradient_clip_val=1.0, callbacks=callbacks, **QUIET).fit(module, loader)
    spent = time.process_time() - start
    found = {"part": "study", "stream": stream, "method": method, "lr": lr, "seed": seed, "cpu_seconds": spent}
    module.eval()
    success = torch.zeros(len(data.arms))
    for arm in range(len(data.arms)):
        batch = data.collate([data[(-1 - i, arm)] for i in range(200)])
        with torch.no_grad():
            success[arm] = module._step(batch)[0]["example_success"].mean()
    return found | {"success": success.tolist(), "families": [family for family, _, _ in data.arms]}


def first_of(row):
    """Success on the first task of "sequence", or on the four hardest levels of "hard"."""
    if row["stream"] == "hard":
        return mean(row["success"][-4:])
    return mean(s for s, family in zip(row["success"], row["families"], strict=True) if family == "addition")


def rest_of(row):
    if row["stream"] == "hard":
        return mean(row["success"][:-4])
    return mean(s for s, family in zip(row["success"], row["families"], strict=True) if family != "addition")


# Buffer and augmentation.


def buffer(seed):
    """Milliseconds of CPU time, of 32 sequences of up to 256 tokens at a time, once 10,000 rows are stored."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)

    def batch(number):
        ids = torch.randint(3, 300, (32, 256), generator=generator)
        real = torch.arange(256) < torch.randint(50, 257, (32, 1), generator=generator)
        loss = 3 * torch.rand(32, generator=generator)
        rows = {"input_ids": ids * real, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}
        return rows, loss, (loss < 1.5).float(), torch.arange(number * 32, number * 32 + 32)

    store, batches = ReplayBuffer(10_000), [batch(number) for number in range(800)]
    times = {"push while it fills": [], "push when it is full": []}
    for number, arguments in enumerate(batches):
        start = time.process_time()
        store.push(*arguments)
        times["push while it fills" if number < 300 else "push when it is full"].append(
            (time.process_time() - start) / 32
        )
    for strategy in STRATEGIES:
        times[f"draw of 32, {strategy}"] = []
        for _ in range(300):
            start = time.process_time()
            store.sample(32, strategy)
            times[f"draw of 32, {strategy}"].append(time.process_time() - start)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        torch.save(store.state_dict(), f"{folder}/buffer.pt")
        other = ReplayBuffer(10_000)
        other.load_state_dict(torch.load(f"{folder}/buffer.pt", weights_only=True))
        times["save and load"] = [time.process_time() - start]
    for strategy in STRATEGIES:
        one, two = store.sample(32, strategy), other.sample(32, strategy)
        assert one.slots == two.slots
        assert all(torch.equal(one.rows[name], two.rows[name]) for name in one.rows)
    means = {name: 1000 * (mean(each) if name.startswith("push") else median(each)) for name, each in times.items()}
    return {"part": "buffer", "seed": seed, "ms": means, "megabytes": store.num_bytes / 1e6, "rows": len(store)}


def augment(kind, seed):
    mbpp = [mbpp_problem(record) for record in read_jsonl(os.environ["FORGE_MBPP"], {})]
    humaneval = [humaneval_problem(record) for record in read_jsonl(os.environ["FORGE_HUMANEVAL"], {})]
    examples = [CodeExample.of(problem) for problem in mbpp + humaneval]
    augmenter = DreamAugmenter([kind])
    start = time.monotonic()
    with Sandbox(timeout_seconds=3.0) as box:

        def run(chosen):
            return box.run_many([Task(e.program, e.tests, e.entry_point, e.setup) for e in chosen])

        found = augmenter.augment(examples, run, seed)
        again = run([variants[0].example for variants in found if variants])
    return {
        "part": "augment", "kind": kind, "seed": seed, "problems": len(examples), "tried": augmenter.tried.get(kind, 0),
        "kept": augmenter.kept.get(kind, 0), "pass_again": sum(verdict.passed for verdict in again),
        "seconds": time.monotonic() - start,
    }  # fmt: skip


def cost(seed):
    """CPU time of a step with a quarter of the batch replayed, over that of a plain step of as many rows."""
    torch.set_num_threads(1)

    class Steps:
        def __init__(self, mixed):
            tokenizer = build_tokenizer("bytes")
            config = {"model_type": "gpt2", "n_layer": 4, "n_embd": 192, "n_head": 4, "n_positions": 256}
            self.module = ForgeModule(config=config)
            self.module.build(tokenizer)
            self.mixed, self.times = mixed, []

        def run(self, steps):
            rows = {"input_ids": torch.randint(3, 300, (steps * 8, 128)), "sample_id": torch.arange(steps * 8)}
            rows["attention_mask"], rows["labels"] = torch.ones_like(rows["input_ids"]), rows["input_ids"].clone()
            size = 6 if self.mixed else 8
            data = [{name: t[i * size : i * size + size] for name, t in rows.items()} for i in range(steps)]
            callbacks = [DreamReplay(schedule=Mix(0.25), probe_size=0)] if self.mixed else []
            start = time.process_time()
            Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(self.module, DataLoader(data, batch_size=None))
            self.times.append((time.process_time() - start) / steps)

    plain, mixed = Steps(False), Steps(True)
    for _ in range(12):
        for one in (plain, mixed):
            one.run(20)
    ratios = [b / a for a, b in zip(plain.times[2:], mixed.times[2:], strict=True)]
    return {"part": "cost", "seed": seed, "plain_ms": 1000 * median(plain.times[2:]), "ratio": median(ratios)}


# Running and reporting.


def rows(part):
    return [row for row in stored(ROWS) if row["part"] == part]


def run_all(part, function, wanted, keys):
    done = {tuple(row[key] for key in keys) for row in rows(part)}
    missing = [arguments for arguments in wanted if arguments not in done]
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(function, *zip(*missing, strict=True)) if missing else ():
            keep(ROWS, row)
            print({key: value for key, value in row.items() if key not in ("success", "families", "ms")}, flush=True)


STUDY_KEYS = ("stream", "method", "lr", "seed")


def best_rate(stream):
    plain = [row for row in rows("study") if row["stream"] == stream and row["seed"] in TUNING]
    return max(RATES, key=lambda lr: mean(mean(row["success"]) for row in plain if row["lr"] == lr))


def shown(values, scale=100):
    return interval([scale * value for value in values], 1)


def report():
    head = of_rows("python -m benchmarks.replay digits|tune|study|buffer|augment|cost|report", stored(ROWS))
    parts = [
        f"# Replay\n\n{head}\n"
        "The study was trained before the last changes to `ReplayBuffer` and `DreamReplay`. Digits were then trained"
        " anew, and moved within their intervals.\n"
    ]
    found = rows("digits")
    lines = []
    for variant in DIGITS:
        each = [row for row in found if row["variant"] == variant]
        if each:
            lines.append([variant, str(len(each)), *(shown([row[key] for row in each]) for key in ("accuracy", "old"))])
    parts.append(
        "## One task after the other: handwritten digits\n\nFinal accuracy in %, mean ± half of a 95 % interval over"
        " seeds; buffer 200, equal numbers of replayed rows.\n\n"
        + table(["stored and drawn", "seeds", "all ten", "the first eight"], lines)
    )
    for stream, names in (("sequence", ("first task", "second task")), ("hard", ("4 hardest levels", "the others"))):
        each = [row for row in rows("study") if row["stream"] == stream and row["seed"] in SEEDS]
        if not each:
            continue
        plain = {row["seed"]: row for row in each if row["method"] == "no replay"}
        lines = []
        for method in METHODS:
            own = [row for row in each if row["method"] == method]
            if not own:
                continue
            gains = [first_of(row) - first_of(plain[row["seed"]]) for row in own if row["seed"] in plain]
            gain = "" if method == "no replay" else shown(gains)
            seconds = f"{mean(row['cpu_seconds'] for row in own):.0f}"
            lines.append([method, shown(map(first_of, own)), gain, shown(map(rest_of, own)), seconds])
        parts.append(
            f"## {'Forgetting' if stream == 'sequence' else 'Hard examples'}\n\n{len(plain)} seeds, AdamW at"
            f" {each[0]['lr']:g} as tuned for no replay; exact match in %, mean ± half of a 95 % interval; gains paired"
            " by seed.\n\n" + table(["method", names[0], "against no replay", names[1], "CPU s"], lines)
        )
    for row in rows("buffer")[-1:]:
        lines = [[name, f"{value:.3f}"] for name, value in row["ms"].items()]
        parts.append(
            f"## The buffer\n\n{row['rows']:,} rows, {row['megabytes']:.0f} MB. Milliseconds of CPU time; a push per"
            " row, mean; draws median. The restored buffer draws the same rows.\n\n" + table(["what", "ms"], lines)
        )
    found = rows("augment")
    if found:
        lines = [
            [
                row["kind"],
                f"{row['tried']} of {row['problems']}",
                f"{row['kept']} ({100 * row['kept'] / max(1, row['tried']):.1f} %)",
                f"{row['pass_again']}",
                f"{row['seconds']:.0f}",
            ]
            for row in found
        ]
        parts.append(
            "## Variants of MBPP's 974 and HumanEval's 164 problems\n\nOne for each problem where the kind applies;"
            " what holds was run once more. HumanEval here only to measure with.\n\n"
            + table(["kind", "applies to", "holds", "passes again", "seconds"], lines)
        )
    for row in rows("cost")[-1:]:
        parts.append(
            f"## Cost of mixing\n\nA step of 6 fresh and 2 replayed rows of 128 tokens (GPT-2, 4 layers, 192 units)"
            f" takes {row['ratio']:.3f} of the CPU time of a plain step of 8 ({row['plain_ms']:.0f} ms), median of ten"
            " runs of 20 steps in turn.\n"
        )
    OUT.write_text("\n".join(parts))
    print(OUT.read_text())


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "report"
    if command == "digits":
        run_all("digits", digits, [(v, s) for v in DIGITS for s in SEEDS], ("variant", "seed"))
    elif command == "tune":
        wanted = [(stream, "no replay", lr, seed) for stream in STREAMS for lr in RATES for seed in TUNING]
        run_all("study", study, wanted, STUDY_KEYS)
    elif command == "study":
        wanted = [(s, m, best_rate(s), seed) for seed in SEEDS for s in STREAMS for m in METHODS]
        run_all("study", study, wanted, STUDY_KEYS)
    elif command == "augment":
        for kind in AUGMENTATIONS:
            if not any(row["kind"] == kind for row in rows("augment")):
                keep(ROWS, augment(kind, 0))
    elif command in ("buffer", "cost"):
        keep(ROWS, {"buffer": buffer, "cost": cost}[command](0))
    report()
