"""What a batch's labels and a network's outputs mean: one place for every callback that compares them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forge_lightning.core.batch import field_of
from forge_lightning.core.logit_tap import given_labels
from forge_lightning.core.tokens import IGNORED

_ENOUGH = 8
"""Single outputs between 0 and 1, with none outside, that are probabilities, not logits by chance."""
_EACH = 4
"""Labels for each class, from which on a class that is missing is missing for a reason."""
_SQUASHES = ("SigmoidBackward", "SoftmaxBackward")
_LINEAR = ("AddmmBackward", "MmBackward", "BmmBackward", "LinearBackward", "ConvolutionBackward", "MvBackward")
_PASSES = (
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Select", "Slice", "Transpose", "Permute",
    "T", "Clone", "Alias", "Clamp", "ClampMin", "ClampMax", "Expand", "Index", "Split", "Unbind",
    "BackwardHookFunction",
)  # fmt: skip
"""Operations, by autograd's names, that leave a logit a logit and a probability a probability."""


class NoClassesError(ValueError):
    """Labels or outputs that are not of classes, as those of a regression."""


class MiscountedError(NoClassesError):
    """Labels of classes that are not counted from 0."""


class LabelReader:
    """Reads labels as classes, and outputs as logits of as many classes.

    Integer and boolean labels of any width are classes. Of a network with one output, labels of 0 and 1, also as
    floats, are two classes, and the output is the logit of the second. Labels that the loss ignores are -100,
    ``ignore_index``, and any one number that is no class, as -1 or 255: no cross-entropy takes it. Outputs that are
    probabilities are taken by their logarithms: what a sigmoid or softmax returns, and what no linear layer returns and
    lies in [0, 1], with rows that add up to 1. Of one output whose origin is not known, as of a compiled network, the
    reading at which the cross-entropy is the step's own loss, else probabilities where at least eight lie between 0 and
    1, and none outside; the first that does ends that.

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
        self._probable: bool | None = None  # whether outputs in training are probabilities
        self._inside: Tensor | None = None  # and none of one output has been outside [0, 1] since
        self._saw_first_class = False
        self._num_seen = 0

    @property
    def are_probabilities(self) -> bool | None:
        """Whether the outputs of training steps are; ``None`` before the first."""
        return self._probable

    def mask(self, batch: Any) -> Tensor | None:
        """The mask of real tokens."""
        return field_of(batch, self.mask_key)

    def read(self, batch: Any, outputs: Tensor, loss: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits and labels of a batch.

        With gradients on, outputs and labels are looked at in the first batch only, as that waits for the device.

        Args:
            batch: The batch of a step.
            outputs: Outputs of the network, ``(B, V)``, ``(B, T, V)`` or ``(B · T, V)``.
            loss: Loss of the step, if known.

        Returns:
            Logits of at least two classes, and int64 labels, -100 where a position has none; ``None`` where the
            batch has no labels, or a distribution over the classes in place of each.

        Raises:
            NoClassesError: If labels or outputs are not of classes.
            ValueError: If the batch has nothing under a key that was named.
        """
        training, one_output = torch.is_grad_enabled(), outputs.shape[-1] == 1
        labels = self.classes(batch, outputs, look=self._probable is None or not training)
        probable = self._probable
        if probable is None or not (training or one_output):
            probable = self._of_one_batch(outputs, labels, loss)
        if training:
            self._probable = probable
        return self.logits(outputs, probable), labels

    def classes(self, batch: Any, outputs: Tensor, look: bool = True) -> Tensor | None:
        """The labels alone; arguments, result and errors as of `read`, and ``look`` waits for the device."""
        labels = given_labels(batch, self.key, self.shifted, self.mask_key)
        one_output = outputs.shape[-1] == 1
        if one_output and labels is not None and labels.numel() != outputs.numel():
            raise ValueError(
                f"the network returns {(outputs.numel(),)} for labels {tuple(labels.shape)}; logits are (B, V) or"
                " (B, T, V), or (B,) for two classes. Set `network='<name>'`."
            )
        if labels is None and one_output:
            raise NoClassesError("the network has one output, and there are no labels that make it one of two classes.")
        if labels is not None:
            labels = self._classes(labels, outputs, one_output)
        if labels is not None:
            labels = self._without_ignored(labels, outputs.shape[-1], look)
        return labels

    @torch.no_grad()
    def _of_one_batch(self, outputs: Tensor, labels: Tensor | None, loss: Tensor | None) -> bool:
        """Whether the outputs of one batch are probabilities."""
        origin = _origin(outputs)
        if origin is False:
            return False
        if outputs.shape[-1] > 1:
            made = origin or self._probable  # rows of few digits add up to 1 badly
            return bool(_inside(outputs)) if made else may_be_probabilities(outputs)
        known = self._probable if origin is None else origin
        if known is not None or not may_be_probabilities(outputs):
            return bool(known) and bool(_inside(outputs))
        losses = (math.nan, math.nan)
        if labels is not None and loss is not None and loss.numel() == 1:
            rows = (as_logits(outputs.detach(), probable).float().flatten(0, -2) for probable in (False, True))
            first, second = (float(F.cross_entropy(row, labels.flatten(), ignore_index=IGNORED)) for row in rows)
            losses = (first, second)
        between = ((outputs > 0) & (outputs < 1)).sum()
        said = () if loss is None else (float(loss.mean()),)
        return _nearest(losses, said, otherwise=bool(between >= _ENOUGH))

    def logits(self, outputs: Tensor, probable: bool | None = None) -> Tensor:
        """Logits of at least two classes: of outputs that are logits of one, or probabilities.

        Args:
            outputs: Outputs, as for `read`.
            probable: Whether they are probabilities. Default: as the training outputs before.
        """
        known = self._probable if probable is None else probable
        if not known or outputs.shape[-1] > 1:
            return as_logits(outputs, bool(known))
        inside = _inside(outputs)
        if self._inside is not None:
            inside = self._inside.to(inside.device) & inside
        if torch.is_grad_enabled():
            self._inside = inside
        return torch.where(inside, as_logits(outputs, True), as_logits(outputs, False))

    def state_dict(self) -> dict[str, Any]:
        """What the outputs are, for `load_state_dict`."""
        still = self._probable and (self._inside is None or bool(self._inside))
        return {"probabilities": still, "first_class": self._saw_first_class}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        self._probable, self._inside = state_dict["probabilities"], None
        self._saw_first_class = state_dict["first_class"]

    def _classes(self, labels: Tensor, outputs: Tensor, one_output: bool) -> Tensor | None:
        """Labels as int64; ``None`` for distributions over the classes."""
        if labels.is_complex():
            raise NoClassesError("the labels are complex numbers, and no classes.")
        if labels.is_floating_point():
            if one_output:
                labels = labels.masked_fill(labels.isnan() | (labels == self.ignore_index), IGNORED)
                known = labels[labels != IGNORED]
                if not bool(((known == 0) | (known == 1)).all()):
                    raise NoClassesError("the labels are floating-point numbers other than 0 and 1: no classes.")
            elif labels.shape == outputs.shape and may_be_probabilities(labels):
                return None
            else:
                raise NoClassesError(f"the labels are {str(labels.dtype).removeprefix('torch.')} numbers: no classes.")
        labels = labels.long()
        if labels.ndim == outputs.ndim and labels.shape[-1] == 1 and labels.shape[:-1] == outputs.shape[:-1]:
            labels = labels.squeeze(-1)
        return labels

    def _without_ignored(self, labels: Tensor, num_outputs: int, look: bool) -> Tensor:
        num_classes = max(2, num_outputs)
        if self.ignore_index is not None:
            labels = labels.masked_fill(labels == self.ignore_index, IGNORED)
        outside = ((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)
        if look:
            self._refuse_outside(labels, outside, num_outputs)
        return labels.masked_fill(outside, IGNORED)

    def _refuse_outside(self, labels: Tensor, outside: Tensor, num_outputs: int) -> None:
        values, num_classes = labels[outside].unique().tolist(), max(2, num_outputs)
        if len(values) > 1 or (num_outputs == 1 and values == [2]):  # counts, and no two classes
            raise NoClassesError(
                f"the labels are no classes below {num_classes}, as the network has {num_outputs} outputs: they hold"
                f" {values[:4]}. Name the labels with `labels`, the part that returns logits with `network`, and"
                " what the loss ignores with `ignore_index`."
            )
        self._num_seen += int((labels != IGNORED).sum())
        self._saw_first_class = self._saw_first_class or bool((labels == 0).any())
        if self._saw_first_class or self._num_seen < _EACH * num_classes:
            return
        if values == [num_classes] or (values == [-1] and num_outputs <= 2):
            raise MiscountedError(
                f"the labels hold {values[0]} and never 0, as those of classes -1 and 1 do, and those counted from 1."
                f" Classes are counted from 0. If the loss ignores {values[0]}, set `ignore_index={values[0]}`."
            )


class OutputsOfPass:
    """What the outputs of a whole evaluation are: logits, if a single one of them cannot be a probability."""

    def __init__(self) -> None:
        self.outside = self.between = self.one_output = 0

    def see(self, outputs: Tensor) -> bool:
        """Look at those of a batch. Returns whether all until now can be probabilities."""
        self.one_output = int(outputs.shape[-1] == 1)
        if not self.outside:
            self.outside = int(not may_be_probabilities(outputs))
            self.between += int(((outputs > 0) & (outputs < 1)).sum())
        return not self.outside

    def sum_over_processes(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Give every rank the counts of all ranks."""
        counts = torch.tensor([self.outside, self.between, self.one_output])
        self.outside, self.between, self.one_output = reduce(counts).tolist()

    def are_probabilities(
        self,
        losses: tuple[float, float] = (math.nan, math.nan),
        said: Sequence[float] = (),
        in_training: bool | None = None,
    ) -> bool:
        """What they are, of which `see` alone is sure for more than one output.

        Args:
            losses: Cross-entropy if they are logits, and if they are probabilities.
            said: Losses that the module logged or returned.
            in_training: What the outputs of training are, where it is known.
        """
        if self.outside or not self.one_output:
            return not self.outside
        return _nearest(losses, said, otherwise=self.between >= _ENOUGH if in_training is None else in_training)


def as_logits(outputs: Tensor, probable: bool) -> Tensor:
    """Logits of at least two classes, of outputs that are logits, or probabilities."""
    one_output = outputs.shape[-1] == 1
    if probable:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        both = torch.cat([1 - outputs, outputs], -1) if one_output else outputs
        return both.clamp(min=torch.finfo(outputs.dtype).tiny).log()
    return torch.cat([torch.zeros_like(outputs), outputs], -1) if one_output else outputs


def may_be_probabilities(outputs: Tensor) -> bool:
    """Whether all lie in [0, 1], and those of each row of more than one add up to 1."""
    rows = outputs.detach().flatten(0, -2).float()
    if not len(rows) or not bool(_inside(rows)):
        return False
    return rows.shape[-1] == 1 or bool(((rows.sum(-1) - 1).abs() < 2e-2).all())  # also of 16 bits


def _inside(outputs: Tensor) -> Tensor:
    return ((outputs >= 0) & (outputs <= 1 + 1e-3)).all()


def _origin(outputs: Tensor) -> bool | None:
    """Whether a sigmoid or softmax has made them, or a linear layer; ``None`` where it is neither, or not known."""
    node = outputs.grad_fn
    while node is not None:
        name = node.name().rstrip("0123456789")
        if name in _SQUASHES or name in _LINEAR:
            return name in _SQUASHES
        if name.removesuffix("Backward") not in _PASSES or not node.next_functions:
            return None
        node = node.next_functions[0][0]
    return None


def _nearest(losses: tuple[float, float], said: Sequence[float], otherwise: bool) -> bool:
    """Which of two losses, by its position, is among those that the module says, if only one is."""
    near = [any(math.isclose(each, loss, rel_tol=1e-2, abs_tol=1e-4) for loss in said) for each in losses]
    return near[1] if near[0] != near[1] else otherwise


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
