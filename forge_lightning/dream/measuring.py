"""Measure loss and success on stored examples."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from forge_lightning.core.distributed import max_over_ranks, min_over_ranks, sum_over_ranks
from forge_lightning.dream.buffer import ReplayBuffer
from forge_lightning.dream.extra_steps import apart, extra_evaluation
from forge_lightning.dream.session import Session


def measure(session: Session, template: Any, store: ReplayBuffer, batch_size: int | None = None) -> list[float]:
    """Mean loss and success on a store's examples, over all ranks, in evaluation mode.

    Args:
        session: The fit.
        template: A batch without examples.
        store: What to measure on. All ranks make the same number of forward passes.
        batch_size: Examples of a forward pass. Default: as many as a training batch has.

    Returns:
        Loss and success; NaN where unknown, and under manual optimization.
    """
    trainer, module, step = session.trainer, session.module, session.step
    if not module.automatic_optimization or min_over_ranks(trainer, len(store)) == 0:
        return [math.nan, math.nan]
    slots, size = store.slots(), batch_size or max(1, max_over_ranks(trainer, session.progress.size))
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, store.capacity, size):
        chunk = slots[start : start + size]
        batch = session.to_batch(template, store.read(chunk or slots[:size]).rows)
        step.activity = "measuring"
        try:
            with apart(trainer, module, step, seed=0):
                extra_evaluation(trainer, module, batch)
        finally:
            step.activity = "training"
        if step.outcome is not None and chunk:
            losses = step.outcome.losses if step.mean is None else step.mean.expand(len(chunk))
            for place, values in enumerate((losses, step.outcome.successes)):
                known = values[values.isfinite()].double().cpu()
                sums[2 * place : 2 * place + 2] += torch.tensor([known.sum(), len(known)])
        step.clear()
    loss, num_losses, success, num_successes = sum_over_ranks(trainer, sums).tolist()
    return [loss / num_losses if num_losses else math.nan, success / num_successes if num_successes else math.nan]


def measure_forgetting(session: Session, template: Any, batch_size: int | None = None) -> Mapping[str, float]:
    """Loss of the probe, and how much it is above its lowest so far. Empty without a probe."""
    progress, memory = session.progress, session.memory
    if not memory.probe_size:
        return {}
    loss = measure(session, template, memory.probe, batch_size)[0]
    progress.lowest = loss if math.isnan(progress.lowest) else min(progress.lowest, loss)
    return {"probe_loss": loss, "forgetting": loss - progress.lowest}
