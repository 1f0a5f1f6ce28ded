"""What the gradient filters cost: time a step and state, against straightforward code and the memory's bandwidth.

    python -m benchmarks.filter_cost [--repeats 15]

"Straightforward" is a loop over the parameters with out-of-place arithmetic, as the published code has. "Limit" is the
time in which the machine streams the data that the filter must touch, measured as in-place scaling of arrays of the
same total size: for the EMA, reading and writing gradient and EMA; for the projection, one more read of each. All
figures are medians of process CPU time on one thread, the variants taken in turns. "With guard" is what the callback
runs: the same filter behind a check that every gradient is finite, which reads the gradients once more.
"""

import argparse
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch

from benchmarks.environment import FOLDER, header, table
from forge_lightning.callbacks import Grokfast
from forge_lightning.data import AlgorithmicData
from forge_lightning.grokfast import functional as F
from forge_lightning.grokfast.filter import GradientFilter
from forge_lightning.models import AlgorithmicModule
from forge_lightning.models.algorithmic import Decoder

LAMB = 1e-6  # the gradients are filtered over and over here; a real λ would blow them up


def gpt2_shapes() -> list[tuple[int, ...]]:
    width = 768
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *(shape for _ in range(12) for shape in block), (width,), (width,)]


def small_shapes() -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in Decoder(99, 5).parameters()]


def medians(variants: dict[str, Callable[[], object]], repeats: int, inner: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns so that a slow phase of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.process_time()
            for _ in range(inner):
                run()
            times[name].append((time.process_time() - start) / inner * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def straightforward_ema(grads: list[torch.Tensor]) -> Callable[[], object]:
    emas = [g.clone() for g in grads]

    def step() -> None:
        for i, g in enumerate(grads):
            emas[i] = emas[i] * 0.98 + g * (1 - 0.98)
            grads[i] = g + emas[i] * LAMB

    return step


def straightforward_ma(grads: list[torch.Tensor], window: int) -> Callable[[], object]:
    windows = [deque([g.clone() for _ in range(window)], maxlen=window) for g in grads]

    def step() -> None:
        for i, g in enumerate(grads):
            windows[i].append(g)
            grads[i] = g + sum(windows[i]) / len(windows[i]) * LAMB

    return step


def straightforward_projection(grads: list[torch.Tensor]) -> Callable[[], object]:
    emas = [g.clone() for g in grads]

    def step() -> None:
        for i, g in enumerate(grads):
            emas[i] = emas[i] * 0.98 + g * (1 - 0.98)
            e = emas[i]
            grads[i] = g + LAMB * ((g * e).sum() / ((e * e).sum() + 1e-12)) * e

    return step


def ours(grads: list[torch.Tensor], **options: object) -> Callable[[], object]:
    gradient_filter = GradientFilter(lamb=LAMB, **options)  # type: ignore[arg-type]
    named = {str(i): g for i, g in enumerate(grads)}
    for _ in range(gradient_filter.window_size if gradient_filter.filter == "ma" else 1):
        gradient_filter(named)
    return lambda: gradient_filter(named)


def gradients(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes]


def measure(shapes: list[tuple[int, ...]], repeats: int, inner: int, windows: list[int]) -> list[list[str]]:
    count = sum(math.prod(shape) for shape in shapes)
    streams = torch.randn(2, count)
    emas = gradients(shapes)
    bare = gradients(shapes)
    variants: dict[str, Callable[[], object]] = {
        "limit": lambda: streams.mul_(1.0001),
        "ema straightforward": straightforward_ema(gradients(shapes)),
        "ema": lambda: F.ema_filter_(bare, emas, alpha=0.98, lamb=LAMB),
        "ema with guard": ours(gradients(shapes), filter="ema"),
        "projection straightforward": straightforward_projection(gradients(shapes)),
        "projection": lambda: F.project_(bare, emas, *F.ema_products_(bare, emas, alpha=0.98), lamb=LAMB),
        "projection with guard": ours(gradients(shapes), filter="projection"),
    }
    result = medians(variants, repeats, inner)
    for window in windows:
        pair = {
            "straightforward": straightforward_ma(gradients(shapes), window),
            "with guard": ours(gradients(shapes), filter="ma", window_size=window),
        }
        result |= {f"ma {window} {name}": value for name, value in medians(pair, repeats, inner).items()}
    limits = {"ema": result["limit"], "projection": 1.5 * result["limit"]}
    rows = []
    for name, value in result.items():
        kind = name.split()[0]
        if name == "limit":
            continue
        naive = result[" ".join(name.split()[: 2 if kind == "ma" else 1]) + " straightforward"]
        state = {"ma": int(name.split()[1]) + 1 if kind == "ma" else 0}.get(kind, 1) * count * 4
        rows.append(
            [
                f"{count / 1e6:.2f} M",
                name.replace("ma ", "MA, window ", 1) if kind == "ma" else name.replace("ema", "EMA", 1),
                f"{value:.3g}",
                f"{naive / value:.1f}",
                f"{value / limits[kind]:.2f}" if kind in limits and count > 1e7 else "–",
                f"{state / 2**20:,.1f}",
            ]
        )
    rows.append([f"{count / 1e6:.2f} M", "limit of the EMA's four streams", f"{result['limit']:.3g}", "–", "1", "–"])
    return rows


class _Timed(pl.Callback):
    def on_train_batch_start(self, *args: object) -> None:
        self.start = time.process_time()

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.steps.append((time.process_time() - self.start) * 1e3)


def callback_cost(steps: int) -> list[list[str]]:
    """Median step of a Lightning fit of the paper's model, with and without the callback, in alternating fits."""
    made: dict[str, Callable[[], list[pl.Callback]]] = {
        "no callback": list,
        "Grokfast(filter='ema')": lambda: [Grokfast(schedule="constant")],
        "Grokfast(filter='ma', window_size=100)": lambda: [Grokfast(filter="ma", schedule="constant")],
        "Grokfast(filter='projection')": lambda: [Grokfast(filter="projection", schedule="constant")],
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(5):
        for name, build in made.items():
            pl.seed_everything(0, verbose=False)
            timed = _Timed()
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=steps,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*build(), timed],
            )
            trainer.fit(AlgorithmicModule(), AlgorithmicData())
            times[name] += timed.steps[5:]
    base = statistics.median(times["no callback"])
    return [
        [name, f"{(value := statistics.median(found)):.2f}", f"{100 * (value / base - 1):+.1f} %"]
        for name, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=FOLDER / "filter_cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(small_shapes(), args.repeats, 20, [10, 100, 400])
    rows += measure(gpt2_shapes(), args.repeats, 1, [8])
    columns = ["parameters", "filter", "ms a step", "× faster than straightforward", "× the limit", "state, MiB"]
    text = (
        f"# What the gradient filters cost\n\n{header('python -m benchmarks.filter_cost')}\n"
        f"{__doc__.split(chr(10) * 2, 2)[2]}\n{table(columns, rows)}\n"
        "## The callback in a Lightning fit of the paper's model\n\n"
        "Median CPU time of a training step (0.42 M parameters, batch 512), five alternating fits of 60 steps each.\n\n"
        f"{table(['callbacks', 'ms a step', 'against none'], callback_cost(60))}"
    )
    print(text)
    args.output.write_text(text)


if __name__ == "__main__":
    main()
