"""How each row of a training step did, and the logits it was given: read off what somebody else's step does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.core.labels import LabelReader
from forge_lightning.core.logit_tap import LogitTap, by_position, is_shifted, predicted_rows, scores_of_rows
from forge_lightning.core.tokens import IGNORED
from forge_lightning.dream.functional import stored_logit_loss, top_logits

KEPT = ("stored_values", "stored_classes", "stored_total")
"""Names of what is kept of a row's logits."""
_LEAST = -60_000.0
"""Log-probability that is kept of the least likely: 16 bits end at 65,504."""


class RowScores:
    """Reads one training step at a time.

    Args:
        network: Puts out logits; ``None`` where it is not known.
        labels: Key or position of the labels; "auto" for the usual ones.
        shift: Whether the label of a position is what the position before it predicts. Default: as the network says.
        mask: Key of the mask of real tokens.
        ignore_index: Label that the loss ignores, beside -100.
    """

    def __init__(
        self,
        network: nn.Module | None,
        labels: str | int | None,
        shift: bool | None,
        mask: str | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self.network = network
        self.shifted = shift if shift is not None else network is not None and is_shifted(network)
        self.reader = LabelReader(labels, mask, self.shifted, ignore_index)
        """What the network's outputs and the labels are."""
        self._known: Tensor | None = None
        self._tap = None if network is None else LogitTap(network)
        self._batch: Any = None
        self._logits: Tensor | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the step has put out logits."""
        return self._logits is not None

    def begin(self, batch: Any) -> None:
        """Before a step; of the calls of the network the last one with a gradient counts, where there are gradients."""
        self._batch, self._logits, self._known = batch, None, None
        if self._tap is not None:
            self._tap.start(with_gradient=torch.is_grad_enabled())

    def take(self, loss: Tensor | None = None) -> bool:
        """After the step's forward pass. Returns whether this found logits that were not known before.

        Args:
            loss: Of the step.

        Raises:
            ValueError: If the network puts out no logits.
        """
        if self._tap is None or self._logits is not None:
            return False
        call = self._tap.take()
        if call is None:
            return False
        logits, self._known = self.reader.read(self._batch, call[2], loss)
        self._logits = logits if self._known is None else by_position(logits, self._known)
        return True

    def end(self) -> None:
        """Forget the step."""
        self._batch = self._logits = self._known = None
        if self._tap is not None:
            self._tap.stop()

    def detach(self) -> None:
        """Remove the hook."""
        if self._tap is not None:
            self._tap.detach()

    def read(self, outputs: Any, count: int) -> tuple[Tensor, Tensor]:
        """Loss and success of each row: those that the step returns, else those of its logits.

        Args:
            outputs: What the step returned.
            count: Rows of the batch.

        Returns:
            ``(B,)`` fp32 each; success is NaN where only the loss is returned.

        Raises:
            ValueError: If nothing tells them, saying why.
        """
        given = outputs if isinstance(outputs, Mapping) else {}
        losses, successes = (given.get(f"example_{name}") for name in ("loss", "success"))
        if isinstance(losses, Tensor) and losses.shape == (count,):
            known = isinstance(successes, Tensor) and successes.shape == (count,)
            found: Any = successes if known else torch.full_like(losses, torch.nan)
            return losses.detach().float(), found.detach().float()
        logits, labels = self._logits, self._labels()
        if logits is None:
            raise ValueError("which part puts out logits is not known.")
        if labels is None or labels.shape != logits.shape[:-1]:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels {shape} do not fit logits {tuple(logits.shape)}.")
        return scores_of_rows(logits.detach(), labels, self.shifted)

    def logits_to_keep(self, right: Tensor, top_k: int) -> list[list[Tensor]]:
        """Of each row that was right `top_logits` of each label: log-probabilities in 16 bits, classes, log-sum-exps.

        Raises:
            ValueError: If labels and logits do not fit.
        """
        if self._logits is None:
            return []
        rows, labels = predicted_rows(self._logits, self._labels(), None, self.shifted)
        if labels is None:
            raise ValueError("the batch has no labels.")
        values, classes, total = (t.cpu() for t in top_logits(rows, top_k))
        counts = self._counts().tolist()
        pieces = zip(
            right.tolist(), *(t.split(counts) for t in (values.clamp(min=_LEAST).half(), classes, total)), strict=True
        )
        return [[t.clone() if keep else t[:0].clone() for t in parts] for keep, *parts in pieces]

    def distance(self, kept: Mapping[str, Sequence[Tensor]], count: int) -> Tensor | None:
        """How far the batch's last rows are from what was kept of them, per label of the whole batch.

        Args:
            kept: What `logits_to_keep` gave for each, by the names in `KEPT`; empty for rows of which nothing was kept.
            count: How many rows.

        Returns:
            A scalar with gradient; ``None`` where there is nothing to compare.
        """
        labels, logits = self._labels(), self._logits
        if not kept or labels is None or logits is None or labels.shape != logits.shape[:-1]:
            return None
        with torch.autocast(logits.device.type, enabled=False):
            rows, _ = predicted_rows(logits[-count:], labels[-count:], None, self.shifted)
            counts = self._counts()
            lengths = torch.tensor([len(values) for values in kept[KEPT[0]]], device=counts.device)
            chosen = lengths.eq(counts[-count:]).repeat_interleave(counts[-count:])
            stored = [torch.cat(list(kept[name])).to(rows.device) for name in KEPT]
            if not chosen.any() or int(chosen.sum()) != len(stored[0]):
                return None
            return stored_logit_loss(rows[chosen], *stored).sum() / counts.sum()

    def _labels(self) -> Tensor | None:
        return self._known

    def _counts(self) -> Tensor:
        """Labels of each row that a prediction is for, ``(B,)``."""
        labels = self._labels()
        assert labels is not None, "looked at before"
        if labels.ndim == 1:
            return (labels != IGNORED).long()
        return (labels[:, 1:] if self.shifted else labels).ne(IGNORED).sum(1)
