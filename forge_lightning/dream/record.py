"""What a training step leaves for the bookkeeping on the host."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forge_lightning.core.device import HostCopy
from forge_lightning.dream.buffer import Replay
from forge_lightning.dream.scores import KEPT, LABELLED

_ROW = "row/"


@dataclass(frozen=True)
class StepRecord:
    """The examples of one training step, and how they did.

    Args:
        copy: Fields of the fresh examples as "row/<name>", ``(B, ...)`` each; "losses" and "successes" of all examples,
            which have the replayed ones at the end; and what `RowScores.logits_to_keep` returned, if anything.
        stored: The stored examples among the replayed ones; ``None`` for none.
        stage: Number of the stage of training.
        step: Optimizer steps before.
    """

    copy: HostCopy
    stored: Replay | None
    stage: int
    step: int

    @classmethod
    def of(
        cls,
        rows: Mapping[str, Tensor],
        losses: Tensor,
        successes: Tensor,
        kept: Mapping[str, Tensor],
        stored: Replay | None,
        stage: int,
        step: int,
        wait: bool,
    ) -> "StepRecord":
        """Begin to copy to the host what lies on the device; with ``wait`` take it as it is."""
        named = {_ROW + name: tensor for name, tensor in rows.items()}
        tensors = {**named, "losses": losses, "successes": successes, **kept}
        return cls(HostCopy.here(tensors) if wait else HostCopy(tensors), stored, stage, step)

    def read(self) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Rows, losses, successes and kept logits, on the host."""
        tensors = self.copy.read()
        rows = {name.removeprefix(_ROW): tensor for name, tensor in tensors.items() if name.startswith(_ROW)}
        kept = {name: tensors[name] for name in (*KEPT, LABELLED) if name in tensors}
        return rows, tensors["losses"], tensors["successes"], kept

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers. Waits for the copies."""
        state = {name: tensor.clone() for name, tensor in self.copy.read().items()}
        replayed = None if self.stored is None else [list(self.stored.slots), self.stored.sample_id.tolist()]
        return {"tensors": state, "replayed": replayed, "stage": self.stage, "step": self.step}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "StepRecord":
        """Restore from `state_dict`, without what was drawn beside slots and identifiers."""
        stored = None
        if state["replayed"] is not None:
            slots, ids = state["replayed"]
            nothing = torch.full((len(slots),), torch.nan)
            stored = Replay({}, {}, slots, torch.tensor(ids), nothing, nothing, torch.ones(len(slots)))
        return cls(HostCopy.here(state["tensors"]), stored, state["stage"], state["step"])
