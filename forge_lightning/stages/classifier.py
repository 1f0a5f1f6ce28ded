"""A state machine that names the stage of training from validation results."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from itertools import pairwise
from statistics import median
from typing import Any

from forge_lightning.core.metric_names import VAL_LOSS, VAL_SUCCESS, plain_metric
from forge_lightning.core.trace import number


class TrainingStage(IntEnum):
    """What training is doing. The numbers are those of ``Grokfast(stage_lambs=...)``."""

    UNKNOWN = 0
    """Not known yet: too few validations, or nothing is learned that shows."""
    MEMORISATION = 1
    """Training data is fitted, validation data is not."""
    ONSET = 2
    """Memorised, and a first sign that this will change: the dimension falls, or validation begins to improve."""
    GENERALISATION = 3
    """Validation improves: grokking, where memorisation came before."""
    CONSOLIDATION = 4
    """Training and validation are both solved."""
    PLATEAU = 5
    """Neither moves."""
    DIVERGENCE = 6
    """The loss is not finite, or has left for good what had been reached."""

    @property
    def label(self) -> str:
        """The name in lower case."""
        return self.name.lower()


@dataclass(frozen=True)
class Observation:
    """What is known at one validation. Losses in nats; successes are shares in [0, 1]; NaN where unknown."""

    step: int
    train_loss: float
    val_loss: float | None = None
    """``None`` where unknown; NaN is a loss that is not finite."""
    train_success: float = math.nan
    """``exp(-loss)`` where NaN."""
    val_success: float = math.nan
    cosine: float = math.nan
    grad_norm: float = math.nan
    fell: bool = False
    """The geometry probe reported a fall of the last layer's dimension since the observation before."""


@dataclass(frozen=True)
class Transition:
    """A change of stage, and what it rests on."""

    step: int
    before: TrainingStage
    after: TrainingStage
    reason: str
    evidence: dict[str, float] = field(default_factory=dict)

    def as_event(self) -> dict[str, Any]:
        """A plain record."""
        return asdict(self) | {"kind": "stage", "before": self.before.label, "after": self.after.label}


@dataclass(frozen=True)
class _Trend:
    """Change of a series over the window, and its standard error."""

    change: float
    error: float

    def rises(self, floor: float, sure: float = 4.0) -> bool:
        """Whether it rises by more than the floor, and than so many standard errors."""
        return self.change > max(floor, sure * self.error)

    def falls(self, floor: float, sure: float = 4.0) -> bool:
        """Whether it falls so."""
        return self.change < -max(floor, sure * self.error)

    def is_still(self, floor: float) -> bool:
        """Whether there is no sign of a change; true if the series is too short."""
        return abs(self.change) < max(floor, self.error)


def _inflation(x: list[float]) -> float:
    """Factor of a slope's standard error where neighbouring values are alike: of a first-order autoregression."""
    n = len(x)
    if n < _FEWEST:
        return 1.5
    steps = [b - a for a, b in pairwise(x)]
    steps = [s - median(steps) for s in steps]  # without the trend
    spread = sum(s * s for s in steps)
    if spread == 0:
        return 1.0
    # The correlation of neighbouring steps of such a series is (rho - 1) / 2.
    rho = 1 + 2 * sum(a * b for a, b in pairwise(steps)) / spread
    rho = min(0.9, max(0.0, rho))
    return math.sqrt((1 + rho) / (1 - rho))


@dataclass
class _Kept:
    """What the classifier remembers beside its series.

    Args:
        candidate: Number of the stage that observations point to; -1 for none.
        streak: Observations in a row that point to it.
        dwell: Observations in the current stage.
        count: Observations so far.
        since_spike: Observations since the loss last spiked.
        spikes: Recent spikes of the loss.
        first_train: First training loss.
        first_val: First validation loss.
        best_train: Highest training success.
        lost: Observations in a row far below it.
        peak_val_loss: Highest recent validation loss since memorisation.
        floor_val: Lowest validation success since memorisation.
        memorised: Whether training data has been memorised.
        fell: Whether the dimension has fallen since.
        negative: Whether a loss was negative.
        scale: Size of the first loss.
    """

    candidate: int = -1
    streak: int = 0
    dwell: int = 0
    count: int = 0
    since_spike: int = 99
    spikes: int = 0
    first_train: float = math.nan
    first_val: float = math.nan
    best_train: float = 0.0
    lost: int = 0
    peak_val_loss: float = 0.0
    floor_val: float = math.nan
    memorised: bool = False
    fell: bool = False
    negative: bool = False
    scale: float = math.nan


class StageClassifier:
    """Stage by thresholds on successes and by robust trends, entered only after it was found several times in a row.

    Trends are Theil-Sen slopes over ``window`` observations; one counts if it exceeds both a floor and four standard
    errors, which grow with the correlation of neighbouring values. Where a trend is neither clear nor absent, the stage
    stays what it was. So noise is no stage: a constant with 2 % of training and 1 % of validation noise, correlated by
    0.5, gives a plateau, and in 200 validations 0.05 further changes. An observation whose training loss jumps far
    above its recent median is a spike: the stage is held and the spike kept out of the trends.

    Args:
        window: Observations that a trend spans, at least 4.
        patience: Observations in a row that must agree before the stage changes; twice as many to declare an onset that
            rests on trends alone, to go back to an earlier stage, or to leave consolidation.
        min_dwell: Observations that a stage lasts at least; divergence does not wait.
        solved: Success from which data counts as solved, in (0, 1).
        cross_entropy: Whether losses are mean cross-entropies in nats, whose exponential is a likelihood. Other
            losses have no known lower end: without successes, only plateau and divergence are named. A
            negative loss is taken for such a loss.
    """

    def __init__(
        self,
        window: int = 10,
        patience: int = 3,
        min_dwell: int = 3,
        solved: float = 0.95,
        cross_entropy: bool = False,
    ) -> None:
        for argument, value, least in (("window", window, 4), ("patience", patience, 1), ("min_dwell", min_dwell, 0)):
            if value < least:
                raise ValueError(f"`{argument}={value}` must be at least {least}.")
        if not 0 < solved < 1:
            raise ValueError(f"`solved={solved}` must be in (0, 1).")
        self.window, self.patience, self.min_dwell, self.solved = window, patience, min_dwell, solved
        self.cross_entropy = cross_entropy
        self.stage = TrainingStage.UNKNOWN
        self.evidence: dict[str, float] = {}
        self._series: dict[str, deque[float]] = {key: deque(maxlen=4 * window) for key in _SERIES}
        self._kept = _Kept()

    def update(self, now: Observation) -> Transition | None:
        """Take the next observation; returns the change of stage that it completes."""
        val_loss = math.nan if now.val_loss is None else now.val_loss
        if not self._kept.negative and min(now.train_loss, val_loss if math.isfinite(val_loss) else 0.0) < -1e-3:
            self._kept.negative, self.cross_entropy = True, False
            self._kept.memorised, self._kept.fell = False, False
            for series in self._series.values():
                series.clear()
        train = now.train_success if math.isfinite(now.train_success) else self._likelihood(now.train_loss)
        val = now.val_success if math.isfinite(now.val_success) else self._likelihood(val_loss)
        blind = math.isnan(val) or math.isnan(train)
        if not math.isfinite(now.train_loss) or not (now.val_loss is None or math.isfinite(val_loss)):
            self.evidence = {"train_loss": now.train_loss, "val_loss": val_loss, "grad_norm": now.grad_norm}
            return self._move(now, TrainingStage.DIVERGENCE, "a loss is not finite", self.evidence, 1)
        self._kept.fell = self._kept.fell or (self._kept.memorised and now.fell)
        if self._is_spike(now.train_loss):
            self._kept.spikes, self._kept.since_spike = self._kept.spikes + 1, 0
            if self._kept.spikes < 3 * self.window:
                return None  # the stage is held, and the series stay as they were
        self._kept.spikes, self._kept.since_spike = max(0, self._kept.spikes - 1), self._kept.since_spike + 1
        self._kept.count += 1
        self._kept.dwell += 1
        values = {"train_loss": self._log(now.train_loss), "val_loss": self._log(val_loss), "train": train, "val": val}
        for key, value in values.items():
            if math.isfinite(value):
                self._series[key].append(value)
        if self._kept.count == 1:
            self._kept.first_train, self._kept.first_val = train, val
        train, val = self._recent("train"), self._recent("val")
        candidate, reason, evidence = self._judge(now, train, val, blind)
        if candidate == TrainingStage.CONSOLIDATION and self.stage < TrainingStage.GENERALISATION:
            candidate = TrainingStage.GENERALISATION  # however quick it was
        success = "likelihood" if math.isnan(now.val_success) else "success"  # what a loss is judged by
        if not blind:
            evidence |= {f"train_{success}": train, f"val_{success}": val, "gap": train - val}
        evidence |= {"cosine": now.cosine, "grad_norm": now.grad_norm}
        self.evidence = evidence
        needed = self.patience
        back = candidate < self.stage <= TrainingStage.CONSOLIDATION
        if (
            back
            or (candidate == TrainingStage.ONSET and not self._kept.fell)
            or self.stage == TrainingStage.CONSOLIDATION
        ):
            needed *= 2
        return self._move(now, candidate, reason, evidence, needed)

    def _judge(
        self, now: Observation, train: float, val: float, blind: bool
    ) -> tuple[TrainingStage, str, dict[str, float]]:
        self._kept.best_train = max(self._kept.best_train, train)  # NaN is not larger
        self._kept.lost = self._kept.lost + 1 if train < self._kept.best_train - 0.3 else 0
        if self._kept.lost >= 2 * self.window:
            return TrainingStage.DIVERGENCE, "training success has left what it had reached", {}
        if self._kept.count <= self.patience:
            return TrainingStage.UNKNOWN, "the first observations", {}
        of_train, of_val, of_success, of_fit = (self._trend(key) for key in ("train_loss", "val_loss", "val", "train"))
        trends = {"train_trend": of_train.change, "train_trend_se": of_train.error}
        trends |= {"val_trend": of_val.change, "val_trend_se": of_val.error}
        trends |= {"val_success_trend": of_success.change, "val_success_trend_se": of_success.error}
        train_improves = of_train.falls(0.03) or of_fit.rises(0.03)
        floors = ((of_train, 0.03), (of_fit, 0.03), (of_val, 0.02), (of_success, 0.02))
        still = all(trend.is_still(floor) for trend, floor in floors)
        val_improves, val_worsens, rises = of_val.falls(0.02), of_val.rises(0.02), of_success.rises(0.02)
        if blind:
            if train_improves or val_improves or still:
                stage = TrainingStage.PLATEAU if still and not val_improves else TrainingStage.UNKNOWN
                what = "no success is known" if now.val_loss is not None else "no validation"
                return stage, f"{what}; the loss {'stands still' if stage else 'improves'}", trends
            return self.stage, "no clear trend", trends
        if now.val_loss is None:
            val_improves = rises  # nothing else is known
        knew = self.stage in (TrainingStage.GENERALISATION, TrainingStage.CONSOLIDATION)
        gap = train - val
        if train >= self.solved and val >= self.solved:
            return TrainingStage.CONSOLIDATION, f"training and validation success are at least {self.solved:g}", trends
        if train >= 0.8 and gap > 0.3:
            self._kept.fell = self._kept.fell or now.fell
            # What was memorised and begins to generalise leaves its floor too, which chance does not.
            begins = of_success.rises(0.02, sure=2.5) and (of_val.falls(0.02, sure=2.5) or now.val_loss is None)
            return self._judge_memorised(train, val, val_worsens, begins, knew, trends)
        if self._kept.memorised and val >= 0.5 * self._kept.best_train:
            return TrainingStage.GENERALISATION, "the gap that memorisation left is closing", trends
        if self._kept.memorised and train < 0.8:
            return self.stage, "a dip of what was fitted", trends
        if (rises or val_improves) and val > max(self._kept.first_val + 0.03, 0.5 * train):
            return TrainingStage.GENERALISATION, "validation improves with training", trends
        if train_improves and train > self._kept.first_train + 0.1 and not rises:
            return TrainingStage.MEMORISATION, "training improves and validation does not", trends
        if train_improves or val_improves:
            return TrainingStage.UNKNOWN, "little is learned yet", trends
        if still:
            return TrainingStage.PLATEAU, "neither training nor validation moves", trends
        return self.stage, "no clear trend", trends

    def _judge_memorised(
        self, train: float, val: float, val_worsens: bool, rises: bool, knew: bool, trends: dict[str, float]
    ) -> tuple[TrainingStage, str, dict[str, float]]:
        if not self._kept.memorised:
            self._kept.memorised, self._kept.peak_val_loss, self._kept.floor_val = True, -math.inf, val
        level = self._recent("val_loss")
        self._kept.peak_val_loss = (
            max(self._kept.peak_val_loss, level) if math.isfinite(level) else self._kept.peak_val_loss
        )
        self._kept.floor_val = min(self._kept.floor_val, val)
        below = 1 - math.exp(level - self._kept.peak_val_loss) if math.isfinite(self._kept.peak_val_loss) else 0.0
        trends |= {"val_loss_below_peak": below, "fell": float(self._kept.fell)}
        if val >= 0.5 * train and (knew or val > self._kept.floor_val + 0.1):  # from below, not on its way down
            return TrainingStage.GENERALISATION, "validation success has passed half of training success", trends
        if self._kept.fell:
            return TrainingStage.ONSET, "the dimension of the last layer has fallen", trends
        if rises and val > self._kept.floor_val + 0.1:
            return TrainingStage.ONSET, "validation success rises and its loss falls", trends
        if val > self._kept.floor_val + 0.15 and below > 0.1:
            return TrainingStage.ONSET, "validation success has left its floor, and its loss its peak", trends
        if below > 0.15 and not val_worsens and self._kept.since_spike > 5 and val > self._kept.floor_val + 0.02:
            return TrainingStage.ONSET, "validation loss has come down from its peak", trends
        return TrainingStage.MEMORISATION, "training is fitted, validation is not", trends

    def _move(
        self, now: Observation, candidate: TrainingStage, reason: str, evidence: dict[str, float], needed: int
    ) -> Transition | None:
        self._kept.streak = self._kept.streak + 1 if candidate == self._kept.candidate else 1
        self._kept.candidate = int(candidate)
        waits = self._kept.dwell < self.min_dwell and candidate != TrainingStage.DIVERGENCE
        if candidate == self.stage or self._kept.streak < needed or waits:
            return None
        transition = Transition(now.step, self.stage, candidate, reason, dict(evidence))
        self.stage, self._kept.dwell = candidate, 0
        if candidate in (TrainingStage.UNKNOWN, TrainingStage.PLATEAU):
            self._kept.memorised, self._kept.fell = False, False
        return transition

    def _is_spike(self, loss: float) -> bool:
        recent = list(self._series["train_loss"])[-self.window :]
        if len(recent) < 4:
            return False
        middle = median(recent)
        spread = 1.4826 * median(abs(x - middle) for x in recent) + 0.05
        jump = self._log(loss) - middle
        return jump > max(6 * spread, math.log(2)) and (loss > 0.1 or self._kept.negative)

    def _likelihood(self, loss: float) -> float:
        """Likelihood of a mean cross-entropy; NaN for any other loss."""
        return math.exp(-loss) if self.cross_entropy and math.isfinite(loss) and loss > -700 else math.nan

    def _log(self, loss: float) -> float:
        """A loss on a scale on which trends are alike: its logarithm; of negative ones a multiple of the first."""
        if not math.isfinite(loss):
            return math.nan
        if not self._kept.negative:
            return math.log(max(loss, 1e-6))
        if math.isnan(self._kept.scale):
            self._kept.scale = max(abs(loss), 1e-12)
        return loss / self._kept.scale

    def _recent(self, key: str) -> float:
        last = list(self._series[key])[-3:]
        return median(last) if last else math.nan

    def _trend(self, key: str) -> "_Trend":
        x = list(self._series[key])[-self.window :]
        n = len(x)
        if n < 4:
            return _Trend(0.0, math.inf)
        slope = median((x[j] - x[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
        # As of a least-squares slope: residuals around the line through the medians, n points one apart.
        center = median(x[i] - slope * i for i in range(n))
        residual = math.sqrt(sum((x[i] - slope * i - center) ** 2 for i in range(n)) / (n - 2))
        error = n * residual / math.sqrt(n * (n * n - 1) / 12)
        return _Trend(slope * n, error * _inflation(list(self._series[key])))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "stage": int(self.stage),
            "series": {key: list(values) for key, values in self._series.items()},
            "numbers": {f"_{name}": value for name, value in asdict(self._kept).items()}
            | {"cross_entropy": self.cross_entropy},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stage = TrainingStage(state["stage"])
        for key, values in state["series"].items():
            self._series[key].clear()
            self._series[key].extend(values)
        numbers = state["numbers"]
        self.cross_entropy = numbers["cross_entropy"]
        self._kept = _Kept(**{f.name: numbers[f"_{f.name}"] for f in fields(_Kept)})


_FEWEST = 12  # values that an autocorrelation is estimated from
_SERIES = ("train_loss", "val_loss", "train", "val")


def is_fall(event: Mapping[str, Any]) -> bool:
    """Whether an event is a fall of the dimension of the last layer that a probe looks at."""
    return event["kind"] == "geometry" and event.get("direction") == "down" and bool(event.get("last_layer", True))


def observations(rows: Iterable[Mapping[str, Any]]) -> list[Observation]:
    """What a classifier would have seen, from the rows of a trace, as `read_rows` gives them."""
    found: list[Observation] = []
    losses: list[float] = []
    successes: list[float] = []
    fell, fresh = False, True
    cosine = norm = math.nan
    for row in rows:
        given = row.get("metrics")
        metrics = {plain_metric(k): number(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
        if row.get("kind") == "event":
            fell = fell or is_fall({**row, "kind": row.get("event")})
        elif row.get("kind") == "step":
            if fresh and "forge/telemetry/loss" in metrics:
                losses, successes, fresh = [], [], False  # those since the last validation, where there are any
            losses += [metrics[k] for k in ("forge/telemetry/loss",) if k in metrics]
            successes += [metrics[k] for k in ("forge/telemetry/success",) if k in metrics]
            cosine = metrics.get("forge/grokfast/cosine", cosine)
            norm = metrics.get("forge/telemetry/grad_norm_before", norm)
        elif row.get("kind") == "validation" and metrics and losses and isinstance(row.get("step"), int):
            val_loss = next((metrics[k] for k in VAL_LOSS if k in metrics), None)
            val = next((metrics[k] for k in VAL_SUCCESS if k in metrics), math.nan)
            both = bool(successes) and not math.isnan(val)
            found.append(
                Observation(
                    step=row["step"],
                    train_loss=sum(losses) / len(losses),
                    val_loss=val_loss,
                    train_success=sum(successes) / len(successes) if both else math.nan,
                    val_success=val if both else math.nan,
                    cosine=cosine,
                    grad_norm=norm,
                    fell=fell,
                )
            )
            fell, fresh = False, True
    return found


def replay(rows: Iterable[Mapping[str, Any]], **options: Any) -> list[Transition]:
    """The transitions of a recorded run, found again.

    As online, where every step was recorded; else training is judged by the steps that were.
    """
    classifier = StageClassifier(**options)
    return [t for now in observations(rows) if (t := classifier.update(now)) is not None]
