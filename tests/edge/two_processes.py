"""A steered fit on one process and on two: ``python -m tests.edge.two_processes FOLDER``."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy

from forge_lightning.callbacks import EdgeController
from forge_lightning.data import DifficultySampler, StatefulDataLoader
from tests.contract.modules import Plain, examples
from tests.contract.rows import fit, weights


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
            data = examples(256)
            sampler = DifficultySampler(data, data.tensors[0].sum(1).abs(), batch_size=batch_size, seed=1)
            return StatefulDataLoader(data, batch_size=batch_size, sampler=sampler)

    return Tells


def main(folder):
    policies, one = ("skill", "item"), {}
    for policy in policies:  # before there is a process group
        one[policy] = module(16)
        alone, _ = fit([EdgeController(policy=policy)], one[policy], max_epochs=3)
        one[policy].alone = weights(alone)
    for policy in policies:
        both = module(8)
        strategy = DDPStrategy(process_group_backend="gloo")
        together, trainer = fit([EdgeController(policy=policy)], both, devices=2, strategy=strategy, max_epochs=3)
        for whole, mine in zip(one[policy].seen, both.seen, strict=True):
            assert whole[trainer.global_rank :: 2] == mine, policy
        torch.testing.assert_close(one[policy].alone, weights(together), atol=1e-6, rtol=1e-5)
        other = trainer.strategy.all_gather(weights(together))
        assert torch.equal(other[0], other[1])
    if trainer.is_global_zero:
        (Path(folder) / "done").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
