"""Which codec for which matrix: the least expected loss at a number of bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Candidate:
    """A matrix as one codec writes it.

    Args:
        codec: Number of the codec in the stage's list.
        num_bytes: What it takes.
        error: Expected rise of the loss, in nats a token.
    """

    codec: int
    num_bytes: int
    error: float


Choice = dict[str, Candidate]


def best_at(candidates: Mapping[str, Sequence[Candidate]], price: float) -> Choice:
    """For each matrix the candidate with the least error plus ``price`` times its bytes."""
    return {
        name: min(options, key=lambda option: (option.error + price * option.num_bytes, option.num_bytes))
        for name, options in candidates.items()
    }


def frontier(candidates: Mapping[str, Sequence[Candidate]]) -> list[Choice]:
    """Every choice that is the best of its size for some price, from the smallest to the most exact one.

    Matrices move one at a time to their next candidate, wherever a byte saves the most loss. Only candidates on the
    lower convex hull of a matrix's errors take part.

    Raises:
        ValueError: If a matrix has no candidate.
    """
    hulls = {name: _hull(options) for name, options in candidates.items()}
    if any(not hull for hull in hulls.values()):
        raise ValueError("`frontier` needs a candidate for each matrix.")
    steps = sorted(
        (
            (after.error - before.error) / (after.num_bytes - before.num_bytes),
            name,
            place + 1,
        )
        for name, hull in hulls.items()
        for place, (before, after) in enumerate(pairwise(hull))
    )
    choice = {name: hull[0] for name, hull in hulls.items()}
    choices = [dict(choice)]
    for _, name, place in steps:
        choice[name] = hulls[name][place]
        choices.append(dict(choice))
    return choices


def _hull(options: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull by size: each next one is larger, better, and worth less a byte than the one before."""
    hull: list[Candidate] = []
    for option in sorted(options, key=lambda option: (option.num_bytes, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        if hull and option.num_bytes == hull[-1].num_bytes:
            continue
        hull.append(option)
    return hull


def _slope(one: Candidate, other: Candidate) -> float:
    return (other.error - one.error) / max(1, other.num_bytes - one.num_bytes)


def size(choice: Choice) -> int:
    """Bytes of a choice."""
    return sum(candidate.num_bytes for candidate in choice.values())


def error(choice: Choice) -> float:
    """Expected rise of the loss of a choice, in nats a token."""
    return sum(candidate.error for candidate in choice.values())
