"""Training and evaluation steps that the loop does not know of: not counted, not logged, on a random stream of their
own.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from forge_lightning.core.loss_terms import LossTerm, only_loss_term
from forge_lightning.core.step_log import muted


def extra_step(trainer: Any, module: Any, batch: Any) -> None:
    """Train on a batch through the strategy, as the loop would: precision, gradient scaling, clipping, all processes.

    The step counter, the learning-rate schedule and the module's own ``optimizer_step`` are left out. Under manual
    optimization the module's ``training_step`` does it all.
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
        return None if loss is None else loss.detach()

    trainer.strategy.optimizer_step(optimizer, closure, module)
    optimizer.zero_grad()


def extra_evaluation(trainer: Any, module: Any, batch: Any) -> None:
    """Run the training step on a batch in evaluation mode. Not for manual optimization.

    With several processes without a gradient, because the strategies wait for a backward pass after every forward pass
    that has one. With one process a step that looks at gradients itself is served.
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


@contextmanager
def apart(trainer: Any, module: Any, term: LossTerm, seed: int, with_callbacks: bool = False) -> Iterator[None]:
    """Let what happens meanwhile be seen by nobody, and draw from random numbers of its own.

    Args:
        trainer: Whose callbacks and loggers see nothing.
        module: Whose ``log`` does nothing.
        term: The one loss term that goes on.
        seed: Of torch's, NumPy's and Python's global random numbers.
        with_callbacks: Let callbacks' hooks and other loss terms take part; logged is nothing all the same.
    """
    devices = [module.device] if module.device.type == "cuda" else []
    callbacks = trainer.callbacks
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
    """Meanwhile multiply all learning rates."""
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


def _arguments(trainer: Any, batch: Any) -> list[Any]:
    """Of ``training_step``, which may or may not want the number of the batch."""
    return list(trainer.fit_loop.epoch_loop._build_kwargs({}, batch, 0).values())


def _loss(outputs: Any) -> Tensor | None:
    loss: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss


def _reshard(module: nn.Module) -> None:
    """What was run without a backward pass under FSDP2 still has its gathered weights."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
