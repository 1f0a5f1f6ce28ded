"""What a batch's labels and a network's outputs mean: one place for every callback that compares them."""

import math
from typing import Any

import torch
from torch import Tensor

from forge_lightning.components.activation_tap import field_of
from forge_lightning.components.logit_tap import given_labels
from forge_lightning.components.tokens import IGNORED

_ENOUGH = 8
"""Outputs that must all lie in [0, 1] to be probabilities of a binary head, not logits by chance."""


class NoClassesError(ValueError):
    """Labels or outputs that are not of classes, as those of a regression."""


class LabelReader:
    """Reads labels as classes, and outputs as logits of as many classes.

    Integer and boolean labels of any width are classes. Of a network with one output, labels of 0 and 1, also as
    floats, are two classes, and the output is the logit of the second. Labels that the loss ignores are -100,
    ``ignore_index``, and any one number that is no class, as -1 or 255: no cross-entropy takes it. Outputs of which all
    rows are probabilities are taken by their logarithms.

    Args:
        labels: Key or position of the labels in a batch, "auto", or ``None`` for none.
        mask: Key or position of the mask of real tokens.
        shifted: Whether the labels of a causal model are the tokens themselves.
        ignore_index: Another label that the loss ignores.
    """

    def __init__(
        self,
        labels: str | int | None = "auto",
        mask: str | int | None = "attention_mask",
        shifted: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        self.key, self.mask_key, self.shifted, self.ignore_index = labels, mask, shifted, ignore_index
        self._are_probabilities: bool | None = None  # of the outputs in training

    def mask(self, batch: Any) -> Tensor | None:
        """The mask of real tokens."""
        return field_of(batch, self.mask_key)

    def read(self, batch: Any, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and labels of a batch.

        With gradients on, outputs and labels are looked at in the first batch only, as that waits for the device.

        Args:
            batch: Of a step.
            outputs: Of the network, ``(B, V)``, ``(B, T, V)`` or ``(B · T, V)``.

        Returns:
            Logits of at least two classes, and int64 labels, -100 where there is none; ``None`` where the batch has no
            labels, or a distribution over the classes in place of each.

        Raises:
            NoClassesError: If labels or outputs are not of classes.
            ValueError: If the batch has nothing under a key that was named.
        """
        labels = given_labels(batch, self.key, self.shifted, self.mask_key)
        one_output = outputs.shape[-1] == 1
        look = self._are_probabilities is None or not torch.is_grad_enabled()
        if one_output and labels is not None and labels.numel() != outputs.numel():
            raise ValueError(
                f"the network returns {(outputs.numel(),)} for labels {tuple(labels.shape)}; logits are (B, V) or"
                " (B, T, V), or (B,) for two classes. Name the part: `network`."
            )
        if labels is None and one_output:
            raise NoClassesError("the network has one output, and there are no labels that make it one of two classes.")
        if labels is not None:
            labels = self._classes(labels, outputs, one_output)
        if labels is not None:
            labels = self._without_ignored(labels, 2 if one_output else outputs.shape[-1], look)
        return self.logits(outputs, look), labels

    def logits(self, outputs: Tensor, look: bool = False) -> Tensor:
        """Logits of at least two classes: of outputs that are logits of one, or probabilities.

        Args:
            outputs: As of `read`.
            look: Find out whether they are probabilities; otherwise as the training outputs before.
        """
        one_output, probable = outputs.shape[-1] == 1, bool(self._are_probabilities)
        if look:
            probable = _are_probabilities(outputs.detach(), one_output)
            if torch.is_grad_enabled() or self._are_probabilities is None:
                self._are_probabilities = probable
        if probable:
            outputs = outputs.float()
            least = torch.finfo(torch.float32).tiny
            both = torch.cat([1 - outputs, outputs], -1) if one_output else outputs
            return both.clamp(min=least).log()
        return torch.cat([torch.zeros_like(outputs), outputs], -1) if one_output else outputs

    def _classes(self, labels: Tensor, outputs: Tensor, one_output: bool) -> Tensor | None:
        """Labels as int64; ``None`` for distributions over the classes."""
        if labels.is_complex():
            raise NoClassesError("the labels are complex numbers, and no classes.")
        if labels.is_floating_point():
            if one_output:
                known = labels[labels != IGNORED]
                if not bool(((known == 0) | (known == 1)).all()):
                    raise NoClassesError("the labels are floating-point numbers other than 0 and 1: no classes.")
            elif labels.shape == outputs.shape and _are_probabilities(labels, one_output=False):
                return None
            else:
                raise NoClassesError(f"the labels are {str(labels.dtype).removeprefix('torch.')} numbers: no classes.")
        labels = labels.long()
        if labels.ndim == outputs.ndim and labels.shape[-1] == 1 and labels.shape[:-1] == outputs.shape[:-1]:
            labels = labels.squeeze(-1)
        return labels

    def _without_ignored(self, labels: Tensor, num_classes: int, look: bool) -> Tensor:
        if self.ignore_index is not None:
            labels = labels.masked_fill(labels == self.ignore_index, IGNORED)
        outside = ((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)
        if look:
            values = labels[outside].unique()
            if len(values) > 1:
                raise NoClassesError(
                    f"the labels are no classes below {num_classes}, the network's number of outputs: they hold"
                    f" {values[:4].tolist()}. Name the labels with `labels`, the part that returns logits with"
                    " `network`."
                )
        return labels.masked_fill(outside, IGNORED)


def _are_probabilities(outputs: Tensor, one_output: bool) -> bool:
    rows = outputs.flatten(0, -2).float()
    if not len(rows) or not bool(((rows >= 0) & (rows <= 1 + 1e-3)).all()):
        return False
    if one_output:
        return len(rows) >= _ENOUGH
    tolerance = 1e-3 if outputs.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(((rows.sum(-1) - 1).abs() < tolerance).all())


def loss_doubt(nll: float, loss: float, where: str) -> str | None:
    """A remark where the cross-entropy that a callback computes is far from the loss of the module.

    It catches labels that the loss ignores by a number that is a class, losses that are no cross-entropy, and wrong
    settings of ``network``, ``labels`` and ``shift``.

    Args:
        nll: Mean cross-entropy, in nats.
        loss: What the module returned, or logged.
        where: Where that loss is from, for the message.

    Returns:
        The message; ``None`` where the two are near each other, or one is not finite.
    """
    if not (math.isfinite(nll) and math.isfinite(loss)):
        return None
    if abs(nll - loss) <= 0.2 + 0.3 * min(abs(nll), abs(loss)):
        return None
    return (
        f"the cross-entropy of its logits and labels is {nll:.3g}, and {where} {loss:.3g}. If the loss ignores a label,"
        " as 0 for padding, set `ignore_index`; if its labels or logits are elsewhere, set `labels`, `network` or"
        " `shift`. A loss with class weights, label smoothing or further terms differs rightly, one that is no"
        " cross-entropy makes what is computed here meaningless."
    )
