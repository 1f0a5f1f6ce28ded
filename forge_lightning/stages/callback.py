"""StageClassifier: which stage training is in."""

import math
from difflib import get_close_matches
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from forge_lightning.core.callback import (
    ForgeCallback,
    StepMeans,
    compute_metrics,
    events_of,
    is_logging_step,
    last_logged,
    publish,
)
from forge_lightning.core.distributed import gather_states, sum_over_ranks
from forge_lightning.core.logit_tap import is_shifted
from forge_lightning.core.metric_names import TRAIN_SUCCESS, VAL_LOSS, VAL_SUCCESS
from forge_lightning.stages.classifier import Observation, TrainingStage, is_fall
from forge_lightning.stages.classifier import StageClassifier as Machine

_MOST_EVENTS = 1000


class StageClassifier(ForgeCallback):
    """Name the stage of training after every validation.

    Warm-up, memorisation, onset, generalisation, consolidation, plateau or divergence.

    Hook: the end of every validation; a loss that is not finite is seen at the next of ``log_every_n_steps``. The
    stages are numbered 0 to 6 in this order; ``Grokfast(schedule="by_stage")`` reads the number. Place it behind
    `GeometryProbe`, whose falls of dimension it counts as the onset of generalisation. Same decision on all ranks.

    Reads: the mean training loss and success between validations (``loss`` and ``example_success`` of
    ``training_step``, or a logged "train/accuracy", "train_acc" and the like), the validation metrics, transitions
    found by `GeometryProbe`, the cosine logged by `Grokfast`, the gradient norm logged by it or by `Telemetry`.
    Changes: nothing.
    Logs: after every validation ``forge/stage/number`` and ``forge/stage/gap`` (training success minus validation
    success; where either is not known, of ``exp(-loss)`` of a cross-entropy, else NaN).

    Cost: 0.1 ms of CPU a step.

    When to use: to read runs, and to let `Grokfast` and `DreamReplay` act by the stage.

    When it does not help: a stage needs at least four validations, and is declared several after it began. The
    thresholds were set on small algorithmic tasks (`benchmarks/stages.md`). Without validation, or where success is
    unknown and the loss is no cross-entropy, it names only plateau and divergence, with a warning. Cosine and
    gradient norm are kept as evidence, and decide nothing.

    Args:
        val_loss: Logged validation loss; where it is not, "val_loss", "valid_loss", "validation_loss" and the like.
        val_success: Logged share of right validation answers; where it is not, "val_acc" and the like. Used where
            success of training is known too.
        window: Validations that a trend spans, at least 4.
        patience: Validations in a row that must agree; twice as many to leave consolidation, or to go back.
        min_dwell: Validations that a stage lasts at least; divergence does not wait.
        solved: Success from which data counts as solved, in (0, 1).
        cross_entropy: Whether losses are mean cross-entropies in nats, so that their exponential stands for success
            where that is unknown. Default: true for causal language models of Hugging Face, else false. A negative loss
            counts as another loss.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In the sanity check, if it logs no validation loss. Later that is a warning.
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
        cross_entropy: bool | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._new_machine = partial(Machine, window, patience, min_dwell, solved)
        try:
            self._machine = self._new_machine(cross_entropy=bool(cross_entropy))
        except ValueError as error:
            raise ValueError(f"`StageClassifier`: {error}") from None
        self.cross_entropy = cross_entropy
        self.val_loss, self.val_success = val_loss, val_success
        self._events: list[dict[str, Any]] = []
        self._means = StepMeans()
        self._resumed = False
        self._last_step = -1

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
        super().on_train_start(trainer, pl_module)
        if self.cross_entropy is None and not self._resumed:
            self._machine.cross_entropy = any(map(is_shifted, pl_module.modules()))
        if not self._resumed:
            self._means.clear()
        self._resumed = False
        self._publish(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._means.add(trainer, outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if is_logging_step(trainer):
            known = self._on_all_ranks(trainer, pl_module, {"train_loss": self._means.read("loss")})
            if known and not math.isfinite(known["train_loss"]):
                self._update(trainer, Observation(trainer.global_step, known["train_loss"]))
                self._means.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        name = next((n for n in (self.val_loss, *VAL_LOSS) if n in metrics), self.val_loss)
        if name not in metrics:
            try:
                self.read_metric(trainer, name, "val_loss")
            except MisconfigurationException as error:
                if trainer.sanity_checking:
                    raise
                self.warn_once(f"{error} Until then the stage stays what it is.", key="val_loss")
            return
        if trainer.sanity_checking:
            return
        val_loss = float(metrics[name])
        names = () if self.val_success is None else (self.val_success, *VAL_SUCCESS)
        val_success = next((float(metrics[n]) for n in names if n in metrics), math.nan)
        train_success = self._means.read("success")
        if math.isnan(train_success):
            train_success = next((float(metrics[n]) for n in TRAIN_SUCCESS if n in metrics), math.nan)
        if math.isnan(val_success) or math.isnan(train_success):
            val_success = train_success = math.nan
            if not self._machine.cross_entropy:
                self.warn_once(
                    "no success of both training and validation is known, and a loss that is no cross-entropy does not"
                    " show how far training is: only plateau and divergence are named. Return"
                    " `example_success` from `training_step` and log `val/accuracy`; or, if the loss is a mean"
                    " cross-entropy in nats, set `cross_entropy=True`.",
                    key="success",
                )
        if self.val_success not in (None, "val/accuracy", *trainer.callback_metrics):
            close = get_close_matches(str(self.val_success), list(trainer.callback_metrics), n=3)
            self.warn_once(
                f"nothing logs `val_success={self.val_success!r}`, and stages go by losses alone."
                + (f" Close: {close}." if close else "")
            )
        known = {"val_loss": val_loss, "train_success": train_success, "val_success": val_success}
        self._observe(trainer, pl_module, known)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            return
        self.warn_once(
            "there is no validation data. Only plateau and divergence are named, once an epoch; memorisation"
            " and generalisation cannot be."
        )
        compute_metrics(trainer)
        self._observe(trainer, pl_module, {})

    def reset(self) -> None:
        super().reset()
        self._machine = self._new_machine(cross_entropy=bool(self.cross_entropy))
        self._events, self._last_step = [], -1
        self._means.clear()

    def state_dict(self) -> dict[str, Any]:
        machine, events = self._machine.state_dict(), [dict(event) for event in self._events]
        means = gather_states(self._means.state_dict())
        return {"machine": machine, "events": events, "means": means, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._machine.load_state_dict(state_dict["machine"])
        self._events = [dict(event) for event in state_dict["events"]]
        self._means.load_state_dict(state_dict["means"])
        self._resumed = True
        self._last_step = state_dict["last_step"]

    def _on_all_ranks(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> dict[str, float]:
        """Means over the ranks that know a loss, as all must name the same stage; nothing where none does."""
        known = "loss" in self._means
        if trainer.world_size == 1:
            return values if known else {}
        row = torch.tensor([*(v if known else 0.0 for v in values.values()), float(known)], dtype=torch.float32)
        *sums, count = sum_over_ranks(trainer, row).tolist()
        return {key: total / count for key, total in zip(values, sums, strict=True)} if count else {}

    def _observe(self, trainer: Trainer, pl_module: LightningModule, known: dict[str, float]) -> None:
        known["train_loss"] = self._means.read("loss")
        known["cosine"] = last_logged(trainer, "forge/grokfast/cosine")
        known["grad_norm"] = last_logged(trainer, "forge/grokfast/grad_norm_before", "forge/telemetry/grad_norm_before")
        known = self._on_all_ranks(trainer, pl_module, known)
        if not known:
            if trainer.global_step > 0:
                self.warn_once(
                    "`training_step` has returned no loss since the last validation, and the stage stays the same."
                    " Return the loss, also under manual optimization."
                )
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        fell = any(
            event["step"] > self._last_step and is_fall(event)
            for callback in callbacks
            for event in events_of(callback)
        )
        self._update(trainer, Observation(trainer.global_step, fell=fell, **known))
        self._last_step = trainer.global_step
        self._means.clear()
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
        publish(trainer, {self.metric_name("number"): float(self._machine.stage)})
