"""StageClassifier: which stage training is in."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from forge_lightning.callbacks.base import ForgeCallback, is_logging_step, last_logged, loss_of_step
from forge_lightning.components.stage_classifier import Observation, TrainingStage
from forge_lightning.components.stage_classifier import StageClassifier as Machine
from forge_lightning.protocols import SupportsEvents

_MOST_EVENTS = 1000


class StageClassifier(ForgeCallback):
    """Name the stage of training after every validation.

    Warm-up, memorisation, onset, generalisation, consolidation, plateau or divergence.

    Hooks: the end of every validation; a loss that is not finite is seen at the next of ``log_every_n_steps``. The
    stages are numbered 0 to 6 in this order; ``Grokfast(schedule="by_stage")`` reads the number. Place it behind
    `GeometryProbe`, whose falls of dimension it counts as the onset of generalisation. Same decision on all ranks.

    Reads: the mean training loss and success between validations (``loss`` and ``example_success`` of
    ``training_step``), the validation metrics, transitions found by `GeometryProbe`, the cosine logged by `Grokfast`,
    the gradient norm logged by it or by `Telemetry`.
    Changes: nothing.
    Logs: after every validation ``forge/stage/number`` and ``forge/stage/gap`` (training success minus validation
    success; where either is not known, of ``exp(-loss)``).

    When it does not help: a stage needs at least four validations, and is declared several after it began. The
    thresholds were set on small algorithmic tasks (`benchmarks/phases.md`). Without validation it tells only warm-up,
    plateau and divergence, and says so.

    Args:
        val_loss: Logged validation loss.
        val_success: Logged share of right validation answers; used where ``training_step`` returns ``example_success``.
        window: Validations that a trend spans, at least 4.
        patience: Validations in a row that must agree; twice as many to leave consolidation, or to go back.
        min_dwell: Validations that a stage lasts at least; divergence does not wait.
        solved: Success from which data counts as solved, in (0, 1).
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: After a validation that did not log ``val_loss``.
    """

    namespace: ClassVar[str] = "stage"

    def __init__(
        self,
        val_loss: str = "val/loss",
        val_success: str | None = "val/accuracy",
        window: int = 10,
        patience: int = 3,
        min_dwell: int = 3,
        solved: float = 0.95,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        try:
            self._machine = Machine(window, patience, min_dwell, solved)
        except ValueError as error:
            raise ValueError(f"`StageClassifier`: {error}") from None
        self.val_loss, self.val_success = val_loss, val_success
        self._events: list[dict[str, Any]] = []
        self._sums: dict[str, tuple[Any, int]] = {}
        self._restored: dict[str, tuple[Any, int]] = {}
        self._step_before, self._last_step = -1, -1
        self._warned = False

    @property
    def stage(self) -> str:
        """Name of the current stage."""
        return self._machine.stage.label

    @property
    def current(self) -> TrainingStage:
        """The current stage."""
        return self._machine.stage

    @property
    def events(self) -> list[dict[str, Any]]:
        """Changes of stage, oldest first: step, stage before and after, the reason, and the values it rests on."""
        return list(self._events)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums, self._restored = self._restored, {}
        self._step_before = -1
        self._publish(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = loss_of_step(trainer, outputs)
        if loss is not None:
            self._add("train_loss", loss)
        success = outputs.get("example_success") if isinstance(outputs, Mapping) else None
        if isinstance(success, Tensor):
            self._add("train_success", success.detach().float().mean())
        if trainer.global_step != self._step_before and is_logging_step(trainer):
            read = self._on_all_ranks(trainer, pl_module, {"train_loss": self._mean("train_loss")})["train_loss"]
            if "train_loss" in self._sums and not math.isfinite(read):
                self._update(trainer, Observation(trainer.global_step, read))
                self._sums = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or "train_loss" not in self._sums:
            return
        metrics = trainer.callback_metrics
        known = {"val_loss": float(self.read_metric(trainer, self.val_loss, "val_loss"))}
        if self.val_success in metrics and "train_success" in self._sums:
            known |= {"val_success": float(metrics[self.val_success]), "train_success": self._mean("train_success")}
        self._observe(trainer, pl_module, known)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation or "train_loss" not in self._sums:
            return
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "StageClassifier: there is no validation data. Warm-up, plateau and divergence are told apart, once an"
                " epoch; memorisation and generalisation cannot be."
            )
        self._observe(trainer, pl_module, {})

    def state_dict(self) -> dict[str, Any]:
        sums = {key: [float(total), count] for key, (total, count) in self._sums.items()}
        machine, events = self._machine.state_dict(), [dict(event) for event in self._events]
        return {"machine": machine, "events": events, "sums": sums, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._machine.load_state_dict(state_dict["machine"])
        self._events = [dict(event) for event in state_dict["events"]]
        self._restored = {key: (total, count) for key, (total, count) in state_dict["sums"].items()}
        self._sums = dict(self._restored)
        self._last_step = state_dict["last_step"]

    def _add(self, key: str, value: Tensor) -> None:
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = (total + value, count + 1)

    def _mean(self, key: str) -> float:
        total, count = self._sums.get(key, (math.nan, 1))
        return float(total) / count

    def _on_all_ranks(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> dict[str, float]:
        """Means over ranks: all of them must name the same stage."""
        if trainer.world_size == 1:
            return values
        row = torch.tensor(list(values.values()), dtype=torch.float32, device=pl_module.device)
        return dict(zip(values, trainer.strategy.reduce(row, reduce_op="mean").tolist(), strict=True))

    def _observe(self, trainer: Trainer, pl_module: LightningModule, known: dict[str, float]) -> None:
        known["train_loss"] = self._mean("train_loss")
        known["cosine"] = last_logged(trainer, "forge/grokfast/cosine")
        known["grad_norm"] = last_logged(trainer, "forge/grokfast/grad_norm_before", "forge/telemetry/grad_norm_before")
        known = self._on_all_ranks(trainer, pl_module, known)
        falls = [
            event
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, SupportsEvents) and isinstance(callback.events, list | tuple)
            for event in callback.events
            if isinstance(event, Mapping) and event.get("kind") == "geometry"
            if event["direction"] == "down" and event["last_layer"]
            if event["step"] > self._last_step
        ]
        self._update(trainer, Observation(trainer.global_step, fell=bool(falls), **known))
        self._last_step = trainer.global_step
        self._sums = {}
        evidence = self._machine.evidence
        metrics = {"number": float(self._machine.stage), "gap": evidence.get("gap", math.nan)}
        self.log_metrics(trainer, metrics)

    def _update(self, trainer: Trainer, observation: Observation) -> None:
        transition = self._machine.update(observation)
        if transition is not None:
            self._events = [*self._events, transition.as_event()][-_MOST_EVENTS:]
            self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        """For those who read the stage between validations."""
        trainer.callback_metrics[self.metric_name("number")] = torch.tensor(float(self._machine.stage))
