"""Extra training and evaluation steps outside the loop: not counted, not logged, with their own random generator."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from forge_lightning.core.loss_terms import LossTerm, only_loss_term
from forge_lightning.core.step_log import muted

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def extra_step(
    trainer: "Trainer", module: "LightningModule", batch: Any, after_backward: Callable[[], None] = lambda: None
) -> None:
    """Train on a batch through the strategy, as the loop would: precision, gradient scaling, clipping, all ranks.

    The step counter, the learning-rate schedule and the module's own ``optimizer_step`` are left out. Under manual
    optimization the module's ``training_step`` does it all, ``after_backward`` excepted.
    """
    if not module.automatic_optimization:
        with trainer.precision_plugin.train_step_context():
            trainer.strategy.training_step(*_arguments(trainer, batch))
        return
    optimizer = trainer.optimizers[0]

    def closure() -> Tensor | None:
        optimizer.zero_grad()
        with trainer.precision_plugin.train_step_context():
            loss = _loss(trainer.strategy.training_step(*_arguments(trainer, batch)))
        if loss is not None:
            trainer.strategy.backward(loss, optimizer)
            after_backward()
        return None if loss is None else loss.detach()

    trainer.strategy.optimizer_step(optimizer, closure, module)
    optimizer.zero_grad()


def extra_evaluation(trainer: "Trainer", module: "LightningModule", batch: Any) -> None:
    """Run the training step on a batch in evaluation mode. Not for manual optimization.

    With several ranks there is no gradient, because strategies wait for a backward pass after every forward pass with
    one. With one rank there is, for modules whose step reads gradients.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.set_grad_enabled(trainer.world_size == 1), trainer.precision_plugin.train_step_context():
            trainer.strategy.training_step(*_arguments(trainer, batch))
    finally:
        for part, mode in modes.items():
            part.training = mode
        _reshard(module)


def idle_parameters(trainer: "Trainer", module: "LightningModule") -> list[nn.Parameter]:
    """Trained parameters that callbacks added, where DDP waits for a gradient of each in every step."""
    if not isinstance(trainer.strategy.model, DistributedDataParallel):
        return []
    added = [part for part in module.modules() if getattr(part, "is_auxiliary", False)]
    return [param for part in added for param in part.parameters() if param.requires_grad]


@contextmanager
def apart(
    trainer: "Trainer", module: "LightningModule", term: LossTerm, seed: int, with_callbacks: bool = False
) -> Iterator[None]:
    """Hide the steps inside the block from callbacks, loggers and the global random generators.

    Args:
        trainer: The Trainer; its callbacks and loggers see nothing.
        module: The module; its ``log`` does nothing.
        term: The only loss term that stays active.
        seed: Random seed for torch, NumPy and Python inside the block; their generators are restored afterwards.
        with_callbacks: Let callbacks' hooks and other loss terms act. Nothing is logged either way.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(muted(trainer, module))
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(seed)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        if not with_callbacks:
            stack.enter_context(only_loss_term(module, term))
            vars(trainer)["callbacks"] = []
            stack.callback(vars(trainer).__setitem__, "callbacks", callbacks)
        yield


@contextmanager
def scaled_lr(optimizers: Any, scale: float) -> Iterator[None]:
    """Multiply all learning rates inside the block."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [group["lr"] for group in groups]
    try:
        if scale != 1:
            for group in groups:
                group["lr"] = group["lr"] * scale
        yield
    finally:
        for group, lr in zip(groups, before, strict=True):
            group["lr"] = lr


def _arguments(trainer: "Trainer", batch: Any) -> list[Any]:
    """Arguments of ``training_step``, which may take the batch's number or not."""
    return list(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, 0).values())


def _loss(outputs: Any) -> Tensor | None:
    loss: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss


def _reshard(module: nn.Module) -> None:
    """Free gathered weights, which FSDP2 keeps after a forward pass without a backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
