"""Sources on two processes, resumed inside an epoch: ``python -m tests.data.two_processes FOLDER``."""

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from forge_lightning.callbacks import RNGState
from forge_lightning.data import Source, Streaming, TextData
from tests.data.test_text import Sums


class Seen(Sums):
    """Gather what all ranks saw on rank 0, through a file."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_train_end(self):
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self.seen)
        if self.trainer.is_global_zero:
            self.where.write_text(json.dumps(found))


def seen(folder, form, steps, save_at=None, ckpt_path=None):
    """The batches of each rank."""
    sources = [
        Source(f"{folder}/{name}.jsonl", val_path=f"{folder}/a.jsonl", weight=1.0 + i) for i, name in enumerate("ab")
    ]
    options = {"streaming": Streaming(steps_per_epoch=5, buffer=7)} if form == "stream" else {}
    data = TextData(sources=sources, packing=False, block_size=16, batch_size=3, seed=1, **options)
    saving = [ModelCheckpoint(f"{folder}/{form}", filename="at", every_n_train_steps=save_at)] if save_at else []
    module = Seen(Path(folder, "seen.json"))
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, limit_val_batches=0,
        callbacks=[RNGState(), *saving], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=bool(save_at),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return json.loads(module.where.read_text())


def main(folder):
    warnings.simplefilter("ignore")
    for name, count in (("a", 23), ("b", 40)):
        lines = [json.dumps({"text": f"{name}{i:02}"}) + "\n" for i in range(count)]
        Path(folder, f"{name}.jsonl").write_text("".join(lines))
    for form in ("stream", "table"):
        whole = seen(folder, form, 9)
        assert str(whole[0]) != str(whole[1])
        seen(folder, form, 4, save_at=4)
        resumed = seen(folder, form, 9, ckpt_path=f"{folder}/{form}/at.ckpt")
        assert resumed == [batches[4:] for batches in whole], form
    Path(folder, "done").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
