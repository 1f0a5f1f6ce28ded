"""Estimate skill, and choose difficulties so that success stays in a band.

All work in float64 on the CPU, have their own random generator, and make the same choices on every rank that feeds them
the same outcomes.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_LEAST_LOG_SLOPE = -1.2  # flatter, and slips on easy examples would make hard ones look within reach
_MOST_AIMED = 4096  # items that the aim is computed from
_WIDEST_AIM = 6.0  # logits that the aim may be away from the target
_OFF = 4.0  # standard deviations from the others, from which on an outcome does not change the skill
_FEW = 8  # outcomes at least that "the others" are
_LEAST_LOG = -20.0  # logarithm of a probability of 0, where no other outcome was less likely
_UNITS = 10.0  # a range of difficulties is ten units wide, whatever it is called outside


class DifficultyPolicy(Protocol):
    """Chooses examples by what is known of the skill. ``arms`` are difficulties, levels, or items: see each."""

    def propose(self, count: int) -> Any:
        """The next ``count`` arms."""

    def update(self, arms: Any, success: Any) -> None:
        """Learn how it went: ``success`` in [0, 1] for each arm."""

    def expected(self, arms: Any) -> Floats:
        """Chance of success that the policy believes in."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict`."""


class SkillTracker:
    """One skill ``θ`` for all difficulties ``d``: success has the chance ``σ(a (θ - d))``.

    The posterior of ``θ`` and ``log a`` is Gaussian (Laplace's approximation, damped Newton steps), widened a little at
    every step for the drift of a learner, and much when outcomes surprise: when those of one step, or their discounted
    sum, are more than ``surprise`` standard deviations off, as after a jump of skill. Difficulties are drawn around the
    one whose chance is ``target``, from the posterior and with a spread of ``spread`` logits, which is what makes ``a``
    known; a share ``epsilon`` is drawn from the whole range.

    Args:
        low: Least difficulty.
        high: Greatest difficulty, above ``low``.
        target: Chance of success to aim at, in (0, 1).
        spread: Spread of the drawn difficulties in logits of success, at least 0.
        epsilon: Share drawn from the whole range, in [0, 1].
        drift: Variance that the skill may gain a step, in units of a tenth of the range, at least 0.
        surprise: Standard deviations at which outcomes count as a jump, above 0.
        seed: Random seed for the draws.

    Raises:
        ValueError: If an argument is out of range.

    References:
        The model is item-response theory's: Rasch, 1960; Birnbaum, 1968.
    """

    def __init__(
        self,
        low: float,
        high: float,
        target: float = 0.65,
        spread: float = 0.8,
        epsilon: float = 0.05,
        drift: float = 0.002,
        surprise: float = 3.5,
        seed: int = 0,
    ) -> None:
        if not low < high:
            raise ValueError(f"`low={low}` must be below `high={high}`.")
        _check(target=(target, 0 < target < 1, "in (0, 1)"), spread=(spread, spread >= 0, "at least 0"))
        _check(epsilon=(epsilon, 0 <= epsilon <= 1, "in [0, 1]"), drift=(drift, drift >= 0, "at least 0"))
        _check(surprise=(surprise, surprise > 0, "above 0"))
        self.low, self.high, self.target = low, high, target
        self.spread, self.epsilon, self.drift, self.surprise = spread, epsilon, drift, surprise
        self._rng = np.random.default_rng(seed)
        self._mean = np.array([_UNITS / 2, 0.0])  # θ, log a
        self._cov = np.diag([_UNITS**2 / 11, 0.25])
        self._error, self._variance = 0.0, 0.0  # discounted sums of surprise

    @property
    def skill(self) -> float:
        """``θ``, on the scale of the difficulties: that at which half of the outcomes are successes."""
        return self.low + float(self._mean[0]) * (self.high - self.low) / _UNITS

    @property
    def skill_error(self) -> float:
        """Its posterior standard deviation."""
        return math.sqrt(self._cov[0, 0]) * (self.high - self.low) / _UNITS

    def propose(self, count: int) -> Floats:
        """Difficulties, ``(count,)``, each in ``[low, high]``."""
        slope = math.exp(self._mean[1])
        center = self._mean[0] - _logit(self.target) / slope
        noise = math.hypot(self.spread / slope, min(math.sqrt(self._cov[0, 0]), _UNITS / 4))
        drawn = center + noise * self._rng.standard_normal(count)
        anywhere = self._rng.random(count) < self.epsilon
        drawn = np.where(anywhere, self._rng.uniform(0, _UNITS, count), drawn)
        for _ in range(4 if not anywhere.all() else 0):  # Newton: together they aim at the target, whatever was drawn
            p = _sigmoid(slope * (self._mean[0] - np.clip(drawn, 0, _UNITS)))
            rate = slope * float(np.sum(p * (1 - p) * ~anywhere)) / count
            shift = (float(np.mean(p)) - self.target) / max(rate, 0.02 * slope)
            if abs(shift * slope) < 0.01:
                break
            drawn = np.where(anywhere, drawn, drawn + min(1.0, max(-1.0, shift * slope)) / slope)
        return self.low + np.clip(drawn, 0, _UNITS) * (self.high - self.low) / _UNITS

    def expected(self, arms: Any) -> Floats:
        """Chance of success at each difficulty."""
        return _sigmoid(math.exp(self._mean[1]) * (self._mean[0] - self._units(arms)))

    def update(self, arms: Any, success: Any) -> None:
        """Learn from outcomes in [0, 1] at difficulties; those that are not finite are left out."""
        d, y = self._units(arms), np.asarray(success, dtype=float)
        if not (np.isfinite(y) & np.isfinite(d)).all():
            there = np.isfinite(y) & np.isfinite(d)
            d, y = d[there], y[there]
        if not len(d):
            return
        y = np.minimum(np.maximum(y, 0.0), 1.0)
        cov = self._cov.copy()
        cov[0, 0] += self.drift
        cov[1, 1] += 1e-4
        slope = math.exp(self._mean[1])
        p = _sigmoid(slope * (self._mean[0] - d))
        total = float((p * (1 - p)).sum())
        variance = total + (slope * total) ** 2 * float(cov[0, 0])
        error = float((y - p).sum())
        self._error, self._variance = 0.8 * self._error + error, 0.64 * self._variance + variance
        off = max(error**2 / (variance + 1e-9), self._error**2 / (self._variance + 1e-9))
        if off > self.surprise**2:
            cov[0, 0] += _UNITS**2 / 25
            self._error, self._variance = 0.0, 0.0
        self._fit(cov, d, y)

    def _fit(self, cov: Floats, d: Floats, y: Floats) -> None:
        """Newton's method for the most likely ``(θ, log a)``, written out for two numbers: they come at every step."""
        skill, log_slope = start = float(self._mean[0]), float(self._mean[1])
        p00, p01, p11 = _inverse(float(cov[0, 0]), float(cov[0, 1]), float(cov[1, 1]))
        h00, h01, h11 = p00, p01, p11
        for _ in range(4):
            slope = math.exp(log_slope)
            z = slope * (skill - d)
            p = _sigmoid(z)
            error, weight = y - p, np.maximum(p * (1 - p), 1e-4)
            weighted = weight * z
            h00 = p00 + slope * slope * float(weight.sum())
            h01, h11 = p01 + slope * float(weighted.sum()), p11 + float(weighted @ z)
            away = skill - start[0], log_slope - start[1]
            g0 = slope * float(error.sum()) - p00 * away[0] - p01 * away[1]
            g1 = float(error @ z) - p01 * away[0] - p11 * away[1]
            i00, i01, i11 = _inverse(h00, h01, h11)
            step = i00 * g0 + i01 * g1, i01 * g0 + i11 * g1
            longest = max(abs(step[0]), abs(step[1]), 1e-9)
            scale = min(1.0, 1.5 / longest)
            skill += scale * step[0]
            log_slope = min(2.0, max(_LEAST_LOG_SLOPE, log_slope + scale * step[1]))
            if longest < 1e-3:
                break
        skill = min(2.5 * _UNITS, max(-1.5 * _UNITS, skill))
        i00, i01, i11 = _inverse(h00, h01, h11)
        self._mean, self._cov = np.array([skill, log_slope]), np.array([[i00, i01], [i01, i11]])

    def _units(self, arms: Any) -> Floats:
        return (np.asarray(arms, dtype=float) - self.low) * _UNITS / (self.high - self.low)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "range": [self.low, self.high],
            "mean": self._mean.tolist(),
            "cov": self._cov.tolist(),
            "surprise": [float(self._error), float(self._variance)],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict`.

        Raises:
            ValueError: If it is of another range of difficulties.
        """
        if list(state["range"]) != [self.low, self.high]:
            raise ValueError(f"The state is of difficulties {state['range']}, and these are {[self.low, self.high]}.")
        self._mean, self._cov = np.array(state["mean"]), np.array(state["cov"])
        self._error, self._variance = state["surprise"]
        self._rng.bit_generator.state = state["rng"]


class ItemTracker:
    """A skill, and a difficulty for each of ``N`` items: success has the chance ``σ(θ + w·x_i + u_i)``.

    ``x_i`` are features that predict difficulty, with learned weights ``w``; ``u_i`` is what is left, an item's own,
    and grows uncertain again while the item is not seen. Outcomes enter by an extended Kalman filter: as 0 or 1, or,
    much better, as the probability that the model gives to the right answer. Items are drawn by how near a draw from
    their posterior is to an aim; a share ``epsilon`` is drawn from all. The aim is moved until the believed mean
    success of what is drawn is ``target``: items are more numerous on one side of it, and pull the mean there.

    With ``replace``, items are arms of a bandit that may be drawn again and again, as families of generated tasks are;
    without, a batch holds an item once.

    Args:
        features: ``(N, F)``, or ``(N,)`` for one; standardised here. Give ``(N, 0)`` where nothing is known.
        target: Chance of success to aim at, in (0, 1).
        replace: Draw with replacement.
        temperature: Logits of success by which drawn items may miss the target, above 0.
        epsilon: Share drawn from all items alike, in [0, 1].
        item_std: Prior standard deviation of ``u_i`` in logits, above 0.
        item_drift: Variance that ``u_i`` gains for each update that passes, at least 0.
        drift: Variance that ``θ`` gains for each update, at least 0.
        surprise: Standard deviations at which outcomes count as a jump of skill, above 0.
        seed: Random seed for the draws.

    Raises:
        ValueError: If an argument is out of range, or a feature is not finite.

    References:
        Explanatory item-response models: De Boeck and Wilson, 2004.
    """

    def __init__(
        self,
        features: Any,
        target: float = 0.65,
        replace: bool = False,
        temperature: float = 0.6,
        epsilon: float = 0.05,
        item_std: float = 1.5,
        item_drift: float = 0.01,
        drift: float = 0.002,
        surprise: float = 3.5,
        seed: int = 0,
    ) -> None:
        x = np.asarray(features, dtype=float)
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2 or len(x) < 1 or not np.isfinite(x).all():
            raise ValueError(f"`features` must be finite numbers, (N, F), with N at least 1; they are {x.shape}.")
        _check(target=(target, 0 < target < 1, "in (0, 1)"), temperature=(temperature, temperature > 0, "above 0"))
        _check(epsilon=(epsilon, 0 <= epsilon <= 1, "in [0, 1]"), item_std=(item_std, item_std > 0, "above 0"))
        _check(item_drift=(item_drift, item_drift >= 0, "at least 0"), drift=(drift, drift >= 0, "at least 0"))
        _check(surprise=(surprise, surprise > 0, "above 0"))
        self.target, self.replace, self.temperature, self.epsilon = target, replace, temperature, epsilon
        self.item_variance, self.item_drift, self.drift, self.surprise = item_std**2, item_drift, drift, surprise
        spread = x.std(0)
        self._x = (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)
        self._rng = np.random.default_rng(seed)
        count = x.shape[1]
        self._mean = np.array([0.0, *[-1.0] * count])  # θ, w: what a feature measures makes an item harder
        self._cov = np.diag([4.0, *[1.0] * count])
        self._own = np.zeros(len(x))
        self._own_variance = np.full(len(x), self.item_variance)
        self._least = _LEAST_LOG  # of all outcomes
        self._recent = [0.0] * (_FEW // 2)  # how far off the last were

    @property
    def skill(self) -> float:
        """``θ``: logit of success on an item of average features."""
        return float(self._mean[0])

    @property
    def skill_error(self) -> float:
        """Its posterior standard deviation."""
        return math.sqrt(self._cov[0, 0])

    def propose(self, count: int) -> Integers:
        """Items, ``(count,)``.

        Raises:
            ValueError: If more are asked for than there are, without ``replace``.
        """
        total = len(self._own)
        if count > total and not self.replace:
            raise ValueError(f"{count} different items were asked for, and there are {total}.")
        anywhere = self._rng.random(count) < self.epsilon
        steered = int(count - anywhere.sum())
        shape = (steered, total) if self.replace else (1, total)
        noise = 0.5 * np.sqrt(self._own_variance + self._cov[0, 0]) * self._rng.standard_normal(shape)
        score = -((self._logits() + noise - self._aim()) ** 2) / (2 * self.temperature**2)
        score = score + self._rng.gumbel(size=shape)
        if self.replace:
            chosen = np.empty(count, dtype=np.int64)
            chosen[~anywhere] = score.argmax(1)
            chosen[anywhere] = self._rng.integers(0, total, int(anywhere.sum()))
            return chosen
        best = np.argpartition(-score[0], max(0, steered - 1))
        rest = self._rng.choice(best[steered:], count - steered, replace=False)
        chosen = np.concatenate([best[:steered], rest]).astype(np.int64)
        return self._rng.permutation(chosen)

    def _aim(self) -> float:
        """The logit to draw around, so that the believed mean success of a batch is the target: by bisection."""
        every = max(1, len(self._own) // _MOST_AIMED)  # of many items, a part is enough
        logits = self._logits()[::every]
        variance = 0.25 * (self._own_variance[::every] + self._cov[0, 0]) + self.temperature**2
        chance = _sigmoid(logits)
        wanted = self.target
        if self.epsilon < 1:  # what is drawn from all items has a mean of its own
            wanted = (self.target - self.epsilon * float(chance.mean())) / (1 - self.epsilon)
        low, high = _logit(self.target) - _WIDEST_AIM, _logit(self.target) + _WIDEST_AIM
        for _ in range(20):
            middle = (low + high) / 2
            exponent = -((logits - middle) ** 2) / (2 * variance)
            weight = np.exp(exponent - exponent.max())
            below = float((weight * chance).sum() / weight.sum()) < wanted
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2

    def expected(self, arms: Any) -> Floats:
        """Chance of success at each item."""
        return _sigmoid(self._logits()[np.asarray(arms, dtype=np.int64)])

    def update(self, arms: Any, success: Any, soft: bool = False, is_log: bool = False) -> None:
        """Learn from outcomes; those that are NaN are left out.

        Args:
            arms: Items, ``(B,)``.
            success: 0 or 1 for each, or, with ``soft``, the probability of the right answer. One of 0 counts as the
                least of all so far.
            soft: Take logits of ``success`` as observed, with noise of variance 1. What is far from the other outcomes
                updates its item alone.
            is_log: With ``soft``, ``success`` holds logarithms of probabilities, at most 0.
        """
        i, y = np.asarray(arms, dtype=np.int64), np.asarray(success, dtype=float)
        if soft:
            with np.errstate(divide="ignore"):
                y = y if is_log else np.log(y)
            self._least = min(self._least, float(np.min(y, where=np.isfinite(y), initial=0.0)))
            y = np.where(np.isneginf(y), self._least, y)
        there = np.isfinite(y)
        i, y = i[there], y[there]
        if soft:
            y = _logit_of_log(y)
        self._own_variance = np.minimum(self._own_variance + self.item_drift, self.item_variance)
        if not len(i):
            return
        i, first, counts = np.unique(i, return_inverse=True, return_counts=True)
        y = np.bincount(first.ravel(), y) / counts  # an item that came several times is one observation, better known
        cov = self._cov + np.diag([self.drift, *[1e-5] * self._x.shape[1]])
        design = np.concatenate([np.ones((len(i), 1)), self._x[i]], 1)
        predicted = design @ self._mean + self._own[i]
        if soft:
            noise, residual = np.ones(len(i)) / counts, y - predicted
            self._recent = [*self._recent, *residual.tolist()][-max(_FEW, len(residual)) :]
            usual = float(np.median(self._recent))
            self._recent = self._recent[-_FEW:]
        else:
            p = _sigmoid(predicted)
            weight = np.maximum(p * (1 - p), 0.02)
            noise, residual = 1 / (weight * counts), (np.clip(y, 1e-6, 1 - 1e-6) - p) / weight
        own = noise + self._own_variance[i]
        shared = residual  # what the shared skill learns from
        if soft:  # an all but impossible answer updates its item, not the others
            shared = usual + np.clip(residual - usual, -_OFF * np.sqrt(own), _OFF * np.sqrt(own))
        unit = 1 / own
        toward = design.T @ unit
        if float(shared @ unit) ** 2 > self.surprise**2 * float(toward @ cov @ toward + unit.sum()):
            cov[0, 0] += 2.0
        # In the form of the few shared numbers, not of the many items.
        cov = np.linalg.inv(np.linalg.inv(cov) + (design.T * unit) @ design)
        step = cov @ (design.T @ (unit * shared))
        longest = math.inf if soft else 2.0  # far from where it was linearised, an outcome carries little information
        self._mean = self._mean + np.clip(step, -longest, longest)
        self._cov = (cov + cov.T) / 2
        share = self._own_variance[i] / own
        self._own[i] += np.clip(share * (residual - design @ step), -longest, longest)
        self._own_variance[i] *= 1 - share

    def _logits(self) -> Floats:
        found: Floats = self._mean[0] + self._x @ self._mean[1:] + self._own
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {
            "mean": self._mean.tolist(),
            "cov": self._cov.tolist(),
            "own": self._own.tolist(),
            "own_variance": self._own_variance.tolist(),
            "least": self._least,
            "recent": list(self._recent),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from `state_dict`.

        Raises:
            ValueError: If the number of items differs.
        """
        if len(state["own"]) != len(self._own):
            raise ValueError(f"The state has {len(state['own'])} items, and the data set {len(self._own)}.")
        self._mean, self._cov = np.array(state["mean"]), np.array(state["cov"])
        self._own, self._own_variance = np.array(state["own"]), np.array(state["own_variance"])
        self._least, self._recent = state.get("least", _LEAST_LOG), list(state.get("recent", self._recent))
        self._rng.bit_generator.state = state["rng"]


def _check(**arguments: tuple[float, bool, str]) -> None:
    for name, (value, ok, allowed) in arguments.items():
        if not ok:
            raise ValueError(f"`{name}={value}` must be {allowed}.")


def _inverse(a: float, b: float, c: float) -> tuple[float, float, float]:
    """Inverse of the symmetric ``[[a, b], [b, c]]``."""
    determinant = a * c - b * b
    return c / determinant, -b / determinant, a / determinant


def _sigmoid(x: Any) -> Floats:
    found: Floats = 1 / (1 + np.exp(-np.minimum(np.maximum(x, -30.0), 30.0)))
    return found


def _logit_of_log(log_p: Floats) -> Floats:
    """``log(p / (1 - p))`` of a logarithm; at most that of ``1 - 1e-6``."""
    log_p = np.minimum(log_p, -1e-6)
    found: Floats = log_p - np.log(-np.expm1(log_p))
    return found


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
