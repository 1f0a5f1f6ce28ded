"""Lightning's own demo modules, as others write theirs: each callback trains, or refuses and says why."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModuleNoLen, BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.utils.data import DataLoader, TensorDataset

from forge_lightning import callbacks
from forge_lightning.callbacks import DreamReplay, Mix, Sleep
from forge_lightning.core.logit_tap import predicted_rows
from tests.contract.rows import fit, weights

OBSERVERS = (
    *("Calibration", "GeometryProbe", "InterruptCheckpoint", "RegressionGate", "RNGState", "RunSummary"),
    "StageClassifier",
)
ACT = ("DreamReplay", "Grokfast", "SelfModel", "TemperatureCurriculum", "TernaryQAT")
REFUSE = {"CodeEvaluation": "no method `complete", "EdgeController": "no loader has a `DifficultySampler`"}
NEEDS = {
    "DreamReplay": {"schedule": Mix(every_n_steps=2)},
    "Grokfast": {"schedule": "constant"},
    "TemperatureCurriculum": {"warmup_steps": 0},
}


class NoLength(BoringModel):
    """Nobody knows how long an epoch is."""

    def train_dataloader(self):
        data = BoringDataModuleNoLen()
        data.setup("fit")
        return data.train_dataloader()


def on_tokens(base):
    """With sequences of forty tokens in place of a download; the logits come flattened to ``(B · T, V)``."""

    class OnTokens(base):
        def __init__(self):
            super().__init__(vocab_size=40)

        def prepare_data(self):
            pass

        def train_dataloader(self):
            tokens = torch.randint(0, 40, (32, 9), generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=4)

    return OnTokens


MODULES = {
    "BoringModel": BoringModel,
    "ManualOptimBoringModel": ManualOptimBoringModel,
    "NoLength": NoLength,
    "LightningTransformer": on_tokens(LightningTransformer),
    "LightningLSTM": on_tokens(LightningLSTM),
}
SPECIAL = {
    **{(module, "SelfModel"): "names 0 layers" for module in ("BoringModel", "ManualOptimBoringModel", "NoLength")},
    ("LightningLSTM", "SelfModel"): "names 0 layers",
    **{
        (module, "TernaryQAT"): "no `nn.Linear` among its `layers`"  # but for the output layer
        for module in ("BoringModel", "ManualOptimBoringModel", "NoLength", "LightningLSTM")
    },
    ("LightningLSTM", "DreamReplay"): "Expected hidden",  # torch's own: the module keeps a state for four rows
}


def test_every_callback_is_here():
    names = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert names == {*OBSERVERS, "Telemetry", *ACT, *REFUSE}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [*OBSERVERS, "Telemetry", *ACT, *REFUSE])
def test_on_modules_of_others(module, name):
    run = lambda built: fit(built, MODULES[module], max_steps=8, max_epochs=-1)[0]  # noqa: E731
    callback = getattr(callbacks, name)(**NEEDS.get(name, {}))
    message = SPECIAL.get((module, name), REFUSE.get(name))
    if message:
        kind = RuntimeError if (module, name) == ("LightningLSTM", "DreamReplay") else MisconfigurationException
        with pytest.raises(kind, match=message):
            run([callback])
        return
    with_it, without = weights(run([callback])), weights(run([]))
    assert with_it.isfinite().all()
    assert torch.equal(with_it, without) == (name not in ACT)


@pytest.mark.filterwarnings("ignore")
def test_sleeps_go_with_a_state_of_the_batch_size():
    replay = DreamReplay(schedule=Sleep(every_n_steps=4, num_steps=1, batch_size=4))
    model, _ = fit([replay], MODULES["LightningLSTM"], max_steps=8, max_epochs=-1)
    assert weights(model).isfinite().all()


def test_flattened_logits_are_scored_by_position():
    """Loss and success of whole sequences, as if the network had not flattened them."""
    replay = DreamReplay(schedule=Sleep(every_n_steps=8, num_steps=1, batch_size=4), probe_size=0)
    fit([replay], MODULES["LightningTransformer"], max_steps=8, max_epochs=-1, limit_val_batches=0)
    losses = replay.memory.buffer.column("loss")
    assert losses.isfinite().all()
    assert len(losses) > 4


def test_flattened_logits_go_with_the_same_labels():
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (4, 3), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 0]] * 4)
    for shift in (False, True):
        for given in (labels, None):
            whole = predicted_rows(logits, given, mask, shift)
            flat = predicted_rows(logits.flatten(0, 1), given, mask, shift)
            assert torch.equal(whole[0], flat[0])
            assert given is None or torch.equal(whole[1], flat[1])
    cut = predicted_rows(logits[:, :-1], labels, None, True)  # of a module that cuts its inputs itself
    assert all(torch.equal(a, b) for a, b in zip(cut, predicted_rows(logits, labels, None, True), strict=True))
    with pytest.raises(ValueError, match="labels"):
        predicted_rows(logits[:, 0], labels[:, :1], None, True)  # one label for each row has nothing after it
    rows, targets = predicted_rows(logits[:, 0], labels[:, :1], None, False)
    assert torch.equal(rows, logits[:, 0])
    assert torch.equal(targets, labels[:, 0])
