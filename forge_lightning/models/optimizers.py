"""From optimizer and scheduler factories, as the command line gives them, to what Lightning wants."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import nn

from forge_lightning.schedules import WarmupSchedule


def optimizer_config(
    params: Iterable[Any],
    optimizer: OptimizerCallable,
    lr_scheduler: LRSchedulerCallable | None,
    total_steps: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns; the schedule is stepped after every optimizer step.

    Args:
        params: Parameters, or groups of them.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the schedule, if any.
        total_steps: Optimizer steps of the run, for schedules that need them. Asking makes the data loaders.

    Raises:
        MisconfigurationException: If a schedule needs the number of steps, and it is not known.
    """
    built = optimizer(params)
    if lr_scheduler is None:
        return {"optimizer": built}
    scheduler = lr_scheduler(built)
    if isinstance(scheduler, WarmupSchedule) and scheduler.total_steps is None and total_steps is not None:
        try:
            scheduler.bind(total_steps())
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"interval": "epoch", "monitor": scheduler.monitor}
    return {"optimizer": built, "lr_scheduler": config}


def weight_decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: the optimizer's own weight decay, and none.

    None for everything below two dimensions (biases and the scales of norms) and for embeddings. A tensor that several
    modules share is in one group; as an embedding, if it is one anywhere (a tied output head).
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for param in module.parameters():
        if param.requires_grad:
            (free if param.ndim < 2 or id(param) in embeddings else decayed).append(param)
    turned = transposed_weights(module)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if id(p) not in turned]},
        {"params": [p for p in decayed if id(p) in turned], "transposed": True},
        {"params": free, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def one_group(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters alike, but for weights of ``(inputs, outputs)``, which are marked ``transposed``."""
    turned = transposed_weights(module)
    params = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if id(p) not in turned]},
        {"params": [p for p in params if id(p) in turned], "transposed": True},
    ]
    return [group for group in groups if group["params"]]


def transposed_weights(module: nn.Module) -> set[int]:
    """Identities of the weights of ``(inputs, outputs)``: those of transformers' `Conv1D`, as GPT-2 has them."""
    return {id(m.weight) for m in module.modules() if type(m).__name__ == "Conv1D" and hasattr(m, "nf")}
