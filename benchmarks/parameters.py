"""Does predicting itself let a model of fewer parameters be as good? `SelfModel` on MBPP's text.

    python -m benchmarks.parameters tune|run|report   (FORGE_MBPP names MBPP's file)

GPT-2 of two layers, one token a byte, widths 48 to 128, AdamW with 60 steps of warm-up and a cosine decay to 0, 600
steps of 16 × 64 tokens on 180,000 bytes of MBPP's problems and solutions; loss on 40,000 other bytes. "tune", on seeds
100 and 101: learning rates of 2e-3, 4e-3 and 8e-3 of the plain model at each width (1.6e-2 and 3.2e-2 were worse on
seed 100), then, at width 64 and its best, four heads; widths keep their plain model's rate with the head. "run": all
widths on seeds 0 to 4. Parameters are those of the model, which is what is kept; the head trains beside it. What a
head saves: the plain model's loss is drawn against the logarithm of its size, seed by seed, by straight lines between
the widths and on beyond them, and the size at which it is as good as the one with the head is read off. Rows are kept
in parameters.jsonl, and a run goes on where it was stopped.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.environment import FOLDER, QUIET, interval, keep, of_rows, stored, table
from forge_lightning.callbacks import SelfModel
from forge_lightning.data import TextData
from forge_lightning.data.records import read_jsonl
from forge_lightning.models import ForgeModule

ROWS, OUT = FOLDER / "parameters.jsonl", FOLDER / "parameters.md"
WIDTHS, SEEDS, TUNING = (48, 64, 96, 128), range(5), (100, 101)
SIZES = {"train": 180_000, "test": 40_000}
RATES = (2e-3, 4e-3, 8e-3)
HEADS = (("paper", 0.3), ("paper", 1.0), ("next_latent", 0.3), ("next_latent", 1.0))
STEPS, WARM_UP, BLOCK = 600, 60, 64


def rows() -> list[dict]:
    return stored(ROWS)


def factor(step: int) -> float:
    """Factor of the learning rate: a warm-up, and a cosine decay to nothing."""
    return min(step + 1, WARM_UP) / WARM_UP * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def measure(width: int, lr: float, head: tuple[str, float] | None, seed: int) -> None:
    """One run, unless it is there."""
    key = {"width": width, "lr": lr, "head": None if head is None else list(head), "seed": seed}
    if any(all(row[name] == value for name, value in key.items()) for row in rows()):
        return
    seed_everything(seed, verbose=False)
    records = read_jsonl(os.environ["FORGE_MBPP"], {"text": str, "code": str})
    text = "\n\n".join(f"{record['text']}\n{record['code']}".replace("\r\n", "\n") for record in records)
    with tempfile.TemporaryDirectory() as folder:
        paths, start = {}, 0
        for split, size in SIZES.items():
            paths[split] = Path(folder) / f"{split}.txt"
            paths[split].write_text(text[start : start + size])
            start += size
        assert len(text) >= start
        data = TextData(str(paths["train"]), str(paths["test"]), block_size=BLOCK, batch_size=16, seed=seed)
        shape = {"model_type": "gpt2", "n_layer": 2, "n_embd": width, "n_head": 4, "n_positions": BLOCK}
        module = ForgeModule(
            config=shape | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.1),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        )
        callbacks = [] if head is None else [SelfModel(form=head[0], weight=head[1], warmup_steps=60)]
        trainer = Trainer(
            **QUIET, max_steps=STEPS, max_epochs=-1, limit_val_batches=0, gradient_clip_val=1.0, callbacks=callbacks
        )
        start_seconds = time.process_time()
        trainer.fit(module, datamodule=data)
        seconds = time.process_time() - start_seconds
        (found,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    own = sum(p.numel() for p in module.model.parameters())
    row = key | {"parameters": own, "nll": found["val/loss"], "cpu_seconds": round(seconds, 1)}
    print(json.dumps(row), flush=True)
    keep(ROWS, row)


def nll(width: int, lr: float, head: tuple[str, float] | None, seed: int) -> float:
    kept = None if head is None else list(head)
    key = (width, lr, kept, seed)
    return next(r["nll"] for r in rows() if (r["width"], r["lr"], r["head"], r["seed"]) == key)


def best_rate(width: int) -> float:
    """Best learning rate of the plain model, by the mean over the tuning seeds."""
    return min(RATES, key=lambda lr: statistics.mean(nll(width, lr, None, seed) for seed in TUNING))


def best_head() -> tuple[str, float]:
    lr = best_rate(64)
    return min(HEADS, key=lambda head: statistics.mean(nll(64, lr, head, seed) for seed in TUNING))


def held_out(head: tuple[str, float] | None) -> dict[int, dict[int, dict]]:
    """Rows by width and seed."""
    kept = None if head is None else list(head)
    return {
        width: {
            row["seed"]: row
            for row in rows()
            if (row["width"], row["lr"], row["head"]) == (width, best_rate(width), kept) and row["seed"] in SEEDS
        }
        for width in WIDTHS
    }


def as_good_as(loss: float, sizes: list[int], losses: list[float]) -> float:
    """The size at which the plain model has that loss, on straight lines over the logarithm of the size."""
    places = [math.log(size) for size in sizes]
    inner = next((i for i in range(len(sizes) - 1) if losses[i + 1] <= loss), len(sizes) - 2)
    slope = (losses[inner + 1] - losses[inner]) / (places[inner + 1] - places[inner])
    return math.exp(places[inner] + (loss - losses[inner]) / slope)


def saved(width: int) -> list[float]:
    """Share of the parameters that the head saves at a width, of each seed, in %; below 0 where it loses."""
    plain, head = held_out(None), held_out(best_head())
    shares = []
    for seed in sorted(head[width]):
        sizes = [plain[w][seed]["parameters"] for w in WIDTHS]
        losses = [plain[w][seed]["nll"] for w in WIDTHS]
        equal = as_good_as(head[width][seed]["nll"], sizes, losses)
        shares.append(100 * (1 - head[width][seed]["parameters"] / equal))
    return shares


def report() -> None:
    head = best_head()
    lines = []
    for width in WIDTHS:
        cells = [[of[width][seed] for seed in sorted(of[width])] for of in (held_out(None), held_out(head))]
        plain, with_head = ([row["nll"] for row in cell] for cell in cells)
        difference = [b - a for a, b in zip(plain, with_head, strict=True)]
        seconds = [statistics.median(row["cpu_seconds"] for row in cell) for cell in cells]
        lines.append(
            [
                f"{width}",
                f"{cells[0][0]['parameters']:,}",
                f"{best_rate(width):g}",
                *(interval(values) for values in (plain, with_head, difference)),
                interval(saved(width), 1),
                f"{seconds[1] / seconds[0]:.2f}",
            ]
        )
    grid = [
        [
            f"{r['width']}",
            "plain" if r["head"] is None else f"{r['head'][0]}, weight {r['head'][1]:g}",
            f"{r['lr']:g}",
            f"{r['seed']}",
            f"{r['nll']:.4f}",
        ]
        for r in sorted(rows(), key=lambda r: (r["width"], str(r["head"]), r["lr"], r["seed"]))
        if r["seed"] in TUNING
    ]
    columns = [
        "width", "parameters", "lr", "plain, nats a byte", f"{head[0]}, weight {head[1]:g}", "difference",
        "parameters saved, %", "× CPU time",
    ]  # fmt: skip
    text = (
        "# Parameters that the self-model saves\n\n"
        f"{of_rows('python -m benchmarks.parameters tune, run', rows())}\n"
        f"{__doc__.split(chr(10) * 2, 2)[2]}\n## Held-out seeds\n\n{table(columns, lines)}\n"
        f"## Tuning\n\n{table(['width', 'model', 'lr', 'seed', 'nats a byte'], grid)}"
    )
    OUT.write_text(text)
    print(text)


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    torch.set_num_threads(1)
    if part == "tune":
        for seed in TUNING:
            for width in WIDTHS:
                for lr in RATES:
                    measure(width, lr, None, seed)
        for seed in TUNING:
            for head in HEADS:
                measure(64, best_rate(64), head, seed)
    elif part == "run":
        for seed in SEEDS:
            for width in WIDTHS:
                measure(width, best_rate(width), None, seed)
                measure(width, best_rate(width), best_head(), seed)
    elif part == "report":
        report()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
