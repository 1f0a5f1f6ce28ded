"""TemperatureCurriculum: agreement with a running mean of the model itself, at temperatures that change."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from forge_lightning.calibration.metrics import CalibrationMetric
from forge_lightning.core.callback import is_logging_step, uses_strategy
from forge_lightning.core.device import reads_are_free
from forge_lightning.core.distributed import sum_over_ranks
from forge_lightning.core.labels import loss_doubt
from forge_lightning.core.layers import network_modules
from forge_lightning.core.logit_tap import (
    SHIFT_DOUBT,
    fits_better_shifted,
    labels_of_places,
    logits_of,
    predicted_rows,
    share_of_rows,
)
from forge_lightning.core.loss_callback import Call, LogitLossCallback
from forge_lightning.temperature.functional import temperature_kl
from forge_lightning.temperature.schedule import TemperatureSchedule
from forge_lightning.temperature.teacher import EMATeacher


class TemperatureCurriculum(LogitLossCallback):
    r"""Train towards agreement with a running mean of the model's own weights, at temperatures that move through bins.

    The loss becomes ``(1 - weight) · loss + weight · τ² KL(teacher at τ ‖ model at τ)``, averaged over the tokens that
    have a label. Round 1 takes one bin of temperatures at a time, and moves on when the held-out likelihood there stops
    improving; round 2 draws from all bins, widened so that they overlap, in proportion to their held-out negative
    log-likelihood. Nothing is generated. Several validation loaders are taken together.

    Hook: a forward hook on the network; the module's ``training_step`` is wrapped while fitting, and its loss, with
    whatever it already holds, is what ``1 - weight`` scales. Under manual optimization that is the loss of the first
    backward pass after each call of the network.

    Reads: logits, labels, the batch's mask.
    Changes: the loss.
    Logs: at logging steps ``forge/temperature/temperature`` (τ), ``forge/temperature/kl`` (τ² KL, in nats),
    ``forge/temperature/weight``, ``forge/temperature/round`` and ``forge/temperature/bin`` (place of the bin in
    ``bins``); after each validation, of the model at the middle of each bin, ``forge/temperature/<low>-<high>/nll``,
    ``forge/temperature/<low>-<high>/ece``, ``forge/temperature/<low>-<high>/entropy`` and
    ``forge/temperature/<low>-<high>/p_correct`` (how often a sample would be right), and
    ``forge/temperature/accuracy``.

    Cost: a forward pass a step and the comparison of all logits, 41 % of a GPT-2-small step, 35 % of one with a
    vocabulary of 1,024, and with ``fraction=0.25`` 10 % of either; an fp32 copy of the trainable weights; in validation
    a softmax for each bin.

    When to use: a run that over-fits, and is to be more careful in what it says.

    When it does not help: the gain is that of agreeing with a mean of the weights, at whatever temperature. Where it
    was measured, averaging the weights gained as much, and a temperature fitted afterwards calibrated better; both cost
    next to nothing. A task that has to be grokked came much later (benchmarks/self_knowledge.md).

    Args:
        bins: ``(low, high)`` of the temperatures, in the order of round 1.
        weight: Share of the divergence in the loss, in [0, 1); 0 turns it off.
        teacher_decay: Decay of the running mean of the weights, in [0, 1).
        warmup_steps: Optimizer steps over which the weight rises from 0.
        fraction: Share of each batch's rows that is compared, in (0, 1]; they go round from step to step. What it costs
            shrinks with it. Where it was measured, 0.25 did as well as all.
        overlap: Share of a bin's width by which round 2 widens it at both ends. Widths are ratios.
        patience: Validations without improvement that end a bin of round 1.
        max_steps_per_bin: Optimizer steps of a bin of round 1 at most. Default: so many that round 1 takes half the
            training, where its length is known.
        network: Name of the submodule that returns logits, ``(B, V)`` or ``(B, T, V)``, from its inputs: only
            its weights have a running mean. Its last call before the loss counts. Default: the only part with
            parameters, or "model", "net", "network".
        labels: Key or position in the batch of the labels; "auto" for the usual names, or the last of a tuple; of a
            causal language model whose batch has none of these, the tokens of "input_ids" that ``mask`` calls real.
        mask: Key or position of the attention mask, for batches without a label for each token.
        shift: Whether the label of a position is what the position before it predicts, as where the labels are the
            tokens themselves. Default: true for causal language models of Hugging Face, else false.
        ignore_index: Label that the loss ignores, beside -100 and a number that is no class, as -1 or 255: 0 where that
            is padding.
        seed: Random seed for the temperatures.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if the network is not found; at the first step, if it returns no logits.

    References:
        Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015.
        Tarvainen and Valpola, `Mean teachers are better role models <https://arxiv.org/abs/1703.01780>`_, 2017.
    """

    namespace: ClassVar[str] = "temperature"

    def __init__(
        self,
        bins: Sequence[Sequence[float]] = ((2.0, 4.0), (1.0, 2.0), (0.5, 1.0)),
        weight: float = 0.5,
        teacher_decay: float = 0.995,
        warmup_steps: int = 100,
        fraction: float = 1.0,
        overlap: float = 0.1,
        patience: int = 2,
        max_steps_per_bin: int | None = None,
        network: str | None = None,
        labels: str | int | None = "auto",
        mask: str | int | None = "attention_mask",
        shift: bool | None = None,
        ignore_index: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(network, labels, mask, shift, ignore_index, name)
        if not 0 <= weight < 1:
            raise ValueError(f"`TemperatureCurriculum(weight={weight})` must be in [0, 1).")
        if not 0 <= teacher_decay < 1:
            raise ValueError(f"`TemperatureCurriculum(teacher_decay={teacher_decay})` must be in [0, 1).")
        if warmup_steps < 0:
            raise ValueError(f"`TemperatureCurriculum(warmup_steps={warmup_steps})` must be at least 0.")
        if not 0 < fraction <= 1:
            raise ValueError(f"`TemperatureCurriculum(fraction={fraction})` must be in (0, 1].")
        self.fraction = fraction
        self._new_schedule = partial(
            TemperatureSchedule, bins, overlap, patience, seed=seed, owner="TemperatureCurriculum"
        )
        # Refuses bad arguments here, where they were written.
        self._schedule = self._new_schedule(max_steps_per_bin=max_steps_per_bin)
        self.weight, self.teacher_decay, self.warmup_steps = weight, teacher_decay, warmup_steps
        self.max_steps_per_bin = max_steps_per_bin
        self._losses: tuple[Tensor, Tensor] | None = None  # cross-entropy and the module's own loss, to compare
        self._keys = [f"{low:g}-{high:g}" for low, high in self._schedule.bins]
        self._teacher: EMATeacher | None = None
        self._metrics: list[CalibrationMetric] = []

    @property
    def is_off(self) -> bool:
        """Whether the settings can never change a loss."""
        return self.weight == 0

    @property
    def temperature(self) -> float:
        """τ of the step under way."""
        return self._schedule.draw(self._step())[1]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.weight and uses_strategy(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
            raise self.refuse(
                type(trainer.strategy).__name__,
                "weights cannot be exchanged for their mean with it",
                "Use DDP, or `ModelParallelStrategy` (FSDP2).",
            )

    def find_network(self, pl_module: LightningModule) -> nn.Module:
        """The submodule that returns the logits, and whose weights have a running mean."""
        try:
            return super().find_network(pl_module)
        except MisconfigurationException as error:
            raise MisconfigurationException(
                f"{error} Only this submodule has a running mean: an encoder and its head belong into one module."
            ) from None

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self.find_network(pl_module)
        inside, trained = (
            [p.numel() for _, m in network_modules(part) for p in m.parameters(recurse=False) if p.requires_grad]
            for part in (network, pl_module)
        )
        if 0 < 2 * sum(inside) < sum(trained):
            self.warn_once(
                f"{type(network).__name__} holds {sum(inside):,} of the module's {sum(trained):,} trained weights, and"
                " only these have a running mean. Put it and what comes before it into one module, and name that with"
                " `network`."
            )
        others = [c.weight for c in trainer.callbacks if isinstance(c, TemperatureCurriculum)]  # type: ignore[attr-defined]
        if sum(others) >= 1:
            raise MisconfigurationException(
                f"`TemperatureCurriculum(weight=...)`: {len(others)} instances with {others} together leave nothing of"
                " the module's own loss. Their sum must be below 1."
            )
        self._teacher = EMATeacher(network, self.teacher_decay)
        self._schedule = self._new_schedule(max_steps_per_bin=self.max_steps_per_bin)
        super().attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._teacher is None:
            return
        try:
            self._teacher.begin()
        except ValueError as error:
            raise MisconfigurationException(f"`TemperatureCurriculum`: {error}") from None
        total = trainer.estimated_stepping_batches
        if self.max_steps_per_bin is None and math.isfinite(total):
            self._schedule.max_steps_per_bin = max(1, int(total) // (2 * len(self._schedule.bins)))

    def term(self, loss: Tensor, call: Call, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The divergence to the running mean in place of part of the loss."""
        assert self._teacher is not None
        if self.fraction < 1:
            call, labels, mask = share_of_rows(call, labels, mask, self.fraction, self._step())
        args, kwargs, logits = call
        taught = self._reader.logits(logits_of(self._teacher(*args, **kwargs)))
        targets, counts = labels_of_places(logits, labels, mask, self._shifted)
        if targets is not None and self._trainer is not None and is_logging_step(self._trainer):
            with torch.no_grad():
                self._losses = F.cross_entropy(logits.detach().flatten(0, -2).float(), targets), loss.detach()
        weight = self._weight_at(self._step())
        if counts is None or reads_are_free(logits.device):
            places = None if counts is None else counts.nonzero().squeeze(1)
            if places is not None and len(places) == 0:
                return None
            divergence = temperature_kl(logits, taught, self.temperature, places).mean()
            self.record("kl", divergence)
            return weight * (divergence - loss)
        # Choosing rows would wait for the device: those that do not count are compared too, and weigh nothing.
        divergences = temperature_kl(logits.flatten(0, -2), taught.flatten(0, -2), self.temperature)
        divergence = torch.where(counts, divergences, 0.0).sum() / counts.sum().clamp(min=1)
        self.record("kl", torch.where(counts.any(), divergence, torch.nan))
        return weight * torch.where(counts.any(), divergence - loss, 0.0)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._teacher is None:
            return
        if self._acted and is_logging_step(trainer):
            self._recorded.setdefault("kl", [torch.tensor(torch.nan, device=pl_module.device)])
        super().on_step_end(trainer, pl_module, outputs, batch)
        if not self._acted:
            return
        if is_logging_step(trainer):
            self._log_step(trainer)
        self._teacher.update()
        self._schedule.count_step()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = []
        if self._tap is not None:  # in the sanity check too, which only looks whether it could
            self._metrics = [self._metric(t).to(pl_module.device) for t in self._schedule.middles]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tap is not None and self._metrics:
            self._tap.start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tap is None or not self._metrics:
            return
        try:
            call = self._tap.take()
            if call is None:
                return
            logits, labels = self._read(batch, call[2])
            doubtful = batch_idx == 0 and not self._shifted and self.shift is None
            if doubtful and fits_better_shifted(logits, labels):
                self.warn_once(SHIFT_DOUBT)
            rows, labels = predicted_rows(logits, labels, self._reader.mask(batch), self._shifted)
        except ValueError as error:
            raise MisconfigurationException(f"`TemperatureCurriculum`: {error}") from None
        finally:
            self._tap.stop()
        if labels is not None:
            for metric in self._metrics:
                metric.update(rows, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._metrics:
            return
        for metric in self._metrics:
            metric.sum_over_processes(partial(sum_over_ranks, trainer))
        metrics_of_bins, self._metrics = self._metrics, []
        if metrics_of_bins[0].is_empty:
            self.warn_once(
                "validation has no labels that fit the logits, and the bins move on by steps alone. Set `labels`"
                ' ("input_ids" where all tokens are text to learn), and `network` to the submodule that returns the'
                " logits."
            )
            return
        if trainer.sanity_checking:
            return
        measured = [metric.compute() for metric in metrics_of_bins]
        self._schedule.observe([float(values["nll"]) for values in measured])
        metrics = {"accuracy": float(measured[0]["accuracy"])}
        for key, values in zip(self._keys, measured, strict=True):
            metrics |= {f"{key}/{name}": float(values[name]) for name in ("nll", "ece", "entropy", "p_correct")}
        self.log_metrics(trainer, metrics)

    def fit_state(self) -> dict[str, Any]:
        if self._teacher is None:
            return {}
        schedule, teacher = self._schedule.state_dict(), self._teacher.state_dict()
        return {"schedule": schedule, "teacher": teacher, **super().fit_state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        assert self._teacher is not None
        self._schedule.load_state_dict(state["schedule"])
        self._teacher.load_state_dict(state["teacher"])

    def detach(self) -> None:
        super().detach()
        self._metrics = []

    def _metric(self, temperature: float) -> CalibrationMetric:
        return CalibrationMetric(temperature, sync_on_compute=False)  # summed here

    def _step(self) -> int:
        return 0 if self._trainer is None else self._trainer.global_step

    def _weight_at(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.weight * ramp

    def _log_step(self, trainer: Trainer) -> None:
        if self._losses is not None:
            nll, loss = (float(value) for value in self._losses)
            if doubt := loss_doubt(nll, loss, "the loss of the step is"):
                self.warn_once(doubt, key="loss")
            self._losses = None
        step = self._step_before
        index, temperature = self._schedule.draw(step)
        metrics = {"temperature": temperature, "weight": self._weight_at(step)}
        self.log_metrics(trainer, metrics | {"round": float(self._schedule.round), "bin": float(index)})
