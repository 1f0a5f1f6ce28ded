"""A probed fit on two processes: ``python -m tests.geometry.two_processes FOLDER``."""

import json
import sys
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from forge_lightning.callbacks import GeometryProbe
from tests.contract.modules import with_batches_of
from tests.contract.rows import fit
from tests.geometry.test_callback import Collects


class Halves(with_batches_of(32)):
    """Each rank sees every second row of the batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [t[self.trainer.global_rank :: 2] for t in batch]


def main(folder):
    collects = Collects()
    probe = GeometryProbe(num_points=32, every_n_steps=1, max_overhead=None)
    strategy = DDPStrategy(process_group_backend="gloo")
    _, trainer = fit([probe, collects], Halves, devices=2, strategy=strategy, use_distributed_sampler=False)
    (Path(folder) / f"{trainer.global_rank}.json").write_text(json.dumps(collects.logged))


if __name__ == "__main__":
    main(*sys.argv[1:])
