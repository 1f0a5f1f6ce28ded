"""Numbers over ranks, in two processes."""

from pathlib import Path

import torch

from forge_lightning.core.distributed import (
    broadcast_from_rank_zero,
    full_tensor,
    gather_states,
    local_part,
    max_over_ranks,
    mean_over_ranks,
    min_over_ranks,
    sum_over_ranks,
)
from tests import processes
from tests.contract.modules import Plain
from tests.contract.rows import fit


def check(trainer, rank, world):
    """What every rank must see; `rank` and `world` are 0 and 1 without other ranks."""
    total = sum(range(1, world + 1))
    for dtype in (torch.float32, torch.float64, torch.int64):
        values = torch.tensor([1, 2], dtype=dtype) * (rank + 1)
        found = sum_over_ranks(trainer, values)
        assert found.dtype == dtype
        assert found.tolist() == [total, 2 * total]
        assert values.tolist() == [rank + 1, 2 * (rank + 1)], "the rank's own numbers stay"
    assert min_over_ranks(trainer, rank + 3) == 3
    assert max_over_ranks(trainer, rank + 3) == world + 2
    assert broadcast_from_rank_zero(trainer, f"rank {rank}") == "rank 0"
    one_rank_only = {"a": 4.0} if rank == world - 1 else {}
    assert mean_over_ranks(trainer, {"b": float(rank)} | one_rank_only) == {"b": (world - 1) / 2, "a": 4.0}
    states = gather_states({"rank": rank})
    assert states == ([{"rank": r} for r in range(world)] if rank == 0 else [{"rank": rank}])


def test_one_rank():
    _, trainer = fit([], Plain, max_steps=1)
    check(trainer, 0, 1)
    tensor = torch.ones(3)
    assert full_tensor(tensor) is local_part(tensor) is tensor


def test_two_ranks():
    process = processes.run_module("tests.core.test_distributed", cwd=Path(__file__).parents[2])
    assert process.returncode == 0, process.stderr[-2000:]
    assert "ranks agree" in process.stdout


def main():
    """In both processes; Lightning starts the second by running this file again."""
    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    _, trainer = fit([], Plain, max_steps=1, devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
    check(trainer, trainer.global_rank, 2)
    whole = torch.arange(4.0)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    assert torch.equal(full_tensor(sharded), whole)
    assert torch.equal(local_part(sharded), whole[2 * trainer.global_rank :][:2])
    if trainer.global_rank == 0:
        print("ranks agree")


if __name__ == "__main__":
    main()
