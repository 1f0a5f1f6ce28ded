"""Callbacks on a compiled language model: they act as on one that is not, and no step of the steady state compiles."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from forge_lightning import callbacks
from forge_lightning.models import ForgeModule
from tests.contract import rows as contract_rows
from tests.contract.modules import Plain
from tests.contract.rows import fit, weights
from tests.contract.test_waiting import batches
from tests.dream.build import dream_replay
from tests.models.test_forge_module import SHAPES


class Texts(ForgeModule):
    def train_dataloader(self):
        return DataLoader(list(batches()), batch_size=None)

    val_dataloader = train_dataloader


class CountsGraphs(Callback):
    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(counters["stats"]["unique_graphs"])


@pytest.fixture
def eager_backend(monkeypatch):
    """Needs no compiler on the machine."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def probe():
    return callbacks.GeometryProbe(every_n_steps=3, num_points=16, max_overhead=None)


TOGETHER = {
    "observers": lambda: [
        callbacks.Grokfast(schedule="constant"),
        callbacks.StageClassifier(),
        callbacks.Calibration(),
        probe(),
    ],
    "loss terms": lambda: [callbacks.SelfModel(), callbacks.TemperatureCurriculum(weight=0.3)],
    "mix": lambda: [dream_replay(mode="mix", fraction=0.25, distillation=0.5)],
}
ALONE = {
    "self-model": lambda: [callbacks.SelfModel()],
    "next latent": lambda: [callbacks.SelfModel(form="next_latent")],
    "curriculum": lambda: [callbacks.TemperatureCurriculum(weight=0.3)],
    "fraction": lambda: [callbacks.TemperatureCurriculum(weight=0.3, fraction=0.5)],
    "geometry": lambda: [probe()],
    "cycle": lambda: [dream_replay(mode="cycle", every_n_steps=4, num_steps=2)],
}


@pytest.mark.parametrize(
    "made",
    [
        *(pytest.param(made, id=name) for name, made in TOGETHER.items()),
        *(pytest.param(made, id=name, marks=pytest.mark.slow) for name, made in ALONE.items()),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_alike_and_is_compiled_once(made, eager_backend):
    config = {**SHAPES["gpt2"], "vocab_size": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    counts = CountsGraphs()
    compiled, _ = fit([*made(), counts], Texts(config=config, compile=True), max_epochs=2, log_every_n_steps=100)
    plain, _ = fit(made(), Texts(config=config), max_epochs=2, log_every_n_steps=100)
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-4, rtol=1e-3)
    assert counts.counts[0] >= 1
    # The second epoch begins behind a validation, which is compiled for itself.
    assert counts.counts[13:] == [counts.counts[12]] * (len(counts.counts) - 13), counts.counts


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 16)

    def forward(self, x):
        return self.linear(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(8), Block(16)])
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Own(Plain):
    """A network that its project compiles, with layers inside."""

    compiled = True

    def __init__(self):
        super().__init__()
        self.net = Net()
        if self.compiled:
            self.net.compile()


class Silent(Own):
    """Logs nothing, which the compiler cannot follow."""

    compiled = False

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore")
def test_a_module_compiled_as_a_whole_has_its_hooks_after_one_without_them(eager_backend):
    """Lightning's own way, which no part of the module shows."""
    plain, _ = fit(AGAIN["curriculum"](), Silent)
    for made in (lambda: [], AGAIN["curriculum"]):
        module = seeded(Silent)
        _, trainer = contract_rows.made(made(), Silent)
        trainer.fit(torch.compile(module, backend="aot_eager"))
    torch.testing.assert_close(weights(module), weights(plain), atol=1e-5, rtol=1e-4)


def seeded(kind):
    seed_everything(0, verbose=False)
    return kind()


AGAIN = {
    "self-model": lambda: [callbacks.SelfModel(form="forward", layers=["net.blocks.0", "net.blocks.1"])],
    "curriculum": lambda: [callbacks.TemperatureCurriculum(weight=0.3, network="net.head")],
    "replay": lambda: [dream_replay(mode="mix", fraction=0.25, distillation=0.5, network="net.head")],
}


@pytest.mark.parametrize("made", AGAIN.values(), ids=AGAIN)
@pytest.mark.filterwarnings("ignore")
def test_hooks_inside_a_compiled_network_act_after_a_fit_without_them(made, eager_backend, monkeypatch):
    fit([], Own)
    compiled, _ = fit(made(), Own)
    monkeypatch.setattr(Own, "compiled", False)
    plain, _ = fit(made(), Own)
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_language_model_has_its_hooks_after_one_without_them(eager_backend):
    config = {**SHAPES["gpt2"], "vocab_size": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    options = {"log_every_n_steps": 100, "limit_val_batches": 0}
    fit([], Texts(config=config, compile=True), **options)
    compiled, _ = fit([callbacks.SelfModel()], Texts(config=config, compile=True), **options)
    plain, _ = fit([callbacks.SelfModel()], Texts(config=config), **options)
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-4, rtol=1e-3)
