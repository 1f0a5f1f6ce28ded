"""Estimators of the intrinsic dimension of a cloud of points, which share one Gram matrix.

Every estimator takes ``(N, D)`` points of any floating type on any device, or a `PointCloud` of them, and returns a
`DimensionEstimate`. All local estimators read too low above ten dimensions, and by an amount that depends on ``N`` and
on the number of neighbours: compare values only at the same two numbers. Standard errors are those of points drawn
independently: of points in clusters, as tokens of few texts, they can be several times too small. Exact and near
duplicates (closer than 1e-6 of the median distance from the mean) are removed first. Where many neighbours are equally
far, as on a lattice, there is no estimate.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from forge_lightning.geometry.point_cloud import PointCloud

_MOST_TIED, _MOST_TIED_OF_TWO = 0.5, 0.1  # share of neighbours that may be equally far
_OVERLAP = 1.2  # neighbourhoods overlap: standard errors of independent ones are too small by about this factor


class DimensionEstimate(NamedTuple):
    """A dimension and how sure it is."""

    dimension: float
    """NaN if it cannot be estimated; ``reason`` says why."""
    standard_error: float
    num_points: int
    """Points left after duplicates are removed."""
    reason: str = ""


class GrideEstimate(NamedTuple):
    """A dimension at the finest scale, and at each scale."""

    dimension: float
    standard_error: float
    num_points: int
    reason: str = ""
    scales: tuple[int, ...] = ()
    """Neighbour ranks ``n1``; each scale compares the distances of ranks ``n1`` and ``2 n1``."""
    dimensions: tuple[float, ...] = ()
    standard_errors: tuple[float, ...] = ()


def _tie_reason(nearest: Tensor) -> str:
    """Why distances say nothing of a dimension: many neighbours of a point equally far; empty where they do.

    Args:
        nearest: Ascending distances of each point, ``(N, K)``.
    """
    tied = (nearest[:, 1:] - nearest[:, :-1]) <= 1e-5 * nearest[:, 1:]
    share = float(tied.double().mean())
    if share <= (_MOST_TIED if nearest.shape[1] > 2 else _MOST_TIED_OF_TWO):
        return ""
    return (
        f"{100 * share:.0f} % of the neighbours are equally far: the points lie on a lattice, as integers or numbers of"
        " few digits do, and its steps would be measured"
    )


def two_nn_dimension(points: Tensor | PointCloud, discard_fraction: float = 0.1) -> DimensionEstimate:
    """TwoNN: slope of the distribution of the ratio of the distances to the two nearest neighbours.

    The least biased of the local estimators in high dimension, and the noisiest.

    Args:
        points: ``(N, D)``.
        discard_fraction: Share of largest ratios left out of the linear fit, in [0, 1).

    Returns:
        The dimension; its standard error is that of the fit under the order statistics of exponential variables, times
        1.2 for neighbourhoods that overlap.

    Raises:
        ValueError: If ``discard_fraction`` is out of range.

    Example:
        >>> angle = 6.28 * torch.rand(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> round(two_nn_dimension(torch.cat([angle.cos(), angle.sin()], 1)).dimension)
        1

    References:
        Facco et al., `Estimating the intrinsic dimension of datasets by a minimal neighborhood information
        <https://doi.org/10.1038/s41598-017-11873-y>`_, 2017.
    """
    if not 0 <= discard_fraction < 1:
        raise ValueError(f"`two_nn_dimension(discard_fraction={discard_fraction})` must be in [0, 1).")
    cloud, reason = _cloud(points, 2, at_least=3)
    if reason:
        return _none(cloud, reason)
    nearest = cloud.neighbor_distances(2)
    x = (nearest[:, 1] / nearest[:, 0]).log().sort().values
    if reason := _tie_reason(nearest):
        return _none(cloud, reason)
    n = len(x)
    kept = min(int(n * (1 - discard_fraction)), n - 1)  # the last one's empirical distribution is 1
    if kept < 2 or float(x[kept - 1]) <= 0:
        return _none(cloud, "the two nearest neighbours are equally far")
    x = x[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=x.dtype) / n)
    slope = float(x @ y / (x @ x))
    # x_(i) is a sum of independent exponentials of means 1 / (d (n - j + 1)); the slope is close to d·Σy² / Σ(d x y).
    tails = y.flip(0).cumsum(0).flip(0) / torch.arange(n, n - kept, -1, dtype=x.dtype)
    return DimensionEstimate(slope, _OVERLAP * slope * float(tails.norm() / (y @ y)), cloud.num_points)


def levina_bickel_dimension(points: Tensor | PointCloud, num_neighbors: int | None = 20) -> DimensionEstimate:
    """Maximum-likelihood dimension from the distances to the nearest neighbours, harmonic mean over the points.

    The most stable of the local estimators.

    Args:
        points: ``(N, D)``.
        num_neighbors: Nearest neighbours ``k``, at least 2. ``None`` chooses it in two passes: a first estimate ``d``
            at 20, then ``k = N^(4 / (4 + d))``, the rate at which bias and variance of a neighbourhood balance, in
            [5, 128].

    Returns:
        The dimension; its standard error is the spread of the points' own estimates, times 1.2 for neighbourhoods that
        overlap.

    Raises:
        ValueError: If ``num_neighbors`` is below 2.

    References:
        Levina and Bickel, `Maximum Likelihood Estimation of Intrinsic Dimension
        <https://papers.nips.cc/paper/2577-maximum-likelihood-estimation-of-intrinsic-dimension>`_, 2004; the harmonic
        mean: MacKay and Ghahramani, 2005.
    """
    if num_neighbors is not None and num_neighbors < 2:
        raise ValueError(f"`levina_bickel_dimension(num_neighbors={num_neighbors})` must be at least 2.")
    k = num_neighbors or 20
    cloud, reason = _cloud(points, k, at_least=6 if num_neighbors is None else k + 1)
    if reason:
        return _none(cloud, reason)
    n = cloud.num_points
    if num_neighbors is None:
        first = levina_bickel_dimension(cloud, min(20, n - 1)).dimension
        if not math.isfinite(first):
            return _none(cloud, "the neighbours are equally far")
        k = round(min(128.0, max(5.0, n ** (4 / (4 + first)))))
        k = min(k, n - 1)
    nearest = cloud.neighbor_distances(k)
    if reason := _tie_reason(nearest):
        return _none(cloud, reason)
    inverse = (nearest[:, -1:] / nearest).log().sum(1) / (k - 1)  # one over each point's dimension
    mean = float(inverse.mean())
    if mean <= 0:
        return _none(cloud, "the neighbours are equally far")
    return DimensionEstimate(1 / mean, _OVERLAP * float(inverse.std()) / mean**2 / math.sqrt(n), n)


def gride_dimension(
    points: Tensor | PointCloud, n1: int = 1, n2: int | None = None, max_neighbors: int = 64
) -> GrideEstimate:
    """Gride: maximum likelihood from the ratio of the distances to two neighbours, at several scales.

    Noise raises the finest scales first; a plateau over the scales is the dimension.

    Args:
        points: ``(N, D)``.
        n1: Rank of the nearer neighbour of ``dimension``, at least 1.
        n2: Rank of the farther one. Default: ``2 n1``.
        max_neighbors: Largest rank of the scales 1, 2, 4, ...; a scale compares ranks ``n`` and ``2 n``.

    Returns:
        ``dimension`` between ``n1`` and ``n2``, and ``dimensions`` at every scale; standard errors are those of the
        observed information, as if neighbourhoods did not overlap: too small by up to a third.

    Raises:
        ValueError: If the ranks are not ``1 ≤ n1 < n2``.

    References:
        Denti et al., `The generalized ratios intrinsic dimension estimator
        <https://doi.org/10.1038/s41598-022-20991-1>`_, 2022.
    """
    n2 = 2 * n1 if n2 is None else n2
    if not 1 <= n1 < n2:
        raise ValueError(f"`gride_dimension(n1={n1}, n2={n2})` must have 1 ≤ n1 < n2.")
    cloud, reason = _cloud(points, max(n2, max_neighbors), at_least=n2 + 1)
    if reason:
        return GrideEstimate(*_none(cloud, reason))
    top = min(max_neighbors, cloud.num_points - 1)
    nearest = cloud.neighbor_distances(max(n2, top))
    if reason := _tie_reason(nearest[:, :n2]):
        return GrideEstimate(*_none(cloud, reason))
    dimension, error = _gride(nearest, n1, n2)
    scales = tuple(2**power for power in range(int(math.log2(top)))) if top > 1 else ()
    found = [_gride(nearest, scale, 2 * scale) for scale in scales]
    reason = "" if math.isfinite(dimension) else "the neighbours are equally far"
    return GrideEstimate(
        dimension,
        error,
        cloud.num_points,
        reason,
        scales,
        tuple(d for d, _ in found),
        tuple(e for _, e in found),
    )


def _gride(nearest: Tensor, n1: int, n2: int) -> tuple[float, float]:
    logs = (nearest[:, n2 - 1] / nearest[:, n1 - 1]).log()
    logs = logs[logs.isfinite()]
    if len(logs) < 2 or float(logs.median()) <= 0:
        return math.nan, math.nan
    logs = logs.clamp(min=1e-12)  # a tie after rounding is a point like any other
    ratios = logs.exp()
    q95, q50 = torch.quantile(ratios, torch.tensor([0.95, 0.5], dtype=ratios.dtype)).tolist()
    logs = logs[ratios < 20 * (q95 - q50) + q50]
    n, total = len(logs), float(logs.sum())
    if n < 2:
        return math.nan, math.nan
    # The score falls with d and is convex: Newton from the left never overshoots. The closed form of n2 = n1 + 1 is a
    # lower bound.
    dimension = (n - 1) / ((n2 - 1) * total)
    for _ in range(100):
        score = (n - 1) / dimension - (n2 - 1) * total
        score += (n2 - n1 - 1) * float((logs / -torch.expm1(-dimension * logs)).sum())
        bend = (n2 - n1 - 1) * float((logs / (2 * torch.sinh(dimension * logs / 2))).square().sum())
        step = score / ((n - 1) / dimension**2 + bend)
        dimension += step
        if abs(step) < 1e-12 * dimension:
            break
    bend = (n2 - n1 - 1) * float((logs / (2 * torch.sinh(dimension * logs / 2))).square().sum())
    return dimension, 1 / math.sqrt(n / dimension**2 + bend)


def correlation_dimension(points: Tensor | PointCloud, k1: int = 10, k2: int = 20) -> DimensionEstimate:
    """Grassberger and Procaccia's: slope of the share of pairs closer than a radius, between two radii.

    The radii are the medians over the points of the distances to the ``k1``-th and ``k2``-th neighbour.

    Args:
        points: ``(N, D)``.
        k1: Neighbour that sets the smaller radius, at least 1.
        k2: Neighbour that sets the larger one.

    Returns:
        The dimension; its standard error is the spread of the points' own counts (a Hájek projection), too large by up
        to a half in two dimensions.

    Raises:
        ValueError: If the ranks are not ``1 ≤ k1 < k2``.

    References:
        Grassberger and Procaccia, `Measuring the strangeness of strange attractors
        <https://doi.org/10.1016/0167-2789(83)90298-1>`_, 1983.
    """
    if not 1 <= k1 < k2:
        raise ValueError(f"`correlation_dimension(k1={k1}, k2={k2})` must have 1 ≤ k1 < k2.")
    cloud, reason = _cloud(points, k2, at_least=k2 + 1)
    if reason:
        return _none(cloud, reason)
    nearest = cloud.neighbor_distances(k2)
    if reason := _tie_reason(nearest):
        return _none(cloud, reason)
    small, large = (float(torch.quantile(nearest[:, k - 1], 0.5)) for k in (k1, k2))
    if not 0 < small < large:
        return _none(cloud, "the two radii are equal")
    inner, outer = cloud.count_within(small), cloud.count_within(large)
    if float(inner.sum()) == 0:
        return _none(cloud, "no pair is closer than the smaller radius")
    width = math.log(large / small)
    dimension = math.log(float(outer.sum() / inner.sum())) / width
    influence = 2 * (outer / outer.mean() - inner / inner.mean()) / width
    return DimensionEstimate(dimension, float(influence.std()) / math.sqrt(cloud.num_points), cloud.num_points)


def participation_ratio(points: Tensor | PointCloud) -> DimensionEstimate:
    """Number of principal directions that share the variance: ``(Σ λ)² / Σ λ²`` of the covariance's eigenvalues.

    From the Gram matrix, without an eigendecomposition. Measures the linear span, at most ``min(N - 1, D)``.

    Args:
        points: ``(N, D)``.

    Returns:
        The ratio; its standard error is the spread of the points' influence on it, too large by up to a half where all
        directions are alike.
    """
    cloud, reason = _cloud(points, 1, at_least=3)
    if reason:
        return _none(cloud, reason)
    norms, moments = cloud.norms.double().cpu(), cloud.moments
    ratio = float(norms.sum() ** 2 / moments.sum())
    influence = 2 * ratio * (norms / norms.mean() - moments / moments.mean())
    return DimensionEstimate(ratio, float(influence.std()) / math.sqrt(cloud.num_points), cloud.num_points)


def pca_dimension(
    points: Tensor | PointCloud,
    method: Literal["fo", "ratio"] = "fo",
    alpha: float = 0.05,
    num_neighbors: int | None = None,
) -> DimensionEstimate:
    """Number of principal components that count, of all points or of each point's neighbourhood.

    Args:
        points: ``(N, D)``.
        method: "fo" (Fukunaga and Olsen) counts eigenvalues above ``alpha`` times the largest, "ratio" the components
            that hold the share ``1 - alpha`` of the variance.
        alpha: In (0, 1).
        num_neighbors: ``None`` for all points at once; else the mean over the neighbourhoods of that many points and
            their centre, at least 2.

    Returns:
        The count. Its standard error comes from the sampling error of the eigenvalues (relative variance ``2 / N``), or
        is that of the mean over the neighbourhoods.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Fukunaga and Olsen, `An algorithm for finding intrinsic dimensionality of data
        <https://doi.org/10.1109/T-C.1971.223208>`_, 1971.
    """
    if method not in ("fo", "ratio"):
        raise ValueError(f"`pca_dimension(method={method!r})` must be 'fo' or 'ratio'.")
    if not 0 < alpha < 1:
        raise ValueError(f"`pca_dimension(alpha={alpha})` must be in (0, 1).")
    if num_neighbors is not None and num_neighbors < 2:
        raise ValueError(f"`pca_dimension(num_neighbors={num_neighbors})` must be at least 2.")
    cloud, reason = _cloud(points, num_neighbors or 1, at_least=(num_neighbors or 2) + 1)
    if reason:
        return _none(cloud, reason)
    n = cloud.num_points
    if num_neighbors is None:
        x = cloud.points.double()
        gram = x.T @ x if x.shape[1] <= n else x @ x.T
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()
        relative = math.sqrt(2 / n)
        if method == "fo":
            distance = (values / (alpha * values[0])).clamp(min=1e-300).log() / (relative * math.sqrt(2))
            chance = torch.special.ndtr(distance[1:])  # of counting each; the largest always counts
            error = float((chance * (1 - chance)).sum().sqrt())
        else:
            share = values.cumsum(0) / values.sum()
            cut = int(_count_components(values[None], method, alpha)) - 1
            head, tail = values[: cut + 1].square().sum(), values[cut + 1 :].square().sum()
            spread = relative / values.sum() * (head * (1 - share[cut]) ** 2 + tail * share[cut] ** 2).sqrt()
            error = float(spread / (values[cut] / values.sum()))  # a share's error, in components
        return DimensionEstimate(float(_count_components(values[None], method, alpha)), error, n)
    indices = torch.cat([torch.arange(n)[:, None], cloud.neighbor_indices(num_neighbors).cpu()], 1)
    counts = []
    for part in indices.split(max(1, (1 << 24) // (indices.shape[1] * cloud.points.shape[1]))):
        local = cloud.points[part].double()
        local = local - local.mean(1, keepdim=True)
        values = torch.linalg.eigvalsh(local @ local.mT).flip(1).clamp(min=0).cpu()
        counts.append(_count_components(values, method, alpha).double())
    found = torch.cat(counts)
    return DimensionEstimate(float(found.mean()), float(found.std()) / math.sqrt(n), n)


def _count_components(values: Tensor, method: str, alpha: float) -> Tensor:
    """``(B, K)`` eigenvalues, descending, to ``(B,)`` counts."""
    if method == "fo":
        return (values > alpha * values[:, :1]).sum(1)
    shares = values.cumsum(1) / values.sum(1, keepdim=True)
    return (shares < 1 - alpha).sum(1) + 1


def _cloud(points: Tensor | PointCloud, num_neighbors: int, at_least: int) -> tuple[PointCloud, str]:
    cloud = points if isinstance(points, PointCloud) else PointCloud(points, num_neighbors)
    if cloud.reason or cloud.num_points >= at_least:
        return cloud, cloud.reason
    return cloud, f"{cloud.num_points} different points are too few; {at_least} are needed"


def _none(cloud: PointCloud, reason: str) -> DimensionEstimate:
    return DimensionEstimate(math.nan, math.nan, cloud.num_points, reason)
