"""One fit with `DreamReplay`: what a training step shows of each example, and what the parts of the callback share."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from forge_lightning.core.callback import loss_of_step
from forge_lightning.core.device import to_device
from forge_lightning.dream.batch_rows import rows_of, template_of, with_rows
from forge_lightning.dream.buffer import Replay
from forge_lightning.dream.memory import Draw, ReplayMemory
from forge_lightning.dream.progress import Progress
from forge_lightning.dream.scores import RowScores


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a `ValueError` into the error that a user reads, with the callback's name in front."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise MisconfigurationException(text if text.startswith("`") else f"`DreamReplay`: {text}") from None


@dataclass
class Appended:
    """Number of replayed examples at the end of the batch at hand. All `DreamReplay` of a Trainer share it.

    Args:
        count: Number of examples.
        owner: Which `ReplayStep` has to account for them.
    """

    count: int = 0
    owner: "ReplayStep | None" = None


@dataclass(frozen=True)
class Outcome:
    """How the examples of a step did.

    Args:
        rows: Fields of the batch, ``(B, ...)`` each.
        losses: ``(B,)``, NaN where unknown.
        successes: ``(B,)``, NaN where unknown.
    """

    rows: dict[str, Tensor]
    losses: Tensor
    successes: Tensor


class ReplayStep:
    """Loss term that reads how each example of a training step did, and adds the distillation loss.

    Args:
        trainer: The Trainer that fits.
        scores: Reads losses, successes and logits.
        distillation: Weight of the distance to stored logits; 0 for none.
        top_k: Logits stored for each label.
        warn: Shows a warning.
    """

    def __init__(
        self, trainer: Trainer, scores: RowScores, distillation: float, top_k: int, warn: Callable[[str], None]
    ) -> None:
        self.trainer, self.scores, self.distillation, self.top_k = trainer, scores, distillation, top_k
        self.appended = Appended()
        self.activity: Literal["training", "sleeping", "measuring"] = "training"
        self.template: Any = None
        """A batch of the last kind seen, without examples; ``None`` before the first step."""
        self.idle: list[nn.Parameter] = []
        """Parameters that the steps of a sleep leave out, and for whose gradients DDP waits."""
        self._warn, self._warned = warn, False
        self.clear()

    def clear(self) -> None:
        """Drop what is known of the last step."""
        self._batch: Any = None
        self.drawn: Draw | None = None
        self.outcome: Outcome | None = None
        self.mean: Tensor | None = None
        """Loss of the step, where losses of single examples are unknown."""
        self.kept: dict[str, Tensor] = {}
        """Logits to store with the fresh examples."""

    def num_fresh(self, count: int) -> int:
        """Number of examples that no callback replays, of a batch of ``count``. They stand in front."""
        if self.activity == "sleeping":
            return 0
        return count if self.activity == "measuring" else count - self.appended.count

    def begin(self, batch: Any) -> None:
        if self._batch is not None:  # after a backward pass inside the step
            self.leave_out()
            return
        with refusing():
            rows = rows_of(batch)
        self._batch, self.template = with_rows(batch, rows), template_of(batch)  # what the step takes out stays
        self.outcome = None
        self.scores.begin(self._batch)

    def leave_out(self) -> None:
        """After a backward pass: what the step does not train has no gradient, so that no optimizer moves it."""
        for param in self.idle:
            param.grad = None

    def added(self, loss: Tensor) -> Tensor | None:
        distance = self._distance(loss)
        if not self.idle:
            return distance
        nothing = torch.stack([0.0 * param.sum() for param in self.idle]).sum()
        return nothing if distance is None else distance + nothing

    def _distance(self, loss: Tensor) -> Tensor | None:
        try:
            new = self.scores.take(loss.detach())
        except ValueError as error:
            self._cannot_score(error)
            return None
        stored = None if self.drawn is None else self.drawn.stored
        if not new or not self.distillation or self.activity == "measuring" or stored is None:
            return None
        distance = self.scores.distance(stored.extras, len(stored))
        return None if distance is None else self.distillation * distance

    def returned(self, outputs: Any) -> Any:
        skipped = outputs is None and self.trainer.lightning_module.automatic_optimization
        if skipped and not self.scores.has_logits:
            return outputs
        with refusing():
            rows = rows_of(self._batch)
        count = len(next(iter(rows.values())))
        losses = successes = torch.full((count,), torch.nan)
        try:
            losses, successes = self.scores.read(outputs, count)
        except ValueError as error:
            self._cannot_score(error)
        self.outcome = Outcome(rows, losses, successes)
        asked = self.activity != "training"
        self.mean = loss_of_step(self.trainer, outputs) if asked and losses.isnan().all() else None
        fresh = self.num_fresh(count)
        if self.distillation and fresh and self.activity == "training":
            try:
                self.kept = self.scores.logits_to_keep(fresh, self.top_k)
            except ValueError as error:
                self._cannot_score(error)
        if fresh == count or self.appended.owner is not self or not isinstance(outputs, Mapping):
            return outputs

        def cut(value: Any) -> Any:
            return value[:fresh] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

        return {key: cut(value) for key, value in outputs.items()}

    def end(self) -> None:
        self._batch = None
        self.scores.end()

    def _cannot_score(self, error: ValueError) -> None:
        if self.distillation:
            raise MisconfigurationException(f"`DreamReplay(distillation={self.distillation})`: {error}") from None
        if self._warned:
            return
        self._warned = True
        self._warn(
            f"the loss of single examples is unknown ({error}), so that none counts as near the threshold, examples are"
            " drawn from the reservoir, and logged losses are means of what `training_step` returned. Return"
            " `example_loss` and `example_success`, (B,), from `training_step`, or set"
            " `fields=BatchFields(labels=..., network=...)` (labels='input_ids' where all tokens are text to learn)."
        )


@dataclass
class Session:
    """What the parts of `DreamReplay` share during one fit.

    Args:
        trainer: The Trainer.
        module: The module that it fits.
        memory: What is stored on this rank.
        progress: Counters.
        step: Loss term on the module.
    """

    trainer: Trainer
    module: LightningModule
    memory: ReplayMemory
    progress: Progress
    step: ReplayStep

    def to_batch(self, template: Any, rows: Mapping[str, Tensor]) -> Any:
        """Make a batch on the module's device."""
        return with_rows(template, {name: to_device(tensor, self.module.device) for name, tensor in rows.items()})

    def note_replayed(self, draw: Draw | None, entries: int, losses: Tensor, successes: Tensor) -> None:
        """Count replayed examples, and update the scores of the stored ones, which stand last.

        Args:
            draw: What was drawn; ``None`` where nothing was.
            entries: Entries of the first field, over all replayed examples.
            losses: ``(B,)`` of the replayed examples.
            successes: ``(B,)`` of the replayed examples.
        """
        self.progress.computed[1] += entries
        if draw is None or draw.stored is None:
            return
        note_scores(self.memory, self.progress, draw.stored, losses.cpu(), successes.cpu())


def note_scores(memory: ReplayMemory, progress: Progress, stored: Replay, losses: Tensor, successes: Tensor) -> None:
    """Update the scores of the last examples of a batch, which were stored ones.

    Args:
        memory: Where they are stored.
        progress: Counters, of which ``replayed`` is updated.
        stored: The examples.
        losses: ``(B,)`` on the host.
        successes: ``(B,)`` on the host.
    """
    losses, successes = losses[-len(stored) :], successes[-len(stored) :]
    progress.note_replayed(losses, successes)
    memory.buffer.update(stored, losses, successes)
