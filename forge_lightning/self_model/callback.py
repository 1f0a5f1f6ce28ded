"""SelfModel: a head that predicts the network's own activations, on any LightningModule."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Muon

from forge_lightning.core.batch import field_of
from forge_lightning.core.callback import is_logging_step, uses_strategy
from forge_lightning.core.distributed import sum_over_ranks
from forge_lightning.core.loss_callback import LossCallback
from forge_lightning.core.loss_terms import no_backward
from forge_lightning.self_model.head import Form, SelfModelHead


class SelfModel(LossCallback):
    """Add to the loss the error of a small head that predicts the network's own activations.

    Hook: forward hooks on the layers; the module's ``training_step`` is wrapped while fitting. The head becomes the
    module's ``self_model_head`` in ``configure_model``, so that strategies, precision, clipping and checkpoints treat
    it as the module's own. Its weights are in the checkpoint and in the optimizer (where ``configure_optimizers``
    leaves them out, they join the first parameter group that takes them), and a run cannot be resumed without
    this callback; for inference, ``load_from_checkpoint(..., strict=False)`` leaves them out. Exported models do not
    have them. `ForgeModule` adds this callback itself where it is given ``self_model``.

    Reads: activations; the batch's mask.
    Changes: the loss.
    Logs: at logging steps ``forge/self_model/loss`` (mean error of the targets; 1 is that of a prediction of 0),
    ``forge/self_model/weight``, and for each target ``forge/self_model/<layer>/explained_variance`` (over the best
    constant; 1 is perfect, 0 no better) and ``forge/self_model/<layer>/copy_explained_variance`` (the same of the other
    trivial prediction, the source unchanged; NaN where widths differ); every ``watch_every_n_steps``,
    ``forge/self_model/<layer>/effective_rank``.

    Cost: 1.8 % of a GPT-2-small step, 7 % of one of a model of 2 M parameters.

    When to use: a run that over-fits without other regularisation; or to see which layers the final features predict.

    When it does not help: it regularises features, and helps at the end of a run that over-fits. At the best step of
    such a run, which early stopping takes, nothing was gained; a task that has to be grokked came later
    (benchmarks/self_knowledge.md).

    Args:
        form: "paper": what the output layer reads (the final features) predicts every layer of ``layers`` at the same
            position (the last real token, where it reads one vector for each example). "next_latent": the final
            features and the embedding of the next token predict the final features at the next position. "forward":
            every layer of ``layers`` predicts the one after it.
        layers: Names and patterns of modules, and fractions of the depth in [0, 1], or "all". "next_latent" takes none.
            Default: a quarter, half, three quarters and all of the depth, without the output layer.
        weight: Factor of the error in the loss, at least 0; 0 turns it off. Where it was measured, 3 held back
            over-fitting, and 10 learning.
        stop_gradient: Detach the targets. Without it they move towards the prediction too.
        warmup_steps: Optimizer steps over which the weight rises from 0.
        hidden_size: Width inside the predictor, at most that of what it predicts from.
        adaptive: Weigh layers in inverse proportion to their running errors, between 0.5 and 2, mean 1; on an
            accelerator to those one step before. What is logged as loss stays the plain mean.
        collapse_below: Divide the weight by 4 when the effective rank of a target falls below this share of the
            largest it had since the warm-up, in (0, 1); ``None`` never does. The rank falls by itself when a network
            finds a small circuit: to a quarter in runs that grok.
        watch_every_n_steps: Optimizer steps between measurements of the rank.
        output_layer: Name of the module that reads the final features. Default: the output embedding of a Hugging Face
            model, else the last ``nn.Linear``.
        width: Units of the layers. Default: inferred from the modules.
        mask: Key or position in the batch of the attention mask, ``(B, T)``; ``None`` for no mask.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if a layer is not found, its width cannot be inferred, or the module has a
            head of its own; at the first step, if activations do not fit the head.

    References:
        Premakumar et al., `Unexpected Benefits of Self-Modeling in Neural Systems <https://arxiv.org/abs/2407.10188>`_,
        2024.
    """

    namespace: ClassVar[str] = "self_model"

    def __init__(
        self,
        form: Form = "paper",
        layers: Sequence[float | str] | str | None = None,
        weight: float = 1.0,
        stop_gradient: bool = True,
        warmup_steps: int = 100,
        hidden_size: int = 256,
        adaptive: bool = False,
        collapse_below: float | None = 0.25,
        watch_every_n_steps: int = 50,
        output_layer: str | None = None,
        width: int | None = None,
        mask: str | int | None = "attention_mask",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._settings: dict[str, Any] = {
            "form": form,
            "layers": layers,
            "weight": weight,
            "stop_gradient": stop_gradient,
            "warmup_steps": warmup_steps,
            "hidden_size": hidden_size,
            "adaptive": adaptive,
            "collapse_below": collapse_below,
            "watch_every_n_steps": watch_every_n_steps,
        }
        self._off = self._new_head().is_off  # also refuses bad arguments here, where they were written
        self._root = ""  # the part of the module in which layers are named
        self.given_head: SelfModelHead | None = None
        """The head of the module that brought this callback; ``None`` for a callback of the Trainer."""
        self.output_layer, self.width, self.mask = output_layer, width, mask
        self.attribute = "self_model_head" if name is None else f"self_model_head_{name}"
        self._head: SelfModelHead | None = None
        self._restored: dict[str, Any] = {}
        self._wrapped: LightningModule | None = None  # the module whose `configure_model` also makes the head

    @classmethod
    def of_head(cls, head: SelfModelHead, root: str) -> "SelfModel":
        """A callback for the head that a module has as ``self_model_head``.

        It moves to the front of the Trainer's callbacks, so that others see what it logs.

        Args:
            head: Not attached yet, or from an earlier fit.
            root: Name of the submodule in which layers are named.
        """
        callback = cls(**head.settings)
        callback._root, callback.given_head = root, head
        return callback

    @property
    def is_off(self) -> bool:
        """Whether the settings can never change a loss."""
        return self._off

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._off:
            return
        if uses_strategy(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
            raise self.refuse(
                type(trainer.strategy).__name__,
                "it flattens or partitions weights before the head is there",
                "Use DDP, or `ModelParallelStrategy` (FSDP2).",
            )
        found = getattr(pl_module, self.attribute, None)
        if self.given_head is not None:  # a new list, because the Trainer is iterating over the old
            others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
            is_its_module = found is self.given_head
            vars(trainer)["callbacks"] = [self, *others] if is_its_module else others
            if not is_its_module:
                return  # another module is fitted with the same Trainer
        if isinstance(found, SelfModelHead) and found.targets:  # from an earlier fit
            try:
                found.take_settings(self._new_head())
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
            self._head = found
            return
        configure_model = pl_module.configure_model

        def and_head() -> None:
            vars(pl_module).pop("configure_model", None)
            configure_model()
            self._attach(pl_module)

        # The only hook between the model's making and the optimizer's; Lightning calls it for any other code than its
        # own, which a wrapper that says what it wraps would hide.
        pl_module.configure_model = and_head  # type: ignore[method-assign]
        self._wrapped = pl_module

    def preflight(self, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        if not self.is_off and isinstance(getattr(model, "self_model_head", None), SelfModelHead):
            raise second_head(type(model).__name__)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(pl_module)
        assert self._head is not None
        self._join_optimizer(trainer, self._head)

    def begin(self, batch: Any) -> None:
        super().begin(batch)
        assert self._head is not None
        self._head.start()

    def added(self, loss: Tensor) -> Tensor | None:
        assert self._head is not None
        assert self._trainer is not None
        mask = field_of(self._batch, self.mask)
        try:
            added = self._head.loss(step=self._trainer.global_step, mask=mask)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self._acted |= added is not None
        return added

    def end(self) -> None:
        super().end()
        if self._head is not None:
            self._head.stop()

    def why_idle(self, pl_module: LightningModule) -> tuple[str, str]:
        return (
            "no forward pass of `training_step` went through the layers that it predicts",
            f"{no_backward(pl_module)}Name layers that it uses with `layers`.",
        )

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        super().on_step_end(trainer, pl_module, outputs, batch)
        if self._head is None or not self._acted:
            return
        reduce = None if trainer.world_size == 1 else partial(sum_over_ranks, trainer)
        metrics = self._head.end_step(step=trainer.global_step, measure=is_logging_step(trainer), reduce=reduce)
        if metrics:
            self.log_metrics(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._restored) if self._head is None else self._head.running_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)
        if self._head is not None:
            self._head.load_running_state(state_dict)

    def detach(self) -> None:
        super().detach()
        if self._wrapped is not None:
            vars(self._wrapped).pop("configure_model", None)
            self._wrapped = None
        if self._head is not None:
            self._head.detach()

    def _new_head(self) -> SelfModelHead:
        try:
            head = SelfModelHead(**self._settings)
        except ValueError as error:
            raise ValueError(str(error).replace("`SelfModelHead(", "`SelfModel(")) from None
        head.owner = "SelfModel"
        return head

    def _attach(self, pl_module: LightningModule) -> None:
        found = getattr(pl_module, self.attribute, None)
        head = found if isinstance(found, SelfModelHead) else self._new_head()
        network = pl_module.get_submodule(self._root)
        hidden_size = getattr(getattr(network, "config", None), "hidden_size", None)
        try:
            head.attach(network, reads=self.output_layer, width=self.width, otherwise=hidden_size)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self._head = head
        if found is not head:
            setattr(pl_module, self.attribute, head)
        if pl_module.device_mesh is not None and not isinstance(head, FSDPModule):
            fully_shard(head, mesh=pl_module.device_mesh["data_parallel"])

    @torch.no_grad()
    def _join_optimizer(self, trainer: Trainer, head: SelfModelHead) -> None:
        """Before the optimizer's state is restored."""
        groups = [(optimizer, group) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        known = {id(p) for _, group in groups for p in group["params"]}
        for param in head.parameters() if groups else ():
            if id(param) in known:
                continue
            # Muon takes matrices alone.
            taking = (
                group
                for optimizer, group in groups
                if param.ndim == 2 or not (group.get("use_muon") or isinstance(optimizer, Muon))
            )
            found = next(taking, None)
            if found is None:
                raise self.refuse(
                    "an optimizer of matrices alone, as Muon",
                    "the predictor has vectors too",
                    "Use `MuonAdamW`, or a second optimizer.",
                )
            found["params"].append(param)


def second_head(module: str) -> MisconfigurationException:
    """The error for a module that is given ``self_model`` and meets a `SelfModel` in the Trainer too."""
    return MisconfigurationException(
        f"`SelfModel`: {module} has a head of its own, `self_model`, and this callback would be a second. Use one of"
        " the two (--model.self_model=null)."
    )
