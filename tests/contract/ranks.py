"""Draws and replay with any number of processes: ``torchrun --nproc-per-node N -m tests.contract.ranks FOLDER``.

A run takes up the checkpoint that one of another number has left in the folder.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from forge_lightning.callbacks import EdgeController
from forge_lightning.data import DifficultySampler, StatefulDataLoader
from tests.contract.modules import Plain, Stateful, examples
from tests.contract.rows import fit, weights
from tests.dream.build import dream_replay

BATCH, SIZE = 24, 240
"""Examples of a step, and of an epoch, over all ranks."""


def module(batch_size):
    class Tells(Plain):
        """Says of each example whether it was right, and keeps what came."""

        seen = []

        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            self.seen.append(batch[0][:, 0].tolist())
            right = (logits.argmax(1) == batch[1]).float()
            return {"loss": torch.nn.functional.cross_entropy(logits, batch[1]), "example_success": right}

        def train_dataloader(self):
            data = examples(SIZE)
            sampler = DifficultySampler(data, data.tensors[0].sum(1).abs(), batch_size=batch_size, seed=1)
            return StatefulDataLoader(data, batch_size=batch_size, sampler=sampler)

    return Tells


def together(callbacks, module, world, **kwargs):
    strategy = DDPStrategy(process_group_backend="gloo")
    return fit(callbacks, module, devices=world, strategy=strategy, **kwargs)


def check_draws(world, alone):
    """Ranks share out what one process draws, and train as it does."""
    for policy, (one, expected) in alone.items():
        each = module(BATCH // world)
        model, trainer = together([EdgeController(policy=policy)], each, world, max_epochs=3)
        for whole, mine in zip(one.seen, each.seen, strict=True):
            assert whole[trainer.global_rank :: world] == mine, policy
        torch.testing.assert_close(expected, weights(model), atol=1e-6, rtol=1e-5)
        ranks = trainer.strategy.all_gather(weights(model))
        assert all(torch.equal(rank, ranks[0]) for rank in ranks)
    return trainer


def stored(replay):
    """Identifiers of all examples that the ranks have stored, and of those in their probes."""
    ranks = [None] * torch.distributed.get_world_size()
    mine = [replay.memory.buffer.column("sample_id").tolist(), replay.memory.probe.column("sample_id").tolist()]
    torch.distributed.all_gather_object(ranks, mine)
    return [sorted({id for rank in ranks for id in rank[place]}) for place in (0, 1)]


class LooksAtStart(Callback):
    def on_train_start(self, trainer, pl_module):
        self.stored = stored(next(c for c in trainer.callbacks if hasattr(c, "memory")))


def check_replay(world, folder):
    """What was stored by another number of ranks is shared out among these, and none of it is lost."""
    earlier, known = folder / "replay.ckpt", folder / "stored.json"
    expected = json.loads(known.read_text()) if known.exists() else [[], []]
    replay, start = dream_replay(fraction=0.25, distillation=0.5, capacity=4000), LooksAtStart()
    epochs = 1 + len(list(folder.glob("*.done")))
    path = earlier if earlier.exists() else None
    model, trainer = together([replay, start], Stateful, world, max_epochs=epochs, ckpt_path=path)
    ranks = trainer.strategy.all_gather(weights(model))
    assert all(torch.equal(rank, ranks[0]) for rank in ranks)
    assert start.stored == expected, (start.stored, expected)
    found = stored(replay)
    assert len({*found[0], *found[1]}) == 64, "all that there are"
    trainer.save_checkpoint(earlier)
    if trainer.is_global_zero:
        known.write_text(json.dumps(found))


def main(folder):
    world = int(os.environ["WORLD_SIZE"])
    alone = {}
    for policy in ("skill", "item"):  # before there is a process group
        one = module(BATCH)
        hidden = {name: os.environ.pop(name) for name in list(os.environ) if name in _TORCHRUN}
        alone[policy] = (one, weights(fit([EdgeController(policy=policy)], one, max_epochs=3)[0]))
        os.environ.update(hidden)
    check_draws(world, alone)
    check_replay(world, Path(folder))
    if torch.distributed.get_rank() == 0:
        (Path(folder) / f"{world}.done").touch()


_TORCHRUN = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"}
"""What tells Lightning that it was started by `torchrun`."""

if __name__ == "__main__":
    main(*sys.argv[1:])
