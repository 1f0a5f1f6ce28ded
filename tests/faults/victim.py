"""A fit with every callback that meets a misfortune: ``python -m tests.faults.victim FOLDER FAULT [CHECKPOINT]``.

Saves a checkpoint every step, and what the weights came to, if they came to anything, as ``weights.pt``.
"""

import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy

from tests.contract.cases import CASES
from tests.contract.modules import Stateful, with_choices
from tests.contract.rows import fit, weights

STEPS, AT = 14, 9  # inside the second epoch of eight batches
DEADLY = 60  # the example whose worker is killed; batches are of eight


class Victim(with_choices(Stateful)):
    """Its batch of step ``AT`` is full of NaN, or kills the worker that loads it."""

    fault = "none"

    def train_dataloader(self):
        loader = super().train_dataloader()
        if self.fault == "worker dies":
            loader = torch.utils.data.DataLoader(Deadly(loader.dataset), batch_size=8, num_workers=1)
        return loader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.fault == "nan" and self.trainer.training and self.trainer.global_step == AT:
            return [torch.full_like(batch[0], torch.nan), *batch[1:]]
        return batch


class Deadly(torch.utils.data.Dataset):
    """Its worker is killed at the sixtieth example, as the system does that is out of memory.

    It waits until the fit has received every batch before: the process that still fetches one from a worker
    that is gone sees a broken connection, and nothing that names the worker.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.received = torch.multiprocessing.Event()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index >= DEADLY:
            self.received.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dataset[index][:2]


class Fault(Callback):
    def __init__(self, kind):
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kind == "worker dies" and batch_idx == DEADLY // 8 - 1:
            trainer.train_dataloader.dataset.received.set()
        if trainer.global_step != AT:
            return
        if self.kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "full disk":  # the system refuses to write files of more than that, as it does without space
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        if self.kind == "rank raises" and trainer.global_rank == 1:
            raise RuntimeError("this rank gives up")


def main(folder, fault, checkpoint=None):
    warnings.filterwarnings("ignore", "(?!.*not finite)")
    folder = Path(folder)
    Victim.fault = fault
    by_type = {type(case.build()): case for case in CASES}
    callbacks = [case.build() for case in by_type.values()]
    if fault == "worker dies":
        callbacks = [c for c in callbacks if type(c).__name__ not in ("EdgeController", "DreamReplay")]
    kwargs = (
        {"strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True), "devices": 2}
        if fault == "rank raises"
        else {}
    )
    start = time.monotonic()
    try:
        model, _ = fit(
            [
                *callbacks,
                ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True),
                Fault(fault),
            ],
            Victim,
            max_epochs=-1,
            max_steps=STEPS,
            enable_checkpointing=True,
            logger=CSVLogger(folder, name="", version=""),
            ckpt_path=checkpoint,
            **kwargs,
        )
    finally:
        print(f"after {time.monotonic() - start:.0f} s", flush=True)
    torch.save(weights(model), folder / "weights.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
