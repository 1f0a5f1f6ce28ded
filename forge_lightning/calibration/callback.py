"""Calibration: how far a model's probabilities can be trusted, and the temperature that would mend them."""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from forge_lightning.calibration.metrics import CalibrationMetric, FittedTemperature
from forge_lightning.core.callback import ForgeCallback, is_dev_run, loss_of_step, run_directory
from forge_lightning.core.distributed import broadcast_from_rank_zero, max_over_ranks, sum_over_ranks
from forge_lightning.core.hooks import compile_anew
from forge_lightning.core.labels import (
    LabelReader,
    MiscountedError,
    NoClassesError,
    OutputsOfPass,
    as_logits,
    loss_doubt,
)
from forge_lightning.core.logit_tap import (
    SHIFT_DOUBT,
    LogitTap,
    find_network,
    fits_better_shifted,
    given_labels,
    is_shifted,
    predicted_rows,
)
from forge_lightning.core.metric_names import VAL_LOSS

_LOSSES = re.compile("loss|bce|nll|entropy", re.IGNORECASE)
"""Names of metrics that may be the mean cross-entropy."""


class Calibration(ForgeCallback):
    """Measure calibration on validation and test data, and fit the temperature that would make it best.

    Hook: a forward hook on the network; validation and testing. Several loaders are taken together. The temperature is
    fitted on validation data; the next validation, and testing, measure the model with it too. It is kept in
    checkpoints, and handed to a module with an attribute ``fitted_temperature``, as `ForgeModule` has, which exports
    it. The bins of the reliability diagram are kept in ``calibration.json`` in the run directory.

    Reads: logits and labels; probabilities in place of logits, and one logit for two classes, are taken for what they
    are. Whether the one output of a network is a logit or a probability is said by what computes it in training, else
    by the losses that the module returns or logs, else by all outputs of a pass. A warning says where the cross-entropy
    is far from the logged validation loss.
    Changes: nothing.
    Logs: after validation and testing ``forge/calibration/nll`` (nats), ``forge/calibration/ece`` (expected calibration
    error), ``forge/calibration/brier``, ``forge/calibration/accuracy``, ``forge/calibration/entropy`` (nats),
    ``forge/calibration/nll_fitted`` and ``forge/calibration/ece_fitted`` (at the temperature that the validation before
    gave; NaN without one), and after validation ``forge/calibration/temperature`` (fitted, between 0.1 and 10; above 1
    for a model that is too sure).

    Cost: two softmaxes of all labelled tokens, and 17 of up to ``max_rows`` of a batch, in validation.

    When to use: wherever probabilities are to be believed.

    When it does not help: on regressions, which it does not measure. A fitted temperature makes probabilities honest,
    and changes no prediction and no weight.

    Args:
        num_bins: Bins of confidence.
        max_rows: Predictions of a batch that the temperature is fitted on; ``None`` for all.
        network: Name of the submodule that returns logits, ``(B, V)`` or ``(B, T, V)``. Default: the only one
            with parameters, or "model", "net", "network".
        labels: Key or position in the batch of the labels; "auto" for the usual names, or the last of a tuple; of a
            causal language model whose batch has none of these, the tokens of "input_ids" that "attention_mask" calls
            real.
        shift: Whether the label of a position is what the position before it predicts, as where the labels are the
            tokens themselves. Default: true for causal language models of Hugging Face, else false.
        ignore_index: Label that the loss ignores, beside -100 and a number that is no class, as -1 or 255: 0 where that
            is padding.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if the network is not found; in the sanity check, if the network returns no
            logits or the batch has no such labels. Later these are warnings, and nothing is measured.

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017.
    """

    namespace: ClassVar[str] = "calibration"

    def __init__(
        self,
        num_bins: int = 15,
        max_rows: int | None = 512,
        network: str | None = None,
        labels: str | int = "auto",
        shift: bool | None = None,
        ignore_index: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if num_bins < 1:
            raise ValueError(f"`Calibration(num_bins={num_bins})` must be at least 1.")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"`Calibration(max_rows={max_rows})` must be at least 1, or None.")
        self.num_bins, self.max_rows = num_bins, max_rows
        self.network, self.labels, self.shift, self.ignore_index = network, labels, shift, ignore_index
        self.fitted_temperature = math.nan
        self._seen_batch = False
        self._in_training: bool | None = None  # whether the outputs of training are probabilities
        self._tap: LogitTap | None = None
        self._reader = LabelReader()
        self._why_not = ""  # why nothing is measured
        self._shifted = False
        self._meters: dict[bool, _Meters] = {}  # of outputs taken as logits, and as probabilities
        self._outputs = OutputsOfPass()
        self._left_out = 0
        self._is_miscounted = False
        self._returned = [0.0, 0.0]  # sum of the losses that the steps return, and of their labels

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._attach(pl_module)  # before the network is compiled
        self._seen_batch = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._seen_batch:
            return
        self._seen_batch = True
        if self._tap is not None:
            self._tap.start(with_gradient=True)
        try:
            given_labels(batch, self.labels)
        except ValueError as error:
            self.warn_once(f"{error} That is a training batch; if those of validation are alike, nothing is measured.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In the first batch, find out whether outputs are logits or probabilities."""
        if self._tap is None or not self._tap.is_active:
            return
        with suppress(ValueError):  # which validation tells
            call = self._tap.take()
            if call is not None:
                self._reader.read(batch, call[2], loss_of_step(trainer, outputs))
                self._in_training = self._reader.are_probabilities
        self._tap.stop()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._tap is not None and (self._meters or trainer.sanity_checking):
            self._tap.start()

    on_test_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._tap is None or not (self._meters or trainer.sanity_checking):
            return
        measures = bool(self._meters)  # a sanity check only looks whether it could
        self._left_out += 1
        try:
            call = self._tap.take()
            if call is None:
                self._why_not = (
                    f"{type(self._tap.network).__name__} was not called itself, as `self.net(x)`, but perhaps one of"
                    " its methods or parts, whose outputs are not seen"
                )
                return
            labels = self._reader.classes(batch, call[2])
            probable = self._outputs.see(call[2])
            doubtful = measures and batch_idx == 0 and self.shift is None and not self._shifted
            if doubtful and fits_better_shifted(as_logits(call[2], probable), labels):
                self.warn_once(SHIFT_DOUBT, key="loss")
            rows, labels = predicted_rows(call[2], labels, None, self._shifted)
        except NoClassesError as error:
            self._why_not = str(error).rstrip(".")
            if isinstance(error, MiscountedError):  # as were those of the batches before
                self._is_miscounted = True
            return
        except ValueError as error:
            if not measures:
                raise MisconfigurationException(f"`Calibration`: {error}") from None
            self._why_not = str(error).rstrip(".")  # what only reports does not end a fit
            return
        finally:
            self._tap.stop()
        if labels is None:
            self._why_not = "the batch has no labels of the usual names, or not one class for each"
            return
        self._left_out -= 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._returned = [self._returned[0] + len(labels) * float(loss), self._returned[1] + len(labels)]
        for as_probabilities, meters in self._meters.items():
            if probable or not as_probabilities:
                meters.update(as_logits(rows, as_probabilities), labels)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self._finish(trainer, "val")
        if metrics is None:
            return
        if doubt := loss_doubt(metrics["nll"], _logged_loss(trainer), "the logged validation loss is"):
            self.warn_once(doubt, key="loss")
        module: Any = pl_module
        if hasattr(module, "fitted_temperature"):
            module.fitted_temperature = self.fitted_temperature
        if trainer.state.fn == "fit":
            self.log_metrics(trainer, metrics)
        else:
            self._log_result(pl_module, metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = self._finish(trainer, "test")
        if metrics is not None:
            self._log_result(pl_module, metrics)

    def reset(self) -> None:
        super().reset()
        self.fitted_temperature, self._in_training = math.nan, None

    def state_dict(self) -> dict[str, Any]:
        return {"fitted_temperature": self.fitted_temperature, "probabilities": self._in_training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fitted_temperature = state_dict["fitted_temperature"]
        self._in_training = state_dict.get("probabilities")

    def _attach(self, pl_module: LightningModule) -> None:
        self.detach()
        try:
            network = find_network(pl_module, self.network)
        except ValueError as error:
            raise MisconfigurationException(f"`Calibration(network={self.network!r})`: {error}") from None
        self._shifted = is_shifted(network) if self.shift is None else self.shift
        self._reader = LabelReader(self.labels, shifted=self._shifted, ignore_index=self.ignore_index)
        self._why_not = "no batch came"
        self._tap = LogitTap(network)
        compile_anew()

    def _begin(self, pl_module: LightningModule) -> None:
        if self._tap is None:
            self._attach(pl_module)
        self._outputs, self._left_out, self._returned = OutputsOfPass(), 0, [0.0, 0.0]
        self._is_miscounted = False
        self._meters = {
            kind: _Meters(self.fitted_temperature, self.num_bins, self.max_rows, pl_module.device)
            for kind in (False, True)
        }

    def _finish(self, trainer: Trainer, split: str) -> dict[str, float] | None:
        """Numbers to log, the same on all ranks; ``None`` in a sanity check, and without labels."""
        if not self._meters:
            return None
        meters, self._meters = self._meters, {}
        reduce = partial(sum_over_ranks, trainer)
        for kind in meters.values():
            kind.sum_over_processes(reduce)
        self._outputs.sum_over_processes(reduce)
        miscounted = max_over_ranks(trainer, self._is_miscounted)
        logged = trainer.callback_metrics.items()
        said = [float(value) for name, value in logged if _LOSSES.search(name) and not name.startswith("train")]
        if self._returned[1]:
            said.append(self._returned[0] / self._returned[1])
        losses = meters[False].nll, meters[True].nll
        probable = self._outputs.are_probabilities(losses, said, self._in_training)
        chosen = meters[broadcast_from_rank_zero(trainer, probable)]
        plain, fitted, fit = chosen.plain, chosen.fitted, chosen.fit
        if plain.is_empty or miscounted:
            why = self._why_not or "no label counts"
            self.warn_once(
                f'nothing is measured on {split} data: {why}. Name the labels with `labels` ("input_ids" where all'
                " tokens are text to learn), and the part that returns logits with `network`."
            )
            return None
        if self._left_out:
            count = f"batches of {split} data left out: {self._left_out}"
            self.warn_once(f"{count}, the last because {self._why_not}.", key="left out")
        values = {name: float(value) for name, value in plain.compute().items()}
        scaled = fitted.compute() if fitted is not None else {}
        metrics = {name: values[name] for name in ("nll", "ece", "brier", "accuracy", "entropy")}
        metrics |= {f"{name}_fitted": float(scaled.get(name, math.nan)) for name in ("nll", "ece")}
        before = self.fitted_temperature
        if split == "val":
            self.fitted_temperature = metrics["temperature"] = float(fit.compute()["temperature"])
            if not 1.001 * fit.low < self.fitted_temperature < 0.999 * fit.high:
                self.warn_once(
                    f"the fitted temperature is {self.fitted_temperature:.3g}, and the search goes from {fit.low:g} to"
                    f" {fit.high:g}. A model that knows nothing yet ends there; of one that does, do `labels`,"
                    " `network` and `shift` say what belongs together?"
                )
        with self.reporting("calibration.json"):
            self._keep(trainer, split, before, metrics, plain, fitted)
        return metrics

    def _log_result(self, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        for quantity, value in metrics.items():
            pl_module.log(self.metric_name(quantity), value, on_step=False, on_epoch=True)

    def _keep(
        self,
        trainer: Trainer,
        split: str,
        measured_at: float,
        metrics: dict[str, float],
        plain: CalibrationMetric,
        fitted: CalibrationMetric | None,
    ) -> None:
        folder = run_directory(trainer)
        if not trainer.is_global_zero or folder is None or is_dev_run(trainer):
            return
        path = folder / ("calibration.json" if self.name is None else f"calibration_{self.name}.json")
        kept = _json_object(path)
        bins = {"as it is": plain.reliability()} | ({} if fitted is None else {"fitted": fitted.reliability()})
        kept[split] = {
            "step": trainer.global_step,
            "measured_at": _number(measured_at),
            "fitted": _number(self.fitted_temperature),
            "metrics": {name: _number(value) for name, value in metrics.items()},
            "bins": {
                which: {name: getattr(found, name).tolist() for name in ("total", "confidence", "correct")}
                for which, found in bins.items()
            },
        }
        folder.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")  # a run that is killed must not leave half a file to its resumption
        whole.write_text(json.dumps(kept, indent=1) + "\n")
        whole.replace(path)

    def detach(self) -> None:
        if self._tap is not None:
            self._tap.detach()
        self._tap, self._meters = None, {}


class _Meters:
    """What is summed over a pass: as it is, at the temperature that is known, and for the one that is fitted."""

    def __init__(self, known: float, num_bins: int, max_rows: int | None, device: torch.device) -> None:
        self.plain = CalibrationMetric(num_bins=num_bins, sync_on_compute=False).to(device)
        self.fit = FittedTemperature(max_rows=max_rows, sync_on_compute=False).to(device)
        self.fitted = CalibrationMetric(known, num_bins, sync_on_compute=False).to(device) if known > 0 else None
        self._all = [metric for metric in (self.plain, self.fit, self.fitted) if metric is not None]

    @property
    def nll(self) -> float:
        return math.nan if self.plain.is_empty else float(self.plain.compute()["nll"])

    def update(self, logits: Tensor, labels: Tensor) -> None:
        for metric in self._all:
            metric.update(logits, labels)

    def sum_over_processes(self, reduce: Callable[[Tensor], Tensor]) -> None:
        for metric in self._all:
            metric.sum_over_processes(reduce)


def _logged_loss(trainer: Trainer) -> float:
    """The validation loss of the module; NaN where it logs none."""
    logged = trainer.callback_metrics
    return next((float(logged[name]) for name in VAL_LOSS if name in logged), math.nan)


def _json_object(path: Path) -> dict[str, Any]:
    """What a file holds; empty where it is missing, or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
