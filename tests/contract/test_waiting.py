"""The double itself, and a language model with masks and labels under callbacks that act on every step."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from forge_lightning import callbacks
from forge_lightning.core.device import HostCopy
from forge_lightning.models import ForgeModule
from tests.accelerator import ACCELERATOR
from tests.contract import rows
from tests.contract.cases import CASES
from tests.contract.modules import LossOnly
from tests.contract.rows import fit
from tests.contract.waiting import Device, no_free_reads
from tests.dream.build import dream_replay
from tests.models.test_forge_module import SHAPES


@pytest.mark.parametrize(
    ("reads", "noted"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: float(x.mean()), "__float__"),
        (lambda x: bool((x > 0).any()), "__bool__"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: (x * 2).cpu(), "cpu"),
        (lambda x: x.to("cpu"), "to"),
        (lambda x: x[x > 0], "__getitem__"),
        (lambda x: x[[0, 1]], "__getitem__"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: torch.where(x > 0), "where"),
        (lambda x: torch.zeros(4).copy_(x), "copy_"),
        (lambda x: torch.tensor(1.0, device=x.device), "tensor"),
        (lambda x: x.repeat_interleave((x > 0).long()), "repeat_interleave"),
        (lambda x: x[: (x > 0).sum()], "__getitem__"),
        (lambda x: torch.arange(4)[: int(x.sum())], "__int__"),
        (lambda x: torch.full((2,), x.sum()), "full"),
        (lambda x: torch.ones(4).add(torch.ones(4), alpha=x.sum()), "add"),
        (lambda x: torch.nn.functional.one_hot((x > 0).long()), "one_hot"),
        (lambda x: x.new_tensor([1.0]), "new_tensor"),
        (lambda x: x.__setitem__(x > 0, torch.ones(3)), "__setitem__"),
        (lambda x: x.__setitem__(x > 0, 0.0), ""),
        (lambda x: torch.nn.functional.one_hot((x > 0).long(), 2), ""),
        (lambda x: torch.zeros(4).copy_(x, non_blocking=True), ""),
        (lambda x: torch.where(x > 0, x, 0.0).sum(), ""),
        (lambda x: torch.arange(3).tolist(), ""),
        (lambda x: x.masked_fill_(x > 0, 0.0), ""),
    ],
)
def test_the_double_notes_what_waits(reads, noted):
    device = Device()
    x = device.place(torch.tensor([1.0, -1.0, 2.0, 3.0]))
    device.listening = True
    with device:
        reads(x)
    assert [name.rpartition(".")[2] for name in device.waits] == ([noted] if noted else [])


def test_tensors_of_two_devices_do_not_mix():
    device = Device()
    x = device.place(torch.ones(4))
    with device:
        x * torch.tensor(2.0)
        x + torch.ones(4, device=x.device)
        x + torch.ones(4).to(x.device)
        x[torch.tensor([0])]
        x.new_zeros(4).copy_(torch.ones(4))
        assert not device.mixes
        x + torch.ones(4)
        torch.where(x > 0, x, torch.zeros(4))
        torch.cat([x, torch.zeros(2)])
    assert [name.rpartition(".")[2] for name in device.mixes] == ["add", "where", "cat"]


def test_what_is_computed_lies_there_too_and_a_copy_on_the_host_does_not():
    device = Device()
    net = nn.Linear(4, 2)
    device.place(list(net.parameters()))
    with device:
        loss = net(torch.ones(3, 4)).square().mean()
        loss.backward()
        device.listening = True
        host = loss.detach().cpu()
        assert float(host) > 0
        float(net.weight.grad.sum())
    assert [name.rpartition(".")[2] for name in device.waits] == ["cpu", "__float__"]


def test_a_copy_that_is_read_in_the_step_that_made_it_waits():
    device = Device()
    with device:
        device.listening = True
        x = device.place(torch.ones(2)) * 2
        early, late = HostCopy({"x": x}), HostCopy({"x": x})
        assert early.read()["x"].tolist() == [2.0, 2.0]
        device.next_step()
        assert late.read()["x"].tolist() == [2.0, 2.0]
    assert sum(device.waits.values()) == 1


@pytest.mark.parametrize("row", [rows.resume_mid_epoch, rows.resume_at_epoch_end, rows.resume_twice])
@pytest.mark.parametrize("case", [case for case in CASES if case.lags], ids=lambda case: case.id)
def test_what_is_under_way_belongs_to_the_state(case, row, tmp_path):
    if row.__name__ in case.exempt:
        pytest.skip(case.exempt[row.__name__])
    token = rows.ADAPT.set(case.adapt)
    try:
        with no_free_reads():
            row(case, tmp_path)
    finally:
        rows.ADAPT.reset(token)


@pytest.mark.skipif(ACCELERATOR != "gpu", reason="asks the driver of a GPU: `pytest --accelerator gpu`")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_driver_sees_no_synchronisation(case):
    """As the row `no_waiting`, on a GPU itself: from the forward pass to the end of all hooks of callbacks."""

    class There(case.adapt(LossOnly)):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.pin_memory = True
            return loader

        def on_train_batch_start(self, batch, batch_idx):
            done = self.trainer.global_step  # callbacks with an interval act at even steps
            torch.cuda.set_sync_debug_mode("error" if done >= 4 and done % 2 == 0 else "default")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    try:
        fit([case.build()], There, max_epochs=2, log_every_n_steps=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batches(count=12):
    """Texts of different lengths with prompts, padded; one without any label."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        ids = torch.randint(3, 60, (4, 10), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[1, 6:], labels[:, :3], labels[1, 6:] = 0, -100, -100
        if number == 7:
            labels[:] = -100
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "made",
    [
        lambda: [],
        lambda: [callbacks.Grokfast(schedule="constant"), callbacks.StageClassifier(), callbacks.InterruptCheckpoint()],
        lambda: [
            callbacks.Grokfast(filter="ma", window_size=3, keep_norm=True, schedule="constant"),
            callbacks.Telemetry(),
        ],
        lambda: [callbacks.SelfModel(watch_every_n_steps=100), callbacks.TemperatureCurriculum(weight=0.3)],
        lambda: [callbacks.SelfModel(form="next_latent", watch_every_n_steps=100), callbacks.Calibration()],
        lambda: [callbacks.TemperatureCurriculum(weight=0.3, fraction=0.5), callbacks.GeometryProbe(every_n_steps=100)],
        lambda: [dream_replay(fraction=0.25, distillation=0.5, strategy="priority", every_n_steps=100)],
    ],
    ids=["alone", "ema", "ma", "self-model and curriculum", "next latent", "fraction", "replay"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_s_step_waits_for_nothing(made):
    device = Device()

    class There(ForgeModule):
        def on_train_start(self):
            device.place([list(self.parameters()), list(self.buffers())])

        def on_after_batch_transfer(self, batch, dataloader_idx):
            device.listening = self.trainer.training and 4 <= self.trainer.global_step < 11  # the epoch ends with reads
            device.next_step()
            return device.place(batch)

        def on_train_epoch_end(self):
            device.listening = False

        def train_dataloader(self):
            return DataLoader(list(batches()), batch_size=None)

    config = {**SHAPES["gpt2"], "vocab_size": 64}
    with no_free_reads(), device:
        fit(made(), There(config=config), limit_val_batches=0, log_every_n_steps=100)
    assert not device.waits, device.waits
