"""What callbacks keep and send, per parameter and process: counted at small scale, written out for large models.

    python -m benchmarks.scale

Counted: bytes of all tensors that are alive after the third step of a fit, with the callback less without it, on one of
two processes under DDP and under FSDP2; and the bytes that collectives of the fourth step are called with, again less
those without it. The model is a GPT-2 of eight layers and 64 units, the optimizer AdamW, everything fp32. Beside it
what the formula says. The formulas then give the sizes for models of 1.5, 7 and 70 billion parameters; those are
arithmetic, nothing of that size was run.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from benchmarks.environment import FOLDER, QUIET, header, table
from forge_lightning import callbacks as forge
from forge_lightning.models import ForgeModule

FOUND, OUT = FOLDER / "scale.json", FOLDER / "scale.md"
TARGETS, HIDDEN = 4, 256  # of the self-model's default
WORLD = 2


class Shape(NamedTuple):
    """A model, as far as the formulas need it."""

    parameters: int
    width: int


LARGE = {"1.5 B": Shape(1_558_000_000, 1600), "7 B": Shape(6_738_000_000, 4096), "70 B": Shape(70_554_000_000, 8192)}


def head(shape: Shape) -> int:
    """Parameters of the self-model's head."""
    width, hidden = shape.width, min(shape.width, HIDDEN)
    return 2 * width + hidden * (width + 1) + TARGETS * width * (hidden + 1)


class Part(NamedTuple):
    """A callback, and how many bytes it keeps of a model that is not sharded."""

    build: Callable[[], Callback]
    keeps: Callable[[Shape], int]
    says: str
    sends: str


PARTS = {
    "Grokfast(filter='ema')": Part(forge.Grokfast, lambda s: 4 * s.parameters, "4 bytes a parameter", "numbers"),
    "Grokfast(filter='projection')": Part(
        lambda: forge.Grokfast(filter="projection", schedule="constant"),
        lambda s: 4 * s.parameters,
        "4 bytes a parameter",
        "numbers",
    ),
    "Grokfast(filter='ma', window_size=2)": Part(
        lambda: forge.Grokfast(filter="ma", window_size=2, schedule="constant"),
        lambda s: 4 * (2 + 1) * s.parameters,
        "4 × (window_size + 1) bytes a parameter",
        "numbers",
    ),
    "Grokfast(filter='ma', window_size=2, ring_dtype='bfloat16')": Part(
        lambda: forge.Grokfast(filter="ma", window_size=2, ring_dtype="bfloat16", schedule="constant"),
        lambda s: (2 * 2 + 4) * s.parameters,
        "2 × window_size + 4 bytes a parameter",
        "numbers",
    ),
    "TemperatureCurriculum": Part(
        lambda: forge.TemperatureCurriculum(warmup_steps=0),
        lambda s: 4 * s.parameters,
        "4 bytes a trainable parameter",
        "FSDP2: the weights, gathered once more each step",
    ),
    "SelfModel": Part(
        lambda: forge.SelfModel(warmup_steps=0),
        lambda s: 16 * head(s),
        "16 bytes a parameter of the head (its gradient and AdamW's state with it)",
        "the head's gradients, and under FSDP2 its weights",
    ),
}


def live_storages() -> dict[int, int]:
    """Bytes of the memory of all tensors on this rank, by address; of sharded tensors, only the local part."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = {}
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):  # not DTensor, and what a compiler makes up
                storage = found.untyped_storage()
                if storage.data_ptr():  # a tensor without memory of its own has none
                    storages[storage.data_ptr()] = storage.nbytes()
    return storages


def live_bytes() -> int:
    """Bytes of all tensors on this rank."""
    return sum(live_storages().values())


class Collectives(TorchDispatchMode):
    """Bytes that collectives are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1].strip("_")
            if name.startswith(("wait_", "wrap_")):  # of a collective that is counted
                return func(*args, **(kwargs or {}))
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.bytes[name] = self.bytes.get(name, 0) + max((t.nbytes for t in given), default=0)
        return func(*args, **(kwargs or {}))


class Counts(Callback):
    """Reads at the third step what is kept, and at the fourth what is sent."""

    def __init__(self) -> None:
        self.kept, self.sent, self._mode = 0, {}, None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self.kept = live_bytes()
            self._mode = Collectives()
            self._mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.sent = self._mode.bytes
            self._mode = None


def fit(kind: str, build: Callable[[], Callback] | None) -> tuple[int, dict[str, int], Shape]:
    seed_everything(0, verbose=False)
    shape = {"model_type": "gpt2", "n_layer": 8, "n_embd": 64, "n_head": 4, "n_positions": 16, "vocab_size": 256}
    module = ForgeModule(config=shape, optimizer=lambda params: torch.optim.AdamW(params, foreach=False))
    ids = torch.randint(0, 256, (64, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    strategy = (
        DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
        if kind == "ddp"
        else ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo")
    )
    counts = Counts()
    trainer = Trainer(
        **QUIET,
        strategy=strategy,
        devices=WORLD,
        max_steps=4,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[*([] if build is None else [build()]), counts],
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    own = sum(p.numel() for p in module.model.parameters())
    kept = counts.kept
    del module, trainer
    gc.collect()
    return kept, counts.sent, Shape(own, 64)


def child(kind: str, out: str) -> None:
    """One strategy; Lightning starts the other process by running this again."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fit(kind, None)  # what is made once stays out of the differences
    plain, sent, shape = fit(kind, None)
    found: dict[str, Any] = {"parameters": shape.parameters, "width": shape.width, "plain": sent}
    for name, part in PARTS.items():
        kept, sent, _ = fit(kind, part.build)
        found[name] = {"kept": kept - plain, "sent": sent}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def report() -> None:
    found = json.loads(FOUND.read_text())
    lines = []
    for name, part in PARTS.items():
        for kind, share in (("ddp", 1), ("fsdp2", WORLD)):
            of = found[kind]
            says = part.keeps(Shape(of["parameters"], of["width"])) / share
            more = {op: n - of["plain"].get(op, 0) for op, n in of[name]["sent"].items() if n != of["plain"].get(op, 0)}
            sent = ", ".join(f"{op} {n:+,}" for op, n in sorted(more.items())) or "nothing more"
            lines.append(
                [f"`{name}`", kind.upper(), f"{of[name]['kept']:,}", f"{says:,.0f}",
                 f"{of[name]['kept'] / says:.3f}", sent]
            )  # fmt: skip
    large = []
    for name, part in PARTS.items():
        for kind, ranks in (("DDP", 1), ("FSDP2, 8 processes", 8), ("FSDP2, 64 processes", 64)):
            sizes = [size(part.keeps(shape) / ranks) for shape in LARGE.values()]
            large.append([f"`{name}`", kind, *sizes])
    for kind, ranks in (("DDP", 1), ("FSDP2, 8 processes", 8), ("FSDP2, 64 processes", 64)):
        large.append(
            ["*weights, gradients, AdamW*, fp32", kind, *(size(16 * s.parameters / ranks) for s in LARGE.values())]
        )
    columns = [
        "callback",
        "strategy",
        "bytes counted",
        "bytes by formula",
        "ratio",
        "bytes more in the collectives of a step",
    ]
    OUT.write_text(
        f"# Scale, on paper\n\n{found['header']}\n{__doc__.split(chr(10) * 2, 2)[2]}\n## Counted\n\n"
        f"{table(columns, lines)}\n## By formula\n\n{table(['callback', 'strategy', *LARGE], large)}\n"
        "## The formulas\n\n"
        + table(
            ["callback", "keeps, divided by the processes under FSDP2", "sends each step"],
            [[f"`{name}`", part.says, part.sends] for name, part in PARTS.items()],
        )
    )
    print(OUT.read_text())


def main() -> None:
    if len(sys.argv) > 1:
        child(*sys.argv[1:])
        return
    found: dict[str, Any] = {"header": header("python -m benchmarks.scale")}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("ddp", "fsdp2"):
            out = f"{folder}/{kind}.json"
            subprocess.run([sys.executable, "-m", "benchmarks.scale", kind, out], check=True)
            found[kind] = json.loads(Path(out).read_text())
    FOUND.write_text(json.dumps(found, indent=1) + "\n")
    report()


if __name__ == "__main__":
    main()
