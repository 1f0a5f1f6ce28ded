"""Complexity of a text or a program, by measures that need no model.

None of them is difficulty. They are features that predict it, in different units: combine them by rank, or let a model
of skill learn their weights.
"""

import ast
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Symbols = str | bytes | Sequence[int] | Tensor
"""One text, counted in bytes of UTF-8, or tokens."""

_DECISIONS = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.comprehension,
    ast.match_case,
)  # fmt: skip
_NESTING = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.FunctionDef, ast.AsyncFunctionDef,
    ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Match,
)  # fmt: skip


class AstComplexity(NamedTuple):
    """Measures of a program's syntax tree; all NaN for what is no Python."""

    nodes: float
    """Nodes of the tree."""
    depth: float
    """Nodes on the longest way from the root."""
    branching: float
    """Mean number of children of nodes that have any."""
    cyclomatic: float
    """One more than the decisions: branches, loops, handlers, assertions, conditions joined by ``and`` and ``or``."""
    nesting: float
    """Blocks inside blocks, at most."""


@overload
def shannon_entropy(text: Symbols) -> float: ...
@overload
def shannon_entropy(text: list[str]) -> Tensor: ...
def shannon_entropy(text: Symbols | list[str]) -> float | Tensor:
    """Bits a symbol of the text's own distribution: ``-Σ p log2 p``.

    Args:
        text: A text (its bytes), bytes, or tokens; or a list of texts.

    Returns:
        A number in [0, log2 of the number of different symbols]; NaN for an empty text. ``(N,)`` for a list.

    Example:
        >>> shannon_entropy("aabb")
        1.0

    References:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    if _is_batch(text):
        return torch.tensor([shannon_entropy(one) for one in text], dtype=torch.float64)
    symbols = _symbols(text)
    if not len(symbols):
        return math.nan
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum()) + 0.0


@overload
def lempel_ziv_complexity(text: Symbols, normalize: bool = True) -> float: ...
@overload
def lempel_ziv_complexity(text: list[str], normalize: bool = True) -> Tensor: ...
def lempel_ziv_complexity(text: Symbols | list[str], normalize: bool = True) -> float | Tensor:
    """Number ``c`` of phrases of the text, each the shortest that did not begin anywhere before (LZ76).

    Normalised: ``c log_k(n) / n`` with ``n`` symbols of ``k`` different ones (at least 2), which goes to 1 for a random
    text as it grows, and to 0 for one that repeats itself. Unlike the ratio of a compressor it carries no header.

    Args:
        text: A text (its bytes), bytes, or tokens; or a list of texts. A million symbols take some seconds.
        normalize: Otherwise ``c``.

    Returns:
        A number above 0; NaN for an empty text. ``(N,)`` for a list.

    Example:
        >>> lempel_ziv_complexity("0001101001000101", normalize=False)
        6.0

    References:
        Lempel and Ziv, On the Complexity of Finite Sequences, 1976; the example is theirs. Counted as by Kaspar and
        Schuster, 1987, by a suffix array.
    """
    if _is_batch(text):
        return torch.tensor([lempel_ziv_complexity(one, normalize) for one in text], dtype=torch.float64)
    symbols = _symbols(text)
    n = len(symbols)
    if n == 0:
        return math.nan
    seen, phrases, start = _longest_earlier(symbols), 0, 0
    while start < n:
        start += seen[start] + 1
        phrases += 1
    if not normalize:
        return float(phrases)
    k = max(2, len(np.unique(symbols)))
    return phrases * math.log(n, k) / n if n > 1 else 1.0


def ast_complexity(code: str) -> AstComplexity:
    r"""Nodes, depth, branching, cyclomatic complexity and nesting of a Python program.

    Args:
        code: The program. It is parsed, not run.

    Returns:
        The measures; all NaN where it cannot be parsed.

    Example:
        >>> ast_complexity("def f(x):\n    return x if x > 0 else -x").cyclomatic
        2.0

    References:
        McCabe, A Complexity Measure, 1976.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return AstComplexity(*[math.nan] * 5)
    nodes = depth = inner = children = nesting = 0
    decisions = 1
    waiting: list[tuple[ast.AST, int, int]] = [(tree, 1, 0)]
    while waiting:
        node, level, blocks = waiting.pop()
        nodes, depth = nodes + 1, max(depth, level)
        blocks += isinstance(node, _NESTING)
        nesting = max(nesting, blocks)
        decisions += isinstance(node, _DECISIONS)
        if isinstance(node, ast.BoolOp):
            decisions += len(node.values) - 1
        below = list(ast.iter_child_nodes(node))
        inner, children = inner + bool(below), children + len(below)
        waiting += [(child, level + 1, blocks) for child in below]
    return AstComplexity(float(nodes), float(depth), children / max(1, inner), float(decisions), float(nesting))


def mean_rank(measures: Tensor) -> Tensor:
    """Combine measures of different units: each is replaced by its rank, and the ranks are averaged.

    Args:
        measures: ``(N, K)``. A NaN takes no part in its measure.

    Returns:
        ``(N,)`` in [0, 1], from the least complicated to the most; ties share their rank. NaN where all ``K`` are.

    Example:
        >>> mean_rank(torch.tensor([[1.0, 300.0], [2.0, 100.0], [3.0, 200.0]]))
        tensor([0.5000, 0.2500, 0.7500], dtype=torch.float64)
    """
    ranks = torch.full(measures.shape, math.nan, dtype=torch.float64)
    for column in range(measures.shape[1]):
        there = measures[:, column].isfinite()
        values, places, counts = measures[there, column].unique(sorted=True, return_inverse=True, return_counts=True)
        if len(values):
            before = counts.cumsum(0) - counts
            middle = before + (counts - 1) / 2
            ranks[there, column] = middle[places].double() / max(1, int(there.sum()) - 1)
    return ranks.nanmean(1)


def _is_batch(text: Any) -> TypeGuard[list[str]]:
    return isinstance(text, list) and bool(text) and isinstance(text[0], str)


def _symbols(text: Any) -> NDArray[np.int64]:
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")
    if isinstance(text, bytes):
        return np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    values = text.detach().cpu().flatten().numpy() if isinstance(text, Tensor) else np.asarray(text)
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    return np.unique(values, return_inverse=True)[1].ravel().astype(np.int64)  # tokens may be large numbers


def _longest_earlier(symbols: NDArray[np.int64]) -> list[int]:
    """For each place, the length of the longest text from there that also begins earlier.

    The longest match of a suffix with an earlier one is with its nearest neighbours, among those that begin earlier, in
    the suffix array: Crochemore and Ilie, 2008.
    """
    n = len(symbols)
    order, rank = _suffix_array(symbols)
    common = _common_prefixes(symbols, order, rank)
    found = [0] * n
    stack: list[tuple[int, int]] = []  # places in the order of the array, with the prefix shared with the one before
    for index in range(n + 1):
        place, shared = (order[index], common[index]) if index < n else (-1, 0)
        while stack and place < stack[-1][0]:
            last, before = stack.pop()
            found[last] = max(before, shared)
            shared = min(before, shared)
        stack.append((place, shared))
    return found


def _suffix_array(symbols: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Suffixes in order, and the place of each in it, by doubling."""
    n = len(symbols)
    rank = np.unique(symbols, return_inverse=True)[1].ravel().astype(np.int64)
    width = 1
    while True:
        later = np.zeros(n, dtype=np.int64)
        later[: n - width] = rank[width:] + 1
        keys = rank * (n + 1) + later
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        fresh = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
        rank = np.empty(n, dtype=np.int64)
        rank[order] = fresh
        width *= 2
        if fresh[-1] == n - 1 or width >= 2 * n:
            return order.tolist(), rank.tolist()


def _common_prefixes(symbols: NDArray[np.int64], order: list[int], rank: list[int]) -> list[int]:
    """Symbols that each suffix shares with the one before it in the order: Kasai et al., 2001."""
    text, n = symbols.tolist(), len(order)
    common, shared = [0] * n, 0
    for place in range(n):
        if rank[place] == 0:
            shared = 0
            continue
        other = order[rank[place] - 1]
        most = n - max(place, other)
        while shared < most and text[place + shared] == text[other + shared]:
            shared += 1
        common[rank[place]] = shared
        shared = max(0, shared - 1)
    return common
