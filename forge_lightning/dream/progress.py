"""The counters of `DreamReplay` that a checkpoint holds beside the stored examples."""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """What `DreamReplay` has done so far, on one rank.

    Args:
        steps: Optimizer steps of the fit.
        last_sleep: ``steps`` at the last sleep, or at the last measurement of `Mix`.
        remaining: Steps that a sleep under way has still to make.
        cycles: Sleeps that are over.
        extra_steps: Optimizer steps made in sleeps.
        carry: Part of an example that `Mix` owes to the next batch.
        dream_carry: Part of an example that new programs owe to the next draw.
        size: Examples of the largest batch on this rank.
        most_rows: Examples of the largest batch on any rank, when the last sleep started.
        offered: Examples that could have gone to the probe.
        probe_closed: Whether the probe takes no more.
        computed: Entries of batches computed: of fresh examples, of replayed ones.
        before: Loss and success of the watched examples, before the sleep under way.
        lowest: Lowest loss of the probe.
        stage: Stage of training, once known.
        replayed: Sum and number of losses, sum and number of successes, of examples replayed since the last log.
        fits: Earlier fits whose examples are still stored.
    """

    steps: int = 0
    last_sleep: int = 0
    remaining: int = 0
    cycles: int = 0
    extra_steps: int = 0
    carry: float = 0.0
    dream_carry: float = 0.0
    size: int = 0
    most_rows: int = 1
    offered: int = 0
    probe_closed: bool = False
    computed: list[int] = field(default_factory=lambda: [0, 0])
    before: list[float] = field(default_factory=lambda: [math.nan, math.nan])
    lowest: float = math.nan
    stage: int | None = None
    replayed: list[float] = field(default_factory=lambda: [0.0] * 4)
    fits: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {f.name: copy(getattr(self, f.name)) for f in fields(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict`. Entries that an earlier release did not write keep their value."""
        for f in fields(self):
            if f.name in state:
                setattr(self, f.name, copy(state[f.name]))

    def take_replayed(self) -> tuple[float, float]:
        """Mean loss and success of the examples replayed since the last call; NaN where there are none."""
        loss, num_losses, success, num_successes = self.replayed
        self.replayed = [0.0] * 4
        return loss / num_losses if num_losses else math.nan, success / num_successes if num_successes else math.nan

    def note_replayed(self, *columns: Any) -> None:
        """Add losses and successes of replayed examples, ``(B,)`` each; NaN is left out."""
        for place, values in enumerate(columns):
            known = values[values.isfinite()]
            self.replayed[2 * place] += float(known.sum())
            self.replayed[2 * place + 1] += len(known)
