"""Estimate the dimensions of layers, shared out among the ranks."""

from collections.abc import Callable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from forge_lightning.core.distributed import sum_over_ranks
from forge_lightning.geometry.estimators import estimate, quantities


def estimate_layers(
    trainer: Trainer,
    rows: Sequence[Tensor | None],
    names: Sequence[str],
    estimators: Sequence[str],
    share: int,
    warn: Callable[[str, str], None],
) -> Tensor:
    """Estimates of all layers, over the points of all ranks. Each rank computes some of the layers.

    Args:
        trainer: The Trainer that fits.
        rows: Activations of this rank, ``(n, D)`` for each layer; ``None`` for a layer that was not called.
        names: Names of the layers.
        estimators: Names of estimators.
        share: Points of one rank at most.
        warn: Called with a message and its key, on the rank that computed.

    Returns:
        ``(layers, 2 · quantities + 1)``: values, standard errors, number of points. NaN where there is no estimate.
    """
    columns, device = quantities(estimators), trainer.strategy.root_device
    rank, world = trainer.global_rank, trainer.world_size
    table = torch.zeros(len(rows), 2 * len(columns) + 1, dtype=torch.float64)
    gathered = [r if r is None else r.float() for r in rows] if world == 1 else _gather(trainer, rows, share, device)
    for index in range(rank, len(rows), world):
        points, name = gathered[index], names[index]
        if points is None:
            warn(f"layer {name!r} was not called in the step that was probed", "uncalled")
            table[index] = torch.nan
            continue
        results = estimate(points, estimators)
        for column, quantity in enumerate(columns):
            result = results[quantity]
            table[index, column], table[index, len(columns) + column] = result[:2]
            if result.reason:
                warn(f"no {quantity} of layer {name!r}: {result.reason}", quantity)
            table[index, -1] = result.num_points
    return sum_over_ranks(trainer, table)


def _gather(trainer: Trainer, rows: Sequence[Tensor | None], share: int, device: torch.device) -> list[Tensor | None]:
    """Gather the rows of every layer from all ranks, in one exchange. Ranks may have different numbers of rows."""
    shapes = torch.tensor([[0, 0] if r is None else [min(len(r), share), r.shape[1]] for r in rows], device=device)
    every = trainer.strategy.all_gather(shapes).cpu()  # (W, L, 2)
    widths = every[:, :, 1].amax(0).tolist()
    if bool(((every[:, :, 1] > 0) & (every[:, :, 1] != every[:, :, 1].amax(0))).any()):
        raise MisconfigurationException(
            "`GeometryProbe`: a layer has another width on another rank, as with inputs of different sizes. Name"
            " layers of fixed width."
        )
    flat = torch.zeros(share * sum(widths), dtype=torch.float32, device=device)
    offset = 0
    for row, width in zip(rows, widths, strict=True):
        if row is not None:
            part = row[:share].float().flatten()
            flat[offset : offset + len(part)] = part
        offset += share * width
    everything = trainer.strategy.all_gather(flat)
    gathered: list[Tensor | None] = []
    offset = 0
    for index, width in enumerate(widths):
        parts = []
        for rank in range(trainer.world_size):
            count = int(every[rank, index, 0])
            parts.append(everything[rank, offset : offset + count * width].view(count, width or 1))
        offset += share * width
        gathered.append(torch.cat(parts) if width else None)
    return gathered
