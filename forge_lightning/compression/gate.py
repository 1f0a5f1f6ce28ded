"""The gate: whether a compressed model is, with confidence, not worse than allowed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from forge_lightning.core.validate import require


def upper_bound(
    differences: Tensor, confidence: float = 0.95, method: Literal["t", "bootstrap"] = "t", seed: int = 0
) -> float:
    """One-sided upper confidence bound of a mean.

    Args:
        differences: One number for each sequence, ``(N,)``.
        confidence: Confidence of the bound, in (0.5, 1).
        method: "t" for Student's distribution, "bootstrap" for quantiles of 10,000 resampled means.
        seed: Random seed for the bootstrap.

    Returns:
        The bound; NaN for fewer than two numbers, or where one is not finite.

    Example:
        >>> round(upper_bound(torch.tensor([0.0, 0.02, 0.01, 0.03])), 4)
        0.0302
    """
    values = differences.double()
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.nan
    if method == "bootstrap":
        generator = torch.Generator().manual_seed(seed)
        means = torch.cat(
            [values[torch.randint(len(values), (500, len(values)), generator=generator)].mean(1) for _ in range(20)]
        )
        return float(means.quantile(confidence))
    error = float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) + t_quantile(confidence, len(values) - 1) * error


def t_quantile(share: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection of its integral.

    Args:
        share: In (0.5, 1).
        degrees: Degrees of freedom, at least 1.

    Example:
        >>> round(t_quantile(0.95, 3), 3)
        2.353
    """
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    # With x = √n tan(a) the integral of the density from 0 is that of a power of the cosine.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        angles = torch.linspace(0, middle, 2001, dtype=torch.float64)
        integral = float(torch.trapezoid(angles.cos() ** (degrees - 1), angles)) * constant * math.sqrt(degrees)
        low, high = (middle, high) if integral < share - 0.5 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Args:
        accepted: Whether the stage stands.
        reason: Why, in words.
        mean: Mean difference of the loss, in nats a token.
        upper: Its upper bound.
        limit: What the bound had to stay below.
        num_sequences: Sequences that were compared.
        byte_gain: Share of the bytes that was saved.
        pass_rates: Share of problems solved before and after, where that was asked for.
    """

    accepted: bool
    reason: str
    mean: float
    upper: float
    limit: float
    num_sequences: int
    byte_gain: float
    pass_rates: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """Accept a stage only where its cost is known to be small, and it saves bytes.

    The same held-out sequences are judged before and after, so that their own difficulty cancels. The upper bound of
    the mean difference has to stay below ``log(1 + max_rel_ppl)``: that no difference was found is not enough.

    Args:
        max_rel_ppl: Rise of the perplexity that is allowed, as a share of it, above 0.
        confidence: Confidence of the bound, in (0.5, 1).
        sequences: Held-out sequences, at least 2; fewer where the validation data has no more.
        min_byte_gain: Share of the model's bytes that a stage has to save, at least 0.
        method: "t" for Student's distribution, "bootstrap" for resampled means.
        max_pass_drop: With data of programming problems: drop of the share of problems solved (greedy, executed in the
            sandbox) that is allowed, in [0, 1].
        problems: Problems that are tried for it, at least 1.
        seed: Random seed for the bootstrap.

    Raises:
        ValueError: If an argument is out of range.
    """

    max_rel_ppl: float = 0.02
    confidence: float = 0.95
    sequences: int = 128
    min_byte_gain: float = 0.02
    method: Literal["t", "bootstrap"] = "t"
    max_pass_drop: float | None = None
    problems: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        require("Gate", self.max_rel_ppl > 0, "max_rel_ppl", self.max_rel_ppl, "above 0")
        require("Gate", 0.5 < self.confidence < 1, "confidence", self.confidence, "in (0.5, 1)")
        require("Gate", self.sequences >= 2, "sequences", self.sequences, "at least 2")
        require("Gate", self.min_byte_gain >= 0, "min_byte_gain", self.min_byte_gain, "at least 0")
        require("Gate", self.method in ("t", "bootstrap"), "method", self.method, "'t' or 'bootstrap'")
        drop = self.max_pass_drop
        require("Gate", drop is None or 0 <= drop <= 1, "max_pass_drop", drop, "in [0, 1]")
        require("Gate", self.problems >= 1, "problems", self.problems, "at least 1")

    @property
    def limit(self) -> float:
        """What the bound has to stay below, in nats a token."""
        return math.log1p(self.max_rel_ppl)

    def judge(
        self,
        before: Tensor,
        after: Tensor,
        bytes_before: int,
        bytes_after: int,
        pass_rates: Sequence[float] | None = None,
    ) -> Verdict:
        """Compare losses of the same sequences, and bytes.

        Args:
            before: Mean loss of each sequence without the stage, in nats a token, ``(N,)``.
            after: Losses with it, ``(N,)``.
            bytes_before: Bytes of the model without the stage.
            bytes_after: Bytes with it.
            pass_rates: Share of problems solved without and with it.
        """
        difference = after.double() - before.double()
        upper = upper_bound(difference, self.confidence, self.method, self.seed)
        gain = 1 - bytes_after / bytes_before
        reasons = []
        if not upper < self.limit:
            reasons.append(
                f"perplexity may rise by {_percent(upper)} ({self.confidence:.0%} bound), and {self.max_rel_ppl:.1%} is"
                " allowed"
                if math.isfinite(upper)
                else "a loss is not finite"
            )
        if gain < self.min_byte_gain:
            reasons.append(f"it saves {gain:.1%} of the bytes, and {self.min_byte_gain:.1%} is asked for")
        if pass_rates is not None and self.max_pass_drop is not None:
            drop = pass_rates[0] - pass_rates[1]
            if drop > self.max_pass_drop:
                reasons.append(
                    f"{pass_rates[1]:.1%} of the problems are solved, before {pass_rates[0]:.1%}; a drop of"
                    f" {self.max_pass_drop:.1%} is allowed"
                )
        accepted = not reasons
        if accepted:
            reasons = [f"perplexity rises by {_percent(upper)} at most, and {gain:.1%} of the bytes are saved"]
        return Verdict(
            accepted,
            "; ".join(reasons),
            float(difference.mean()),
            upper,
            self.limit,
            len(difference),
            gain,
            None if pass_rates is None else (pass_rates[0], pass_rates[1]),
        )


def _percent(nats: float) -> str:
    return f"{math.expm1(min(nats, 50)):.2%}" if nats < 5 else "more than a hundredfold"
