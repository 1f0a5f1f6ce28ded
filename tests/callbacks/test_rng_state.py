import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from forge_lightning.callbacks import RNGState
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
