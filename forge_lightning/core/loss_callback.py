"""Bases of callbacks that add to the loss of any LightningModule."""

import math
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from forge_lightning.core.callback import ForgeCallback, is_logging_step, is_skipped
from forge_lightning.core.distributed import mean_over_ranks
from forge_lightning.core.hooks import compile_anew
from forge_lightning.core.labels import LabelReader, NoClassesError
from forge_lightning.core.logit_tap import LogitTap, find_network, is_shifted, predicted_rows
from forge_lightning.core.loss_terms import add_loss_term, no_backward, remove_loss_term

Call = tuple[Any, Any, Tensor]
"""Positional arguments, keyword arguments and logits of a network's call."""


class LossCallback(ForgeCallback):
    """Base of callbacks that add a term to the training loss.

    The module's ``training_step`` is wrapped while fitting, so that precision, gradient scaling, accumulation and
    strategies treat the sum as the module's own loss. A subclass defines `added`, and `is_off`, which keeps the module
    untouched. It sets ``_acted`` in the first `added` that has seen what it needs: a run in which that never happens
    ends at its first step with `why_idle`, rather than training without the term.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self._trainer: Trainer | None = None
        self._module: LightningModule | None = None
        self._batch: Any = None
        self._acted = False

    @property
    def is_off(self) -> bool:
        """Whether the settings can never change a loss."""
        return False

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once a fit starts, before the loss term is added to the module."""

    def added(self, loss: Tensor) -> Tensor | None:
        """What to add to the loss of one training step.

        Args:
            loss: The module's own loss, scalar, with gradient.

        Returns:
            Scalar with gradient; ``None`` for nothing.
        """
        raise NotImplementedError(f"`{type(self).__name__}` has to define `added`.")

    def why_idle(self, pl_module: LightningModule) -> tuple[str, str]:
        """Why `added` saw nothing to work with, and what to do."""
        return "its `training_step` has no loss", f"{no_backward(pl_module)}Return one."

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.is_off:
            return
        self._trainer, self._module, self._acted = trainer, pl_module, False
        self.attach(trainer, pl_module)
        add_loss_term(pl_module, self)

    def begin(self, batch: Any) -> None:
        self._batch = batch

    def end(self) -> None:
        self._batch = None

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._trainer is not None and not self._acted and not is_skipped(trainer, outputs):
            raise self.refuse(type(pl_module).__name__, *self.why_idle(pl_module))

    def detach(self) -> None:
        if self._module is not None:
            remove_loss_term(self._module, self)
        self._trainer = self._module = self._batch = None


class LogitLossCallback(LossCallback):
    """Base of callbacks whose loss term is a function of logits and labels.

    It finds the network that returns the logits, the labels in the batch, and the positions that count. A subclass
    defines `logit_loss`. With ``needs_labels`` a batch without labels is refused.

    Args:
        network: Name of the submodule that returns the logits. Default: the only child with parameters, or "model",
            "net" or "network".
        labels: Key or position of the labels in the batch, "auto" for the usual ones, ``None`` for no labels.
        mask: Key or position of the attention mask, ``(B, T)``; ``None`` for no mask.
        shift: Whether position ``t`` predicts the label of ``t + 1``. Default: true for causal language models of
            Hugging Face, false otherwise.
        ignore_index: Label that the loss ignores, in addition to -100.
        name: Tells two instances apart.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(
        self,
        network: str | None = None,
        labels: str | int | None = "auto",
        mask: str | int | None = "attention_mask",
        shift: bool | None = None,
        ignore_index: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.network, self.labels, self.mask, self.shift = network, labels, mask, shift
        self.ignore_index = ignore_index
        self._tap: LogitTap | None = None
        self._shifted = False
        self._reader = LabelReader()
        self._recorded: dict[str, list[Tensor]] = {}
        self._restored: dict[str, Any] = {}

    def logit_loss(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """The loss term.

        Args:
            logits: At the positions that have a label, ``(N, V)``, with gradient; without labels at those that the mask
                keeps.
            labels: ``(N,)`` int64; ``None`` where the batch has none, or not one class for each position.

        Returns:
            Scalar with gradient.
        """
        raise NotImplementedError(f"`{type(self).__name__}` has to define `logit_loss`.")

    def record(self, quantity: str, value: Tensor) -> None:
        """Log this step's ``forge/<callback>/<quantity>``: the mean over micro-batches and ranks, without NaN."""
        self._recorded.setdefault(quantity, []).append(value.detach().float().mean())

    def find_network(self, pl_module: LightningModule) -> nn.Module:
        """The submodule that returns the logits.

        Raises:
            MisconfigurationException: If it cannot be inferred, or does not exist.
        """
        try:
            return find_network(pl_module, self.network)
        except ValueError as error:
            raise MisconfigurationException(f"`{type(self).__name__}(network={self.network!r})`: {error}") from None

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self.find_network(pl_module)
        self._shifted = is_shifted(network) if self.shift is None else self.shift
        self._reader = LabelReader(self.labels, self.mask, self._shifted, self.ignore_index)
        self._tap = LogitTap(network)
        compile_anew()
        self._take_restored()

    def begin(self, batch: Any) -> None:
        super().begin(batch)
        assert self._tap is not None
        self._tap.start(with_gradient=True)

    def added(self, loss: Tensor) -> Tensor | None:
        assert self._tap is not None
        try:
            call = self._tap.take()
            if call is None:
                return None
            self._acted = True
            logits, labels = self._read(self._batch, call[2], loss.detach())
            return self.term(loss, (*call[:2], logits), labels, self._reader.mask(self._batch))
        except ValueError as error:
            raise MisconfigurationException(f"`{type(self).__name__}`: {error}") from None

    def term(self, loss: Tensor, call: Call, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The loss term of one step, for callbacks that need more than logits and labels.

        Args:
            loss: The module's own loss.
            call: How the network was called, and its logits, ``(B, V)``, ``(B, T, V)`` or ``(B · T, V)``.
            labels: ``(B,)`` or ``(B, T)``, -100 where a position has none; ``None`` without labels.
            mask: ``(B, T)`` or ``None``.
        """
        rows, labels = predicted_rows(call[2], labels, mask, self._shifted)
        if labels is None and self.needs_labels:
            raise ValueError("the batch has no labels of the usual names, or not one class for each. Set `labels`.")
        if not len(rows):
            return None
        term = self.logit_loss(rows, labels)
        if term.ndim:
            raise ValueError(f"`logit_loss` returned {tuple(term.shape)}, and must return a scalar.")
        return term

    def end(self) -> None:
        super().end()
        if self._tap is not None:
            self._tap.stop()

    def why_idle(self, pl_module: LightningModule) -> tuple[str, str]:
        assert self._tap is not None
        return (
            f"`training_step` did not call {type(self._tap.network).__name__} with a gradient",
            f"{no_backward(pl_module)}Set `network` to the name of the submodule that returns its logits.",
        )

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        super().on_step_end(trainer, pl_module, outputs, batch)
        recorded, self._recorded = self._recorded, {}
        if self._trainer is not None and is_logging_step(trainer):
            means = {quantity: torch.stack(values).nanmean().item() for quantity, values in recorded.items()}
            known = mean_over_ranks(trainer, {quantity: mean for quantity, mean in means.items() if mean == mean})
            if means := dict.fromkeys(means, math.nan) | known:
                self.log_metrics(trainer, means)

    def detach(self) -> None:
        super().detach()
        if self._tap is not None:
            self._tap.detach()
        self._tap, self._recorded = None, {}

    def fit_state(self) -> dict[str, Any]:
        """What a checkpoint holds: plain tensors, numbers, lists and dicts. Extend it together with `restore`."""
        return {"outputs": self._reader.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore from `fit_state`, once attached."""
        if "outputs" in state:
            self._reader.load_state_dict(state["outputs"])

    def state_dict(self) -> dict[str, Any]:
        return dict(self._restored) or self.fit_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        if self._tap is not None:  # some strategies restore after `on_fit_start`, others before
            self._take_restored()

    def _take_restored(self) -> None:
        restored, self._restored = self._restored, {}
        if restored:
            self.restore(restored)

    def _read(self, batch: Any, outputs: Tensor, loss: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        try:
            return self._reader.read(batch, outputs, loss)
        except NoClassesError as error:
            raise ValueError(
                f"{error} This loss term compares distributions over classes, and does nothing sensible on a"
                " regression. If the outputs are logits all the same, set `labels` to their labels, or to null."
            ) from None
