"""The rows that need two processes, for every case, in one launch: ``python -m tests.contract.distributed KIND OUT``.

``KIND`` is "ddp" or "fsdp2". Lightning starts the second process by running this file again. Under `torchrun` with two
nodes of one process each, the processes are there already.
"""

import json
import math
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torchmetrics import MeanMetric

from forge_lightning.callbacks import RNGState, SelfModel
from forge_lightning.core import step_log
from forge_lightning.core.distributed import full_tensor
from forge_lightning.optim import MuonAdamW
from tests.contract.cases import CASES
from tests.contract.modules import Plain, Sharded, Stateful, with_batches_of
from tests.contract.rows import ADAPT, fit, weights
from tests.contract.waiting import no_free_reads
from tests.dream.build import dream_replay


class ShardedStateful(Stateful, Sharded):
    """A loader of ours under FSDP2, and an optimizer with a state, which Lightning's resume there cannot do without."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


MODULE = {"ddp": Plain, "fsdp2": Sharded}
STATEFUL = {"ddp": Stateful, "fsdp2": ShardedStateful}


def two(kind, callbacks, module, **kwargs):
    if kind == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    else:
        # Sharded checkpoints are the other format; callback state is in both, and whole.
        strategy = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="gloo",
        )
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # of torchrun
    return fit(callbacks, module, devices=2 // nodes, num_nodes=nodes, strategy=strategy, **kwargs)


def scaler(init_scale=2.0**20):
    # Large enough to overflow at first, so that steps are dropped.
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


def halves(base):
    """Each rank trains on its half of the batch."""

    class Halves(base):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            rank, world = self.trainer.global_rank, self.trainer.world_size
            return [t[rank::world] for t in batch]

    return Halves


def shards_the_batch(case, kind, folder):
    """With each rank on its half: the two ranks together take the step of the doubled batch."""

    one, _ = fit([case.build()], with_batches_of(16), max_epochs=3)
    both, _ = two(
        kind, [case.build()], halves(with_batches_of(16, MODULE[kind])), max_epochs=3, use_distributed_sampler=False
    )
    torch.testing.assert_close(weights(both), weights(one), atol=1e-6, rtol=1e-5)


def ranks_agree(case, kind, folder):
    """Different data on each rank, the same weights after; a logger, which only the first rank has."""
    logger = CSVLogger(folder, name="", version="")
    model, trainer = two(kind, [case.build()], STATEFUL[kind], max_epochs=2, logger=logger)
    mine = weights(model)
    theirs = trainer.strategy.all_gather(mine)
    _logged[case.id] = gathered(last_numbers(trainer))
    assert torch.equal(theirs[0], theirs[1])


_logged = {}
"""What each rank has logged in `ranks_agree`, by case."""


def last_numbers(trainer):
    """The last value of every number that callbacks of the suite logged on this rank."""
    return {key: value for key, (_, value) in step_log._logged.get(trainer, {}).items()}


def gathered(numbers):
    """The numbers of both ranks, on both."""
    ranks = [None, None]
    torch.distributed.all_gather_object(ranks, numbers)
    return ranks


def logs_agree(case, kind, folder):
    """With different data on each rank, numbers are the same whatever rank logs them, or documented as one rank's."""
    check_logs(case, *_logged.pop(case.id))


def check_logs(case, zero, one):
    assert zero.keys() == one.keys(), zero.keys() ^ one.keys()
    assert not case.of_rank or "rank 0" in type(case.build()).__doc__
    differ = {key for key in zero if zero[key] != one[key] and not (math.isnan(zero[key]) and math.isnan(one[key]))}
    assert differ <= case.of_rank, {key: (zero[key], one[key]) for key in differ - case.of_rank}


ENDS = (({"max_epochs": 4}, {"max_epochs": 2}), ({"max_epochs": -1, "max_steps": 8}, {"max_steps": 3}))
"""How long a run goes, and where it is stopped: at the end of an epoch, and inside one."""


def resumes(case, kind, folder):
    """Epoch end and mid-epoch, accumulating 3 with a remainder (32 rows a rank, batches of 8: 4 a rank)."""
    extra = lambda: [] if case.id == "rng-state" else [RNGState()]  # noqa: E731
    for plugins in ([],) if kind == "fsdp2" else ([], [scaler]):
        kwargs = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "limit_val_batches": 0}
        made = lambda: {"plugins": [p() for p in plugins]}  # noqa: E731, B023
        for goal, stop in ENDS:
            straight, _ = two(kind, [case.build(), *extra()], STATEFUL[kind], **goal, **made(), **kwargs)
            _, trainer = two(kind, [case.build(), *extra()], STATEFUL[kind], **goal | stop, **made(), **kwargs)
            path = folder / f"{len(plugins)}{len(goal)}.ckpt"
            trainer.save_checkpoint(path)
            torch.load(path, weights_only=True)
            resumed, _ = two(kind, [case.build(), *extra()], STATEFUL[kind], **goal, ckpt_path=path, **made(), **kwargs)
            assert torch.equal(weights(straight), weights(resumed)), (stop, plugins)


def acts(case, kind, folder):
    """Negative control of the rows above: the callback does something there."""
    without, _ = two(kind, [], STATEFUL[kind], max_epochs=2)
    with_it, _ = two(kind, [case.build()], STATEFUL[kind], max_epochs=2)
    assert torch.equal(weights(without), weights(with_it)) == case.observer


def with_a_progress_bar(case, kind, folder):
    """The bar, on rank 0 alone, computes a metric of all ranks at the end of an epoch: no rank waits for ever."""

    class Shown(MODULE[kind]):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric(sync_on_compute=True)

        def training_step(self, batch, batch_idx):
            self.mean.update(batch[1].float())
            self.log("train/mean", self.mean, on_step=False, on_epoch=True, prog_bar=True)
            return super().training_step(batch, batch_idx)

    two(kind, [case.build()], Shown, max_epochs=2, enable_progress_bar=True)


ROWS = [shards_the_batch, ranks_agree, logs_agree, resumes, acts, with_a_progress_bar]


def muon(kind):
    """`MuonAdamW` takes the step of the whole matrix, also where its rows lie on two processes."""

    def with_muon(base):
        class WithMuon(base):
            def configure_optimizers(self):
                return MuonAdamW(self.parameters(), lr=0.02)

        return WithMuon

    start, _ = fit([], with_batches_of(16), max_steps=0)
    one, _ = fit([], with_muon(with_batches_of(16)), max_epochs=2)
    both, _ = two(
        kind, [], with_muon(halves(with_batches_of(16, MODULE[kind]))), max_epochs=2, use_distributed_sampler=False
    )
    moved = (weights(one) - weights(start)).norm()
    apart = (weights(both) - weights(one)).norm() / moved
    # Each process with its rows alone would be 0.3 to 0.5 apart after one step of a random gradient.
    assert apart < 1e-4, f"{apart:.6f} of the way apart"


def unread(kind):
    """Callbacks that read nothing where reads would wait train as those that do."""
    for case in CASES:
        if "no_waiting" in case.exempt or case.observer or case.lags or kind in case.exempt:
            continue
        read, _ = two(kind, [case.build()], MODULE[kind], log_every_n_steps=100)
        with no_free_reads():
            not_read, _ = two(kind, [case.build()], MODULE[kind], log_every_n_steps=100)
        torch.testing.assert_close(weights(not_read), weights(read), msg=lambda text, case=case: f"{case.id}: {text}")


class WatchesHead(Callback):
    """Weights of the head at the end of each step, and at the start of the next one, behind a sleep."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pairs.append([head_weights(pl_module), None])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.pairs:
            self.pairs[-1][1] = head_weights(pl_module)


def head_weights(module):
    return torch.cat([full_tensor(p.detach()).flatten().clone() for p in module.self_model_head.parameters()])


def sleep_beside_a_head(kind):
    """The steps of a sleep leave out the head's weights, for whose gradients DDP waits."""

    class Decays(MODULE[kind]):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)

    made = lambda: SelfModel(form="forward", layers=["net.0", "net.2"])  # noqa: E731
    watches = WatchesHead()
    sleeps = dream_replay(mode="cycle", every_n_steps=2, num_steps=2, probe_size=0, batch_size=8)
    model, trainer = two(kind, [made(), sleeps, watches], Decays, max_epochs=1)
    assert sleeps._progress.cycles >= 2
    assert all(after is None or torch.equal(before, after) for before, after in watches.pairs)
    assert not torch.equal(watches.pairs[0][0], watches.pairs[-1][0])
    ranks = trainer.strategy.all_gather(weights(model))
    assert torch.equal(ranks[0], ranks[1])


def main(kind, out):
    warnings.filterwarnings("ignore")
    results = {}
    for check in (muon, unread, sleep_beside_a_head):
        try:
            check(kind)
            results[check.__name__] = "passed"
        except Exception:  # reported to the test that waits for it
            results[check.__name__] = traceback.format_exc()
    for case in CASES:
        for row in ROWS:
            name = f"{case.id}-{row.__name__}"
            if exempt := case.exempt.get(kind, case.exempt.get(row.__name__)):
                results[name] = f"exempt: {exempt}"
                continue
            ADAPT.set(case.adapt)
            folder = Path(out) / kind / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                row(case, kind, folder)
                results[name] = "passed"
            except Exception:  # reported to the test that waits for it
                results[name] = traceback.format_exc()
    if int(torch.distributed.get_rank()) == 0:
        (Path(out) / f"{kind}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
