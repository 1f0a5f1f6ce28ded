"""How right the estimators are, and what it costs to watch.

    python -m benchmarks.geometry [--only accuracy speed probe telemetry memory]

Accuracy: largest relative difference from scikit-dimension in fp64 on the same points: nine sets (large offsets,
massive activations) of 512, 1,024 and 2,048 points, alone and with 10 % of them repeated. Speed: TwoNN, Levina-Bickel,
correlation dimension and participation ratio of one layer, one thread, median CPU time, in turn with four
scikit-dimension fits. Probe: a training step of GPT-2's shape (124 M parameters, random weights, batch 4 × 256, fp32,
AdamW), twelve blocks and the last norm probed; its CPU time against 50 steps. Telemetry: a fit of a small model, the
same steps with and without Telemetry and StageClassifier in turn, `log_every_n_steps=1`. Memory: of the process, while
a tiny model is fitted with both.
"""

import argparse
import gc
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.environment import FOLDER, QUIET, header, table
from forge_lightning.callbacks import GeometryProbe, StageClassifier, Telemetry
from forge_lightning.data import AlgorithmicData
from forge_lightning.functional import (
    PointCloud,
    correlation_dimension,
    levina_bickel_dimension,
    participation_ratio,
    two_nn_dimension,
)
from forge_lightning.models import AlgorithmicModule, ForgeModule
from tests.geometry.test_functional import ESTIMATORS, SETS, draw, oracle


def accuracy() -> str:
    worst = dict.fromkeys(ESTIMATORS, (0.0, "", 0))
    for n in (512, 1024, 2048):
        for name, make in SETS.items():
            torch.manual_seed(n)
            points = make(n, draw(n))
            expected = oracle(points)
            repeated = torch.cat([points, points[: n // 10]])[torch.randperm(n + n // 10)]
            for given in (points, repeated):
                cloud = PointCloud(given, 64)
                for estimator, function in ESTIMATORS.items():
                    difference = abs(function(cloud).dimension - expected[estimator]) / expected[estimator]
                    worst[estimator] = max(worst[estimator], (float(difference), name, n))
    rows = [[key, f"{difference:.1e}", f"{name}, {n}"] for key, (difference, name, n) in worst.items()]
    return "## Accuracy\n\n" + table(["estimator", "largest relative difference", "where"], rows)


def cpu_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1000 * (time.process_time() - start)


def speed() -> str:
    import skdim

    rows = []
    for n, width in ((1024, 768), (2048, 768), (1024, 4096)):
        points = draw(n)(n, 50) @ torch.linalg.qr(draw(1)(width, 50)).Q.T
        array = points.numpy()

        def ours(points: torch.Tensor = points) -> None:
            cloud = PointCloud(points, 20)
            for estimate in (two_nn_dimension, levina_bickel_dimension, correlation_dimension, participation_ratio):
                estimate(cloud)

        def theirs(array: object = array) -> None:
            skdim.id.TwoNN().fit(array)
            skdim.id.MLE().fit(array, n_neighbors=20, comb="mle")
            skdim.id.CorrInt().fit(array)
            skdim.id.lPCA(ver="participation_ratio").fit(array)

        ours(), theirs()
        pairs = [(cpu_ms(ours), cpu_ms(theirs)) for _ in range(11)]
        mine, other = (median(values) for values in zip(*pairs, strict=True))
        rows.append([f"{n:,} × {width:,}", f"{mine:.1f}", f"{other:.0f}", f"{other / mine:.1f}"])
    return "## Speed\n\n" + table(["points × width", "four estimators, ms", "scikit-dimension, ms", "ratio"], rows)


class _TimedProbe(GeometryProbe):
    """CPU seconds of every probe, the copying in the hooks included."""

    def __init__(self, **options: object) -> None:
        super().__init__(max_overhead=None, **options)
        self.cpu_seconds: list[float] = []
        self.copying = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        copy = self._tap._copy

        def timed(*args: object) -> None:
            start = time.process_time()
            copy(*args)
            self.copying += time.process_time() - start

        self._tap._copy = timed
        run = self._held_out.run

        def timed_run(*args: object) -> None:
            start = time.process_time()
            run(*args)
            self.copying = time.process_time() - start

        self._held_out.run = timed_run

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.process_time()
        super()._probe(trainer, pl_module)
        self.cpu_seconds.append(time.process_time() - start + self.copying)
        self.copying = 0.0


class _StepTimes(Callback):
    """CPU seconds of every step, without what comes between two of them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.process_time() - self.started)


def probe() -> str:
    ids = torch.randint(0, 50257, (64, 256), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    loader = DataLoader(data, batch_size=4)
    layers = ["model.transformer.h.*", "model.transformer.ln_f"]
    cases = [
        ("tapped, 1,024 points", {"num_points": 1024}, 0.1),
        ("tapped, 2,048 points", {"num_points": 2048}, 0.3),
        ("held-out forward, 1,024 points", {"num_points": 1024, "source": "train"}, 1.5),
    ]
    rows = []
    for what, options, limit in cases:
        torch.manual_seed(0)
        module = ForgeModule(config={"model_type": "gpt2", "vocab_size": 50257})
        every = options["num_points"] // 1024  # batches that it takes
        timed = _TimedProbe(layers=layers, every_n_steps=every, positions="all", **options)
        steps = _StepTimes()  # first in the list: its end comes before the probe's
        trainer = Trainer(max_steps=6 * every, max_epochs=-1, limit_val_batches=0, callbacks=[steps, timed], **QUIET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader)
        assert len(timed.cpu_seconds) >= 5
        step, cost = median(steps.seconds[1:]), median(timed.cpu_seconds[1:])
        share = 100 * cost / (50 * step)
        rows.append([what, f"{1000 * step:,.0f}", f"{1000 * cost:,.0f}", f"{share:.3f} %", f"≤ {limit} %"])
        del module, trainer
        gc.collect()
    columns = ["13 layers, four estimators", "step, CPU ms", "probe, CPU ms", "share, every 50 steps", "to reach"]
    return "## Probe\n\n" + table(columns, rows)


def telemetry() -> str:
    def fit(callbacks: list[Callback], folder: str) -> list[float]:
        torch.manual_seed(0)
        steps = _StepTimes()
        trainer = Trainer(
            max_steps=100,
            log_every_n_steps=1,
            check_val_every_n_epoch=3,
            max_epochs=-1,
            callbacks=[*callbacks, _Clock(steps)],
            **QUIET | {"logger": CSVLogger(folder, name="", version="")},
        )
        module = AlgorithmicModule(num_layers=1)
        trainer.fit(module, AlgorithmicData("add", train_fraction=0.5, batch_size=768))
        return steps.seconds

    shares, plain = [], []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(12):
            without = median(fit([], f"{folder}/a{turn}")[20:])
            both = median(fit([StageClassifier(), Telemetry()], f"{folder}/b{turn}")[20:])
            shares.append(100 * (both / without - 1))
            plain.append(1000 * without)
    ordered = sorted(shares)
    row = [f"{median(plain):.1f}", f"{median(shares):.2f} %", f"{ordered[2]:.2f} to {ordered[-3]:.2f} %", "≤ 2 %"]
    columns = ["step, CPU ms", "Telemetry and StageClassifier, median of 12 pairs", "middle eight", "to reach"]
    return "## Telemetry\n\n" + table(columns, [row])


class _Clock(Callback):
    """The whole time from one step to the next, loggers and loops included."""

    def __init__(self, times: _StepTimes) -> None:
        self.times, self.before = times, None

    def on_train_batch_end(self, *_: object) -> None:
        now = time.process_time()
        if self.before is not None:
            self.times.seconds.append(now - self.before)
        self.before = now

    def on_validation_end(self, *_: object) -> None:
        self.before = None


class _Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class _Resident(Callback):
    def __init__(self) -> None:
        self.at: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step in (10_000, 20_000, 50_000, 100_000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.at[trainer.global_step] = pages * resource.getpagesize() / 2**20


def memory() -> str:
    loader = DataLoader(TensorDataset(torch.randn(2000, 4)), batch_size=2)
    resident = _Resident()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=100_000,
            log_every_n_steps=1,
            limit_val_batches=1,
            max_epochs=-1,
            callbacks=[StageClassifier(), Telemetry(max_rows=1000), resident],
            **QUIET | {"logger": CSVLogger(folder, name="", version="")},
        )
        trainer.fit(_Tiny(), loader, loader)
        trace = (Path(folder) / "trace.jsonl").stat().st_size / 2**20
    rows = [[f"{step:,}", f"{size:.1f}"] for step, size in resident.at.items()]
    text = f"\n\nThe trace with `max_rows=1000` took {trace:.1f} MiB."
    return "## Memory\n\n" + table(["step", "resident, MiB"], rows) + text


PARTS = {"accuracy": accuracy, "speed": speed, "probe": probe, "telemetry": telemetry, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = FOLDER / "geometry.md"
    old = path.read_text() if path.exists() else ""
    sections = {part.split("\n")[0].lower(): "## " + part.rstrip() for part in old.split("\n## ")[1:]}
    for name in args.only:
        sections[name] = PARTS[name]()
        print(sections[name], flush=True)
    kept = [sections[name] for name in (*PARTS, "what follows") if name in sections]
    about = __doc__.split("\n\n", 2)[2].strip()
    head = f"# What watching costs\n\n{header('python -m benchmarks.geometry')}\n{about}\n"
    path.write_text("\n".join([head, "\n\n".join(kept)]) + "\n")


if __name__ == "__main__":
    main()
