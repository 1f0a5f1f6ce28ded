"""Per-example loss, success and logits of a training step of any module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forge_lightning.core.device import reads_are_free, to_device
from forge_lightning.core.labels import LabelReader
from forge_lightning.core.logit_tap import (
    LogitTap,
    by_position,
    is_shifted,
    labels_of_places,
    predicted_rows,
    scores_of_rows,
)
from forge_lightning.core.token_loss import row_chunks
from forge_lightning.core.tokens import IGNORED
from forge_lightning.dream.functional import stored_logit_loss, top_logits

KEPT = ("stored_values", "stored_classes", "stored_total")
"""Names of the stored parts of an example's logits."""
LABELLED = "labelled"
"""Name of what says to which positions they belong."""
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

    def logits_to_keep(self, count: int, top_k: int) -> dict[str, Tensor]:
        """`top_logits` of each position, by the names in `KEPT`, and which positions have a label. Waits for no device.

        Args:
            count: Examples in front of the batch whose logits to keep.
            top_k: Logits of each position.

        Returns:
            Log-probabilities in 16 bits, ``(B, T, K)``, classes, log-sum-exps, ``(B, T)``, and `LABELLED`, ``(B, T)``;
            empty where there are no logits.

        Raises:
            ValueError: If labels and logits do not fit.
        """
        if self._logits is None:
            return {}
        labels = self._labels()
        if labels is None:
            raise ValueError("the batch has no labels.")
        known = labels_of_places(self._logits, labels, None, self.shifted)[1]  # of all: whether they fit shows there
        assert known is not None, "there are labels"
        known = known.unflatten(0, (len(labels), -1))[:count].flatten()
        flat = self._logits[:count].detach().flatten(0, -2)
        chunks = [top_logits(flat[part], top_k) for part in row_chunks(flat)]
        values, classes, total = map(torch.cat, zip(*chunks, strict=True))
        parts = (*zip(KEPT, (values.clamp(min=_LEAST).half(), classes, total), strict=True), (LABELLED, known))
        return {name: tensor.unflatten(0, (count, -1)) for name, tensor in parts}

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
            counts = self._counts()
            if not reads_are_free(logits.device):
                return self._distance_unread(logits[-count:], labels[-count:], kept) / counts.sum().clamp(min=1)
            rows, _ = predicted_rows(logits[-count:], labels[-count:], None, self.shifted)
            lengths = torch.tensor([len(values) for values in kept[KEPT[0]]], device=counts.device)
            chosen = lengths.eq(counts[-count:]).repeat_interleave(counts[-count:])
            stored = [torch.cat(list(kept[name])).to(rows.device) for name in KEPT]
            if not chosen.any() or int(chosen.sum()) != len(stored[0]):
                return None
            return stored_logit_loss(rows[chosen], *stored).sum() / counts.sum()

    def _distance_unread(self, logits: Tensor, labels: Tensor, kept: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Sum of the distances over all labels, by masks: how many there are is not read from the device."""
        known = labels_of_places(logits, labels, None, self.shifted)[1]
        assert known is not None, "there are labels"
        known = known.view(len(logits), -1)
        lengths = torch.tensor([len(values) for values in kept[KEPT[0]]])
        longest = max(1, int(lengths.max()))
        stored = [_padded(kept[name], longest) for name in KEPT]
        values, classes, total = (to_device(tensor, logits.device) for tensor in stored)
        lengths = to_device(lengths, logits.device)
        fits = known & (known.sum(1) == lengths).unsqueeze(1)
        place = (known.cumsum(1) - 1).clamp(0, longest - 1)  # of each label among those stored
        wide = place.unsqueeze(-1).expand(-1, -1, values.shape[-1])
        flat = logits.flatten(0, -2)
        each = stored_logit_loss(
            torch.where(fits.flatten().unsqueeze(1), flat, 0),  # what is not finite elsewhere would reach the gradient
            values.gather(1, wide).flatten(0, 1),
            classes.gather(1, wide).flatten(0, 1),
            total.gather(1, place).flatten(),
        )
        return torch.where(fits.flatten(), each, 0.0).sum()

    def _labels(self) -> Tensor | None:
        return self._known

    def _counts(self) -> Tensor:
        """Number of predicted labels of each example, ``(B,)``."""
        labels = self._labels()
        assert labels is not None, "looked at before"
        if labels.ndim == 1:
            return (labels != IGNORED).long()
        return (labels[:, 1:] if self.shifted else labels).ne(IGNORED).sum(1)


def kept_by_example(kept: Mapping[str, Tensor], right: Tensor) -> dict[str, list[Tensor]]:
    """What to store of each example, for right ones alone, by the names in `KEPT`.

    Args:
        kept: What `RowScores.logits_to_keep` returned, on the host.
        right: Which examples were right, ``(B,)``.

    Returns:
        ``B`` tensors for each name, of as many entries as the example has labels, or none.
    """
    if not kept:
        return {}
    labelled = kept[LABELLED]
    chosen = [known if good else torch.zeros_like(known) for known, good in zip(labelled, right.tolist(), strict=True)]
    return {name: [part[known] for part, known in zip(kept[name], chosen, strict=True)] for name in KEPT}


def _padded(parts: Sequence[Tensor], length: int) -> Tensor:
    """Tensors ``(n, ...)`` as ``(B, length, ...)``, filled up with zeros."""
    out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out
