"""Per-example loss, success and logits of a training step of any module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.core.labels import LabelReader
from forge_lightning.core.logit_tap import LogitTap, by_position, is_shifted, predicted_rows, scores_of_rows
from forge_lightning.core.tokens import IGNORED
from forge_lightning.dream.functional import stored_logit_loss, top_logits

KEPT = ("stored_values", "stored_classes", "stored_total")
"""Names of the stored parts of an example's logits."""
_LEAST = -60_000.0
"""Lowest log-probability that is stored: 16 bits end at 65,504."""


class RowScores:
    """Reads one training step at a time.

    Args:
        network: Returns logits; ``None`` if unknown.
        labels: Key or position of the labels; "auto" for the usual names.
        shift: Whether position ``t`` predicts the label of ``t + 1``. Default: inferred from the network.
        mask: Key of the mask of real tokens.
        ignore_index: Label that the loss ignores, in addition to -100.
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
        """Reads outputs as logits, and labels as classes."""
        self._known: Tensor | None = None
        self._tap = None if network is None else LogitTap(network)
        self._batch: Any = None
        self._logits: Tensor | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the step has returned logits."""
        return self._logits is not None

    def begin(self, batch: Any) -> None:
        """Call before a step. The network's last call counts; in training, its last call with a gradient."""
        self._batch, self._logits, self._known = batch, None, None
        if self._tap is not None:
            self._tap.start(with_gradient=torch.is_grad_enabled())

    def take(self, loss: Tensor | None = None) -> bool:
        """Call after the forward pass. Returns whether it found logits that were unknown before.

        Args:
            loss: Loss of the step.

        Raises:
            ValueError: If the network returns no logits.
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
        """Drop the step."""
        self._batch = self._logits = self._known = None
        if self._tap is not None:
            self._tap.stop()

    def detach(self) -> None:
        """Remove the hook."""
        if self._tap is not None:
            self._tap.detach()

    def read(self, outputs: Any, count: int) -> tuple[Tensor, Tensor]:
        """Loss and success of each example: as the step returned them, otherwise from its logits.

        Args:
            outputs: What the step returned.
            count: Number of examples in the batch.

        Returns:
            ``(B,)`` fp32 each; success is NaN if only losses were returned.

        Raises:
            ValueError: If they cannot be inferred.
        """
        given = outputs if isinstance(outputs, Mapping) else {}
        losses, successes = (given.get(f"example_{name}") for name in ("loss", "success"))
        if isinstance(losses, Tensor) and losses.shape == (count,):
            known = isinstance(successes, Tensor) and successes.shape == (count,)
            found: Any = successes if known else torch.full_like(losses, torch.nan)
            return losses.detach().float(), found.detach().float()
        logits, labels = self._logits, self._labels()
        if logits is None:
            raise ValueError("no submodule is known to return logits.")
        if labels is None or labels.shape != logits.shape[:-1]:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels {shape} do not fit logits {tuple(logits.shape)}.")
        return scores_of_rows(logits.detach(), labels, self.shifted)

    def logits_to_keep(self, right: Tensor, top_k: int) -> list[list[Tensor]]:
        """`top_logits` of each label, for right examples only: log-probabilities in 16 bits, classes, log-sum-exps.

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
        """Distance of the batch's last examples from their stored logits, per label of the whole batch.

        Args:
            kept: What `logits_to_keep` returned for each, by the names in `KEPT`; empty where nothing was stored.
            count: Number of examples.

        Returns:
            Scalar with gradient; ``None`` if there is nothing to compare.
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
        """Number of predicted labels of each example, ``(B,)``."""
        labels = self._labels()
        assert labels is not None, "looked at before"
        if labels.ndim == 1:
            return (labels != IGNORED).long()
        return (labels[:, 1:] if self.shifted else labels).ne(IGNORED).sum(1)
