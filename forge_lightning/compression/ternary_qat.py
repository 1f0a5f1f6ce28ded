"""TernaryQAT: training with weights of -1, 0 and 1."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from forge_lightning.compression.codecs.ternary import ternary
from forge_lightning.compression.ternary_forward import TernaryForward
from forge_lightning.core.callback import ForgeCallback, is_logging_step, uses_strategy
from forge_lightning.core.distributed import full_tensor
from forge_lightning.core.hooks import compile_anew
from forge_lightning.core.layers import block_list, network_modules, output_layer, plain_name, select_layers
from forge_lightning.core.validate import require


class TernaryQAT(ForgeCallback):
    r"""Train linear layers so that their weights may be rounded to -1, 0 and 1 times one scale a matrix.

    In the forward pass weights are ``γ · round(W / γ)``, clipped to one, with ``γ`` their mean absolute value, and
    activations 8-bit integers of the largest of their token. Gradients pass as if nothing were rounded, to weights that
    stay exact. ``lamb`` of the way to the rounded values is taken, after a ramp.

    Hook: the layers' ``forward`` is replaced while fitting, validating, testing and predicting, and given back after.
    Validation sees the rounded model; without a fit before, evaluation does so where a checkpoint of one is loaded.
    Weights in checkpoints are the exact ones.

    Reads: weights and inputs of the layers.
    Changes: the layers' outputs, and so all gradients.
    Logs: at logging steps ``forge/ternary/lamb``, ``forge/ternary/weight_error`` (of the rounded weights of all layers
    together, relative) and ``forge/ternary/zero_share``.

    Cost: rounding weights and activations at each forward pass, a few per cent of a step of a 17 M model on a CPU
    (benchmarks/compression.md). At a logging step each layer's weights are read once.

    When to use: a model that is to be stored in 1.6 bits a weight. `forge-fit export --ternary packed` writes it so.

    When it does not help: it is no faster in training, and where it was measured (17 M, 100 steps) the loss stayed a
    nat above that of plain fine-tuning. `EntropyGPTQ` needs no training, and keeps far more at 3 bits.

    Args:
        layers: Linear layers: "all" for those inside the blocks, without the output layer; or names and patterns of
            modules, whose linear layers are taken.
        lamb: How much of the way to the rounded values is taken, in [0, 1]; 0 turns it off.
        ramp_steps: Optimizer steps over which it rises from 0.
        activation_bits: Bits of the activations, 2 to 16; ``null`` to leave them exact.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if there is no linear layer, or two instances share one.

    References:
        Ma et al., `The Era of 1-bit LLMs <https://arxiv.org/abs/2402.17764>`_, 2024.
        Nielsen et al., `Continual Quantization-Aware Pre-Training <https://arxiv.org/abs/2502.11895>`_, 2025: the ramp.
    """

    namespace: ClassVar[str] = "ternary"

    def __init__(
        self,
        layers: str | Sequence[str] = "all",
        lamb: float = 1.0,
        ramp_steps: int = 0,
        activation_bits: int | None = 8,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        require("TernaryQAT", 0 <= lamb <= 1, "lamb", lamb, "in [0, 1]")
        require("TernaryQAT", ramp_steps >= 0, "ramp_steps", ramp_steps, "at least 0")
        bits = activation_bits
        require("TernaryQAT", bits is None or 2 <= bits <= 16, "activation_bits", bits, "2 to 16, or null")
        self.layers, self.lamb = layers, lamb
        self.ramp_steps, self.activation_bits = ramp_steps, activation_bits
        self._replaced: dict[str, nn.Linear] = {}
        self._share: Tensor | None = None
        self._lamb_now = 0.0

    @property
    def is_off(self) -> bool:
        """Whether the settings can never change a loss."""
        return self.lamb == 0

    def lamb_at(self, step: int) -> float:
        """λ of an optimizer step, counted from 0."""
        return self.lamb * min(1.0, (step + 1) / self.ramp_steps) if self.ramp_steps else self.lamb

    def find_layers(self, pl_module: LightningModule) -> dict[str, nn.Linear]:
        """The layers that are meant, by name.

        Raises:
            MisconfigurationException: If there are none.
        """
        try:
            inside = self._chosen(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"`TernaryQAT(layers={self.layers!r})`: {error}") from None
        found = {
            plain_name(name): part
            for name, part in network_modules(pl_module)
            if id(part) in inside and isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward
        }
        if not found:
            raise self.refuse(
                type(pl_module).__name__, "there is no `nn.Linear` among its `layers`", "Name layers that hold some."
            )
        return found

    def _chosen(self, pl_module: LightningModule) -> set[int]:
        if self.layers != "all":
            names = [self.layers] if isinstance(self.layers, str) else self.layers
            return {id(part) for layer in select_layers(pl_module, names).values() for part in layer.modules()}
        stack = block_list(pl_module)
        if stack is not None:
            return {id(part) for part in stack.modules()}
        last = {id(output_layer(pl_module))}
        return {id(part) for _, part in network_modules(pl_module)} - last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.is_off and uses_strategy(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
            raise self.refuse(
                type(trainer.strategy).__name__,
                "it keeps parameters where a layer's forward cannot read them whole",
                "Use DDP, or `ModelParallelStrategy` (FSDP2).",
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._attach(trainer, pl_module)
        self._set(trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._set(trainer.global_step)  # which a checkpoint has changed

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._set(trainer.global_step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not self._replaced or not is_logging_step(trainer):
            return
        error, zeros, squares, count = 0.0, 0.0, 0.0, 0
        for layer in self._replaced.values():
            weight = full_tensor(layer.weight.detach()).float()
            rounded = ternary(weight)
            error += float((rounded - weight).square().sum())
            squares += float(weight.square().sum())
            zeros += float((rounded == 0).sum())
            count += weight.numel()
        metrics = {"weight_error": (error / max(squares, 1e-30)) ** 0.5, "zero_share": zeros / count}
        self.log_metrics(trainer, {"lamb": self.lamb_at(self._step_before), **metrics})

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_off or self._replaced or (trainer.state.fn != "fit" and self._lamb_now == 0):
            return
        found = self.find_layers(pl_module)
        taken = next((name for name, layer in found.items() if "forward" in vars(layer)), None)
        if taken is not None:
            raise MisconfigurationException(
                f"`TernaryQAT(layers={self.layers!r})`: the forward pass of {taken} is replaced already, by another"
                " instance or library. Name other `layers`."
            )
        self._share = torch.full((), self._lamb_now, device=pl_module.device)
        for layer in found.values():
            vars(layer)["forward"] = TernaryForward(layer, self._share, self.activation_bits)
        self._replaced = found
        compile_anew()

    def _set(self, step: int) -> None:
        if self._share is not None:
            self._lamb_now = self.lamb_at(step)
            self._share.fill_(self._lamb_now)

    def reset(self) -> None:
        super().reset()
        self._lamb_now = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"lamb": self._lamb_now}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lamb_now = state_dict["lamb"]

    @torch.no_grad()
    def round_weights(self, pl_module: LightningModule) -> dict[str, nn.Linear]:
        """Replace weights by their rounded values, as an export wants them.

        Returns:
            The layers, by name.
        """
        found = self.find_layers(pl_module)
        for layer in found.values():
            layer.weight.copy_(ternary(layer.weight.float()))
        return found

    def detach(self) -> None:
        for layer in self._replaced.values():
            vars(layer).pop("forward", None)
        if self._replaced:
            compile_anew()
        self._replaced, self._share = {}, None
