"""Counters of filter steps that were not read: they lie on the device, as those of a `GradScaler` do."""

from collections.abc import Mapping

import torch
from torch import Tensor


class UnreadSteps:
    """What a `GradientFilter` counts, as scalars on the device of the gradients.

    Args:
        device: Where.
        steps: Optimizer steps that were filtered.
        skipped_steps: Steps left alone because a gradient was not finite.
        smoothed_cosine: Running cosine, ``None`` before the first.
        counts: Gradients that each parameter's window took.
    """

    def __init__(
        self,
        device: torch.device,
        steps: int,
        skipped_steps: int,
        smoothed_cosine: float | None,
        counts: Mapping[str, int],
    ) -> None:
        wide = torch.float32 if device.type == "mps" else torch.float64  # as Python's own numbers, where there are such
        self.calls = steps + skipped_steps
        self.steps = torch.full((), steps, dtype=torch.int64, device=device)
        self.skipped_steps = torch.full((), skipped_steps, dtype=torch.int64, device=device)
        first = float("nan") if smoothed_cosine is None else smoothed_cosine
        self.smoothed_cosine = torch.full((), first, dtype=wide, device=device)
        self.counts = {
            name: torch.full((1,), count, dtype=torch.int64, device=device) for name, count in counts.items()
        }

    def end_step(self, ok: Tensor) -> None:
        """Count a step, by whether its gradients were finite."""
        self.calls += 1
        self.steps += ok
        self.skipped_steps += ~ok

    def smooth(self, cosine: Tensor, ok: Tensor, decay: float) -> Tensor:
        """Let the cosine of a step enter the running one, if it is known. Returns that, 0 where none is."""
        last = self.smoothed_cosine.nan_to_num()
        enters = ok & cosine.isfinite()
        self.smoothed_cosine = torch.where(enters, decay * last + (1 - decay) * cosine, self.smoothed_cosine)
        return self.smoothed_cosine.nan_to_num()

    def read(self) -> tuple[int, int, float | None, dict[str, int]]:
        """Steps, skipped steps, cosine and counts, as they were given. Waits for the device."""
        whole = torch.stack([self.steps, self.skipped_steps, *(count[0] for count in self.counts.values())])
        steps, skipped_steps, *counts = whole.tolist()
        cosine = float(self.smoothed_cosine)
        return steps, skipped_steps, None if cosine != cosine else cosine, dict(zip(self.counts, counts, strict=True))
