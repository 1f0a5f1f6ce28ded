"""RegressionGate: whether a run is worse or slower than one that was kept."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from forge_lightning.compression.gate import upper_bound
from forge_lightning.core.callback import ForgeCallback, is_dev_run
from forge_lightning.core.distributed import broadcast_from_rank_zero, current_rank
from forge_lightning.core.validate import require

_FORMAT = 1
_MOST_STEPS = 10_000


class RegressionGate(ForgeCallback):
    """Compare each validation's losses, example by example, and the CPU time of a step with those of a kept run.

    The same examples are found by their content, so that order, batch size and number of ranks may differ. A run is
    worse if the upper bound of the mean difference is above ``log(1 + max_rel_ppl)``. Without a baseline file the run's
    last validation writes one.

    Hook: ``on_validation_batch_end``; at the end of validations the losses of all ranks are gathered.

    Reads: ``example_loss``, ``(B,)``, which ``validation_step`` returns; the validation batches; CPU time.
    Changes: nothing, unless ``action`` is "stop" or "fail".
    Logs: after each validation ``forge/regression/loss_difference`` and ``forge/regression/loss_upper`` (nats), and
    ``forge/regression/step_ratio`` (median CPU seconds of a step by those of the baseline, of rank 0); NaN without a
    baseline.

    Cost: a hash of each validation example.

    When to use: a recipe that is changed again and again, and must not get worse unseen.

    When it does not help: losses of a run with another seed differ by more than most changes do: keep the seed, or a
    ``max_rel_ppl`` as wide as seeds differ. CPU time on a busy machine is noisy.

    Args:
        baseline: JSON file to compare with. Written where it does not exist.
        max_rel_ppl: Rise of the perplexity that is allowed, as a share of it, above 0.
        max_slowdown: Rise of the CPU time of a step that is allowed, as a share of it, above 0; ``null`` not to judge.
        confidence: Confidence of the bound, in (0.5, 1).
        action: "warn"; "stop" to end training after the validation; "fail" to raise an error at the end of the fit.
        name: Tells two instances apart.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At start, if the baseline file is malformed; at the end of a fit that was worse, with
            ``action="fail"``.
    """

    namespace: ClassVar[str] = "regression"

    def __init__(
        self,
        baseline: str = "baseline.json",
        max_rel_ppl: float = 0.02,
        max_slowdown: float | None = None,
        confidence: float = 0.95,
        action: Literal["warn", "stop", "fail"] = "warn",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        require("RegressionGate", max_rel_ppl > 0, "max_rel_ppl", max_rel_ppl, "above 0")
        slow = max_slowdown
        require("RegressionGate", slow is None or slow > 0, "max_slowdown", slow, "above 0, or null")
        require("RegressionGate", 0.5 < confidence < 1, "confidence", confidence, "in (0.5, 1)")
        require("RegressionGate", action in ("warn", "stop", "fail"), "action", action, "'warn', 'stop' or 'fail'")
        self.baseline, self.max_rel_ppl, self.max_slowdown = Path(baseline), max_rel_ppl, max_slowdown
        self.confidence, self.action = confidence, action
        self._before: dict[str, Any] | None = None
        self._losses: list[tuple[str, float]] = []
        self._hashes: list[str] = []
        self._values: list[Tensor] = []
        self._times: list[float] = []
        self._began: float | None = None
        self._worse: str | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._times, self._losses, self._worse = [], [], None
        found: tuple[dict[str, Any] | None, str | None] = (None, None)
        if trainer.is_global_zero:
            try:
                found = (self._read(), None)
            except MisconfigurationException as error:
                found = (None, str(error))
        self._before, error_of_rank_zero = broadcast_from_rank_zero(trainer, found)
        if error_of_rank_zero is not None:
            raise MisconfigurationException(error_of_rank_zero)

    def _read(self) -> dict[str, Any] | None:
        if not self.baseline.exists():
            return None
        try:
            found = json.loads(self.baseline.read_text())
            losses = {str(key): float(value) for key, value in found["losses"].items()}
            seconds = None if found["step_seconds"] is None else float(found["step_seconds"])
            if found["format"] != _FORMAT:
                raise ValueError(f"its format is {found['format']!r}, and this version reads {_FORMAT}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MisconfigurationException(
                f"`RegressionGate(baseline={str(self.baseline)!r})` is no baseline ({type(error).__name__}: {error})."
                " Remove the file, and the next run writes a new one."
            ) from None
        return {"losses": losses, "step_seconds": seconds}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._began is None:
            self._began = time.process_time()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self._began is not None and len(self._times) < _MOST_STEPS:
            self._times.append(time.process_time() - self._began)
        self._began = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hashes, self._values = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        losses = outputs.get("example_loss") if isinstance(outputs, Mapping) else None
        if not self._in_fit or trainer.sanity_checking or not isinstance(losses, Tensor):
            return
        hashes = _hashes(batch, len(losses))
        if hashes is not None:
            self._hashes += hashes
            self._values.append(losses.detach().float())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._in_fit or trainer.sanity_checking:
            return
        values = torch.cat(self._values).tolist() if self._values else []
        mine = list(zip(self._hashes, values, strict=True))
        self._hashes, self._values = [], []
        self._losses = _gathered(mine)
        if not self._losses:
            self.warn_once(
                "`validation_step` returns no `example_loss`, (B,), beside a batch of tensors: nothing is compared."
            )
        now = _means(self._losses)
        before = self._before
        difference, upper, ratio = math.nan, math.nan, math.nan
        if before is not None:
            shared = sorted(now.keys() & before["losses"].keys())
            if self._losses and len(shared) < 2:
                self.warn_once(
                    f"{self.baseline} was written for other validation data: {len(shared)} of its"
                    f" {len(before['losses'])} examples occur."
                )
            pairs = torch.tensor([now[key] - before["losses"][key] for key in shared], dtype=torch.float64)
            difference = float(pairs.mean()) if len(pairs) else math.nan
            upper = upper_bound(pairs, self.confidence)
            if before["step_seconds"] and self._times:
                ratio = median(self._times) / before["step_seconds"]
            ratio = broadcast_from_rank_zero(trainer, ratio)
        self.log_metrics(trainer, {"loss_difference": difference, "loss_upper": upper, "step_ratio": ratio})
        self._judge(trainer, upper, ratio, bool(self._losses))

    def _judge(self, trainer: Trainer, upper: float, ratio: float, compared: bool) -> None:
        reasons = []
        if self._before is not None and compared and math.isnan(upper):
            reasons.append("the losses cannot be compared: some are not finite, or too few are of the same examples")
        if upper > math.log1p(self.max_rel_ppl):
            reasons.append(f"perplexity may be {math.expm1(min(upper, 50)):.1%} above the baseline's")
        if self.max_slowdown is not None and ratio > 1 + self.max_slowdown:
            reasons.append(f"a step takes {ratio:.2f} times the baseline's CPU time")
        self._worse = "; ".join(reasons) or None
        if self._worse is None:
            return
        if self.action == "warn":
            self.warn_once(f"{self._worse} ({self.baseline}).", key="worse")
        elif self.action == "stop":
            trainer.should_stop = True
            self.warn_once(f"{self._worse} ({self.baseline}): training stops.", key="worse")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._before is None and self._losses and not is_dev_run(trainer) and trainer.is_global_zero:
            if all(math.isfinite(value) for _, value in self._losses):
                with self.reporting(str(self.baseline)):
                    self._write()
            else:
                self.warn_once(f"losses are not finite: {self.baseline} is not written.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._worse is not None and self.action == "fail":  # when all other callbacks have ended the training
            raise MisconfigurationException(f"`RegressionGate`: {self._worse} ({self.baseline}).")

    def _write(self) -> None:
        times = sorted(self._times)
        middle = median(times) if times else None
        spread = median(abs(value - middle) for value in times) if middle is not None else None
        content = {
            "format": _FORMAT,
            "losses": _means(self._losses),
            "step_seconds": middle,
            "step_seconds_spread": spread,
        }
        self.baseline.parent.mkdir(parents=True, exist_ok=True)
        part = self.baseline.with_name(self.baseline.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.baseline)

    def detach(self) -> None:
        self._began = None


def _hashes(batch: Any, size: int) -> list[str] | None:
    """A name for each example, of its content; ``None`` if the batch has no tensors with a place for each."""
    if isinstance(batch, Mapping):
        parts = [part for name, part in batch.items() if name != "sample_id"]
    else:
        parts = list(batch) if isinstance(batch, list | tuple) else []
    parts = [part.detach().cpu() for part in parts if isinstance(part, Tensor) and part.ndim and len(part) == size]
    if not parts:
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    real = mask.detach().cpu().bool() if isinstance(mask, Tensor) else None
    found = []
    for place in range(size):
        content = hashlib.sha256()
        for part in parts:
            own = part[place]
            if real is not None and part.shape == real.shape:  # how long the padding is depends on the others
                own = own[real[place]]
            if own.is_floating_point():
                own = own.float()  # whatever the precision of the run
            content.update(own.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(content.hexdigest()[:16])
    return found


def _means(losses: list[tuple[str, float]]) -> dict[str, float]:
    """Mean loss of each example; ranks may have seen one twice."""
    values: dict[str, list[float]] = {}
    for key, value in losses:
        values.setdefault(key, []).append(value)
    return {key: sum(found) / len(found) for key, found in sorted(values.items())}


def _gathered(mine: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Those of all ranks, on all ranks."""
    _, world_size = current_rank()
    if world_size == 1:
        return mine
    ranks: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(ranks, mine)
    return [pair for rank in ranks for pair in rank]
