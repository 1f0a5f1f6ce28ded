import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from forge_lightning.callbacks import EdgeController, Grokfast, RNGState, RunSummary
from forge_lightning.data import DifficultySampler, StatefulDataLoader
from tests.contract.modules import LossOnly, examples
from tests.contract.rows import fit, weights


class Shuffled(LossOnly):
    """Lightning's ordinary case: dropout, and a loader that shuffles from the global stream."""

    def train_dataloader(self):
        return DataLoader(examples(), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(examples(), batch_size=8)


def run(tmp_path, callbacks):
    straight, _ = fit(callbacks(), Shuffled, max_epochs=3)
    fit([*callbacks(), ModelCheckpoint(tmp_path, save_last=True)], Shuffled, max_epochs=1, enable_checkpointing=True)
    torch.rand(10)
    resumed, _ = fit(callbacks(), Shuffled, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    return torch.equal(weights(straight), weights(resumed))


def test_any_shuffling_loader_and_dropout_resume_at_an_epoch_end(tmp_path):
    assert run(tmp_path, lambda: [RNGState()])


def test_without_it_they_do_not(tmp_path):
    assert not run(tmp_path, list)


class OneCycle(LossOnly):
    """Reads the number of steps in `configure_optimizers`, so that Lightning makes the loaders before it restores."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].flatten().tolist())
        logits = self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        return {"loss": loss, "example_success": (logits.argmax(-1) == batch[1]).float()}

    def train_dataloader(self):
        return StatefulDataLoader(examples(), batch_size=8, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Chosen(OneCycle):
    def train_dataloader(self):
        data = examples()
        sampler = DifficultySampler(data, torch.arange(float(len(data))), batch_size=8)
        return StatefulDataLoader(data, batch_size=8, sampler=sampler)


@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        (OneCycle, lambda: [RNGState()]),
        (OneCycle, lambda: [RNGState(), Grokfast(schedule="constant"), RunSummary()]),
        (Chosen, lambda: [RNGState(), EdgeController(policy="skill")]),
    ],
)
def test_resume_inside_an_epoch_after_steps_were_estimated(module, callbacks, tmp_path):
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    straight, _ = fit([*callbacks(), save], module, max_epochs=2, enable_checkpointing=True)
    resumed, _ = fit(callbacks(), module, max_epochs=2, ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.seen == straight.seen[3:]
    assert torch.equal(weights(straight), weights(resumed))
