"""Numbers and states over all ranks."""

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

T = TypeVar("T")


def sum_over_ranks(trainer: "Trainer", values: Tensor) -> Tensor:
    """Sum a tensor over all ranks. With one rank it is returned as it is.

    Args:
        trainer: The Trainer whose ranks are meant. All of them have to call this.
        values: Numbers of this rank, on any device.
    """
    if trainer.world_size == 1:
        return values
    total: Tensor = trainer.strategy.reduce(values.to(trainer.strategy.root_device).clone(), reduce_op="sum")
    return total.to(values.device)


def mean_over_ranks(trainer: "Trainer", numbers: dict[str, float]) -> dict[str, float]:
    """Mean of each number over the ranks that have it. All ranks have to call this, also those without any."""
    if trainer.world_size == 1:
        return numbers
    ranks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(ranks, numbers)
    keys = dict.fromkeys(key for rank in ranks for key in rank)
    values = {key: [rank[key] for rank in ranks if key in rank] for key in keys}
    return {key: sum(found) / len(found) for key, found in values.items()}


def min_over_ranks(trainer: "Trainer", value: int) -> int:
    """Smallest of all ranks' integers. All ranks have to call this."""
    if trainer.world_size == 1:
        return value
    return int(trainer.strategy.all_gather(torch.tensor(value, device=trainer.strategy.root_device)).min())


def max_over_ranks(trainer: "Trainer", value: int) -> int:
    """Largest of all ranks' integers. All ranks have to call this."""
    return -min_over_ranks(trainer, -value)


def broadcast_from_rank_zero(trainer: "Trainer", value: T) -> T:
    """Rank 0's value. All ranks have to call this."""
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)


def gather_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Gather ``state`` from all ranks on rank 0. Other ranks get a list with only their own."""
    rank, world_size = current_rank()
    if world_size == 1:
        return [state]
    states: list[Any] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(state, states)
    return states if states is not None else [state]


def current_rank() -> tuple[int, int]:
    """Rank and world size, without a Trainer; 0 and 1 where nothing is distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a `DTensor`; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A `DTensor` gathered from all ranks; any other tensor as it is. All ranks have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
