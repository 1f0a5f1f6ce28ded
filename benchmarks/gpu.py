"""What everything costs on a GPU: waits, filters, optimizers, and a step with each callback.

    python -m benchmarks.gpu [--only waits filters optimizers steps compiled large] [--tiny] [--output FILE]

GPT-2 small with random weights and tokens, 16 × 1,024, bf16-mixed, fused AdamW, logging every 10 steps to a CSV file.
Waits: what `torch.cuda.set_sync_debug_mode` sees in a step that does not log, by the line that waits. Filters: time of
one call alone, against the time in which the card copies as much memory as an EMA has to read and write (gradient and
EMA). Steps: wall-clock time of a step, over 20 steps between two synchronisations; each beside a plain run before it,
medians of three pairs. Replay is compared with plain steps of as many rows. Compiled: the same with
``ForgeModule(compile=True)``. Large: a Llama of 1.1 B parameters, 4 × 1,024. ``--tiny`` tries the script itself, on any
machine, with a model of no size: its figures mean nothing.
"""

import argparse
import gc
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.environment import FOLDER, QUIET, header, table
from benchmarks.filter_cost import gpt2_shapes, gradients
from forge_lightning import callbacks as forge
from forge_lightning.data import DifficultySampler
from forge_lightning.grokfast.filter import GradientFilter
from forge_lightning.models import ForgeModule
from forge_lightning.optim import GrokfastAdamW, MuonAdamW

GPU = torch.cuda.is_available()


class Size(NamedTuple):
    """A model, its batch, and how long it is measured."""

    model: dict[str, Any]
    batch: int
    tokens: int
    first: int
    steps: int
    pairs: int
    shapes: list[tuple[int, ...]]


SMALL = Size({"model_type": "gpt2", "vocab_size": 50257}, 16, 1024, 10, 20, 3, gpt2_shapes())
LARGE = SMALL._replace(
    model={
        "model_type": "llama", "vocab_size": 32000, "num_hidden_layers": 24, "hidden_size": 2048,
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    batch=4, first=5, steps=10, pairs=1,
)  # fmt: skip
TINY = Size(
    {"model_type": "gpt2", "vocab_size": 256, "n_layer": 2, "n_embd": 32, "n_head": 2},
    4,
    32,
    4,
    6,
    1,
    [(256, 32), (32,)],
)


def cheap() -> list[Callback]:
    return [
        forge.EdgeController(signal="loss", loss_threshold=5.0, policy="bandit"),
        forge.StageClassifier(),
        forge.Grokfast(schedule="constant"),
        forge.InterruptCheckpoint(),
        forge.Telemetry(),
        forge.GeometryProbe(layers="all", every_n_steps=50),
    ]


def replay(**options: Any) -> list[Callback]:
    return [forge.DreamReplay(schedule=forge.Mix(fraction=0.25), probe_size=0, **options)]


BUILD: dict[str, Callable[[], list[Callback]]] = {
    "Grokfast": lambda: [forge.Grokfast(schedule="constant")],
    "Grokfast(compile=True)": lambda: [forge.Grokfast(compile=True, schedule="constant")],
    "Grokfast(filter='projection')": lambda: [forge.Grokfast(filter="projection", schedule="constant")],
    "Telemetry": lambda: [forge.Telemetry()],
    "EdgeController": lambda: cheap()[:1],
    "GeometryProbe, all layers, every 50": lambda: cheap()[-1:],
    "SelfModel": lambda: [forge.SelfModel()],
    "SelfModel(adaptive=True)": lambda: [forge.SelfModel(adaptive=True)],
    "TemperatureCurriculum": lambda: [forge.TemperatureCurriculum()],
    "TemperatureCurriculum(fraction=0.25)": lambda: [forge.TemperatureCurriculum(fraction=0.25)],
    "DreamReplay": replay,
    "DreamReplay(distillation=0.5)": lambda: replay(distillation=0.5),
    "edge, stages, filter, interrupt, telemetry, probe": cheap,
    "everything, curriculum at a quarter": lambda: [
        *cheap(), forge.SelfModel(), forge.TemperatureCurriculum(fraction=0.25), *replay(),
    ],
}  # fmt: skip


class Times(Callback):
    """Wall-clock time between two steps, with the device idle at both."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.marks: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx in (self.first, self.last):
            finish()
            self.marks[batch_idx] = time.perf_counter()
            if GPU and batch_idx == self.first:
                torch.cuda.reset_peak_memory_stats()

    @property
    def milliseconds(self) -> float:
        return 1e3 * (self.marks[self.last] - self.marks[self.first]) / (self.last - self.first)


class Waits(Callback):
    """Asks the driver for synchronisations, in some steps, from the forward pass to the end of the hooks."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if GPU and batch_idx in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == self.first else "default")


def finish() -> None:
    if GPU:
        torch.cuda.synchronize()


def fit(
    size: Size,
    callbacks: Sequence[Callback],
    rows: int,
    compiled: bool = False,
    watch: Callback | None = None,
    log_every: int = 10,
) -> tuple[float, float]:
    """Milliseconds of a step, and the peak of memory in GiB (NaN without a GPU)."""
    seed_everything(0, verbose=False)
    gc.collect()
    config = size.model | ({"n_positions": size.tokens} if size.model["model_type"] == "gpt2" else {})
    module = ForgeModule(
        config=config, compile=compiled, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True)
    )
    last = size.first + size.steps
    ids = torch.randint(0, config["vocab_size"], (64, size.tokens), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    sampler = DifficultySampler(data, torch.linspace(0, 1, 64), batch_size=rows, num_samples=rows * (last + 2))
    times = Times(size.first, last)
    with tempfile.TemporaryDirectory() as folder:
        options = QUIET | {"accelerator": "gpu" if GPU else "cpu", "devices": 1, "logger": CSVLogger(folder)}
        trainer = Trainer(
            **options,
            precision="bf16-mixed",
            max_steps=last + 1,
            max_epochs=-1,
            limit_val_batches=0,
            log_every_n_steps=log_every,
            callbacks=[*([watch] if watch else []), times, *callbacks],
        )
        trainer.fit(module, DataLoader(data, batch_size=rows, sampler=sampler, pin_memory=GPU))
    return times.milliseconds, torch.cuda.max_memory_allocated() / 2**30 if GPU else float("nan")


def waits(size: Size) -> str:
    if not GPU:
        return "No GPU, no driver to ask.\n"
    lines = []
    for name, build in {"none": list, **BUILD}.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fit(size, build(), size.batch, watch=Waits(size.first, size.first + 10), log_every=1000)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchroniz" in str(w.message)]
        places = Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in found)
        where = ", ".join(f"{place} ({count / 10:g})" for place, count in places.most_common(6))
        lines.append([f"`{name}`", f"{len(found) / 10:g}", where])
    return table(["callback", "waits a step", "where"], lines)


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        call()
    finish()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return 1e3 * (time.perf_counter() - start) / repeats


def filters(size: Size) -> str:
    device = "cuda" if GPU else "cpu"
    count = sum(torch.Size(shape).numel() for shape in size.shapes)
    source, target = torch.empty(2, count, device=device)
    copy = milliseconds(lambda: target.copy_(source))  # reads and writes once; the EMA does so with two
    named = {str(i): grad.to(device) for i, grad in enumerate(gradients(size.shapes))}
    lines = [["copying as much", f"{2 * copy:.2f}", "1"]]
    for options in (
        {},
        {"filter": "projection"},
        {"filter": "ma", "window_size": 10},
        {"schedule": "cosine_similarity"},
    ):
        for compiled in (False, True):
            gradient_filter = GradientFilter(**options, lamb=1e-6, compile=compiled)  # type: ignore[arg-type]
            took = milliseconds(lambda f=gradient_filter: f(named))  # type: ignore[misc]
            name = ", ".join(map(str, options.values())) or "ema"
            lines.append([f"{name}{', compiled' if compiled else ''}", f"{took:.2f}", f"{took / (2 * copy):.2f}"])
    return table(["filter", "ms", "× copying as much"], lines)


def optimizers(size: Size) -> str:
    device = "cuda" if GPU else "cpu"
    params = [nn.Parameter(1e-2 * torch.randn(shape, device=device)) for shape in size.shapes]
    for param, grad in zip(params, gradients(size.shapes), strict=True):
        param.grad = grad.to(device)
    made = {
        "AdamW(fused=True)": lambda: torch.optim.AdamW(params, lr=1e-6, fused=True),
        "AdamW(foreach=True)": lambda: torch.optim.AdamW(params, lr=1e-6, foreach=True),
        "GrokfastAdamW(fused=True)": lambda: GrokfastAdamW(params, lr=1e-6, lamb=1e-6, fused=True, schedule="constant"),
        "GrokfastAdamW(fused=True, compile=True)": lambda: GrokfastAdamW(
            params, lr=1e-6, lamb=1e-6, fused=True, compile=True, schedule="constant"
        ),
        "MuonAdamW": lambda: MuonAdamW(params, lr=1e-6),
    }
    lines = [[f"`{name}`", f"{milliseconds(build().step, 20):.2f}"] for name, build in made.items()]
    matrices = [param for param in params if param.ndim == 2]
    lines.append(["`torch.optim.Muon`, matrices alone", f"{milliseconds(torch.optim.Muon(matrices).step, 10):.2f}"])
    return table(["optimizer", "ms a step"], lines)


def steps(size: Size, names: Sequence[str] = tuple(BUILD), compiled: bool = False) -> str:
    lines = []
    fit(size, [], size.batch, compiled)
    for name in names:
        replays = any(isinstance(callback, forge.DreamReplay) for callback in BUILD[name]())
        rows = size.batch * 3 // 4 if replays else size.batch  # a quarter is added
        pairs = []
        try:
            for _ in range(size.pairs):
                pairs.append((fit(size, [], size.batch, compiled), fit(size, BUILD[name](), rows, compiled)))
        except Exception as error:  # the other figures are worth having
            lines.append([f"`{name}`", f"failed: {type(error).__name__}", "", ""])
            traceback.print_exc()
            continue
        plain, took = (median(pair[i][0] for pair in pairs) for i in (0, 1))
        ratio = median(own[0] / other[0] for other, own in pairs)
        peaks = f"{pairs[-1][1][1]:.1f} ({pairs[-1][0][1]:.1f})"
        lines.append([f"`{name}`", f"{took:.1f} ({plain:.1f})", f"{ratio:.3f}", peaks])
        print(lines[-1], flush=True)
    return table(["callback", "ms a step (plain)", "of plain", "peak memory, GiB (plain)"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    few = ["Grokfast", "SelfModel", "TemperatureCurriculum(fraction=0.25)", "DreamReplay"]
    both = "edge, stages, filter, interrupt, telemetry, probe"
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER / "gpu.md")
    parts: dict[str, Callable[[Size], str]] = {
        "waits": waits,
        "filters": filters,
        "optimizers": optimizers,
        "steps": steps,
        "compiled": lambda size: steps(size, [*few, both], compiled=True),
        "large": lambda size: steps(size if size is TINY else LARGE, ["Grokfast", both]),
    }
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts))
    args = parser.parse_args()
    if not (GPU or args.tiny):
        sys.exit("benchmarks.gpu: there is no GPU here. `--tiny` tries the script without one.")
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name() if GPU else "no GPU: a trial of the script, whose figures mean nothing"
    text = f"# What everything costs on a GPU\n\n{header('python -m benchmarks.gpu')}Card: {card}\n\n"
    text += __doc__.split("\n\n", 2)[2]
    for name in args.only:
        start = time.perf_counter()
        try:
            found = parts[name](TINY if args.tiny else SMALL)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            found = f"Failed: {type(error).__name__}: {error}\n"
        text += f"\n## {name.capitalize()}\n\n{found}"
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
