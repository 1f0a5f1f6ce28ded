"""Every estimate and its standard error against a loop over the points, in plain NumPy."""

import math

import numpy as np
import pytest
import torch

from forge_lightning.functional import (
    PointCloud,
    correlation_dimension,
    gride_dimension,
    levina_bickel_dimension,
    participation_ratio,
    pca_dimension,
    two_nn_dimension,
)


def cloud(n, dim=4, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def distances(points):
    """Distances of each point to all others, nearest first, ``(n, n - 1)``."""
    x = points.double().numpy()
    return np.array([sorted(np.linalg.norm(x[j] - x[i]) for j in range(len(x)) if j != i) for i in range(len(x))])


def two_nn(points, discard_fraction):
    logs = sorted(math.log(second / first) for first, second in distances(points)[:, :2])
    n = len(logs)
    kept = min(int(n * (1 - discard_fraction)), n - 1)
    x, y = logs[:kept], [-math.log(1 - (i + 1) / n) for i in range(kept)]
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    # x_i is the sum over j <= i of exponentials of mean 1 / (slope * (n - j)); each has a weight of the y from it on.
    spread = math.sqrt(sum((sum(y[j:]) / (n - j)) ** 2 for j in range(kept)))
    return slope, 1.2 * slope * spread / sum(a * a for a in y)


@pytest.mark.parametrize("n", [4, 7, 40])
@pytest.mark.parametrize("discard_fraction", [0.0, 0.1, 0.4])
def test_two_nn_is_the_slope_through_the_smallest_ratios(n, discard_fraction):
    found = two_nn_dimension(cloud(n), discard_fraction)
    assert found[:2] == pytest.approx(two_nn(cloud(n), discard_fraction), rel=1e-4)
    assert found.num_points == n


def levina_bickel(points, k):
    inverse = [sum(math.log(row[k - 1] / row[j]) for j in range(k - 1)) / (k - 1) for row in distances(points)]
    mean = np.mean(inverse)
    return 1 / mean, 1.2 * np.std(inverse, ddof=1) / mean**2 / math.sqrt(len(inverse))


@pytest.mark.parametrize(("n", "k"), [(6, 2), (6, 5), (50, 20), (80, 3)])
def test_levina_bickel_is_the_harmonic_mean_over_the_points(n, k):
    assert levina_bickel_dimension(cloud(n), k)[:2] == pytest.approx(levina_bickel(cloud(n), k), rel=1e-4)


@pytest.mark.parametrize(("n", "dim"), [(6, 3), (30, 3), (300, 1), (300, 8)])
def test_levina_bickel_in_two_passes_takes_the_number_of_neighbors_of_the_first_estimate(n, dim):
    points = cloud(n, dim)
    first = levina_bickel(points, min(20, n - 1))[0]
    k = min(round(min(128, max(5, n ** (4 / (4 + first))))), n - 1)
    assert levina_bickel_dimension(points, None)[:2] == pytest.approx(levina_bickel(points, k), rel=1e-4)


def correlation(points, k1, k2):
    rows = distances(points)
    small, large = (np.median(rows[:, k - 1]) for k in (k1, k2))
    inner, outer = ((rows < radius).sum(1).astype(float) for radius in (small, large))
    width = math.log(large / small)
    influence = 2 * (outer / outer.mean() - inner / inner.mean()) / width
    return math.log(outer.sum() / inner.sum()) / width, np.std(influence, ddof=1) / math.sqrt(len(rows))


@pytest.mark.parametrize(("n", "k1", "k2"), [(10, 1, 3), (60, 10, 20), (61, 2, 5)])
def test_correlation_is_the_slope_between_two_radii(n, k1, k2):
    found = correlation_dimension(cloud(n), k1, k2)
    expected = correlation(cloud(n), k1, k2)
    assert found[:2] == pytest.approx(expected, rel=1e-3)


def test_gride_of_neighbouring_ranks_is_the_closed_form():
    """Between the neighbours k and k + 1 the maximum of the likelihood is ``(n - 1) / Σ k log(r_{k+1} / r_k)``."""
    rows = distances(cloud(50))
    for k in (1, 2, 5):
        total = sum(k * math.log(row[k] / row[k - 1]) for row in rows)
        found = gride_dimension(cloud(50), k, k + 1)
        assert found.dimension == pytest.approx(49 / total, rel=1e-4)
        assert found.standard_error == pytest.approx(found.dimension / math.sqrt(50), rel=1e-4)


@pytest.mark.parametrize(("n1", "n2"), [(1, 3), (2, 5), (3, 6)])
def test_gride_between_other_ranks_solves_its_equation(n1, n2):
    """The derivative of the likelihood of Denti et al., with one point fewer in its first term against the bias."""
    logs = [math.log(row[n2 - 1] / row[n1 - 1]) for row in distances(cloud(50))]

    def score(d):
        inner = (n2 - n1 - 1) * sum(value / (1 - math.exp(-d * value)) for value in logs)
        return 49 / d - (n2 - 1) * sum(logs) + inner

    found = gride_dimension(cloud(50), n1, n2)
    assert score(0.999 * found.dimension) > 0 > score(1.001 * found.dimension)
    bend = (score(0.999 * found.dimension) - score(1.001 * found.dimension)) / (0.002 * found.dimension)
    # The information counts all points, the score one fewer.
    expected = 1 / math.sqrt(bend + 1 / found.dimension**2)
    assert found.standard_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("n", [3, 30])
def test_participation_ratio_is_that_of_the_eigenvalues(n):
    x = cloud(n).double().numpy()
    values = np.linalg.eigvalsh(np.cov(x.T))
    found = participation_ratio(cloud(n))
    assert found.dimension == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
    x = x - x.mean(0)
    norms, moments = (x**2).sum(1), np.einsum("ij,jk,ik->i", x, x.T @ x, x)
    influence = 2 * found.dimension * (norms / norms.mean() - moments / moments.mean())
    assert found.standard_error == pytest.approx(np.std(influence, ddof=1) / math.sqrt(n), rel=1e-4)


def spectrum(points):
    x = points.double().numpy()
    x = x - x.mean(0)
    return np.sort(np.linalg.eigvalsh(x.T @ x))[::-1]


def test_pca_by_share_counts_components_and_has_the_error_of_the_share():
    points = cloud(50, 6) * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])
    shares = spectrum(points) / spectrum(points).sum()
    for alpha in (0.05, 0.2, 0.5):
        found = pca_dimension(points, "ratio", alpha)
        count = next(i for i in range(1, 7) if shares[:i].sum() >= 1 - alpha)
        # Each eigenvalue has a relative variance of 2 / n. The share of the first `count` falls by the others' errors.
        held = shares[:count].sum()
        variance = 2 / 50 * sum((share * ((i < count) - held)) ** 2 for i, share in enumerate(shares))
        assert found.dimension == count
        assert found.standard_error == pytest.approx(math.sqrt(variance) / shares[count - 1], rel=1e-4)


def test_pca_by_fukunaga_and_olsen_has_the_error_of_each_eigenvalue_s_chance():
    points = cloud(50, 6) * torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.25])
    values = spectrum(points)
    found = pca_dimension(points, "fo", 0.05)
    assert found.dimension == (values > 0.05 * values[0]).sum()
    apart = [math.log(value / (0.05 * values[0])) / math.sqrt(2 * 2 / 50) for value in values[1:]]
    chances = [0.5 * math.erfc(-z / math.sqrt(2)) for z in apart]
    assert found.standard_error == pytest.approx(math.sqrt(sum(p * (1 - p) for p in chances)), rel=1e-4)


@pytest.mark.parametrize("method", ["fo", "ratio"])
def test_local_pca_is_the_mean_over_neighbourhoods(method):
    points = cloud(40, 5)
    x = points.double().numpy()
    counts = []
    for i in range(40):
        near = np.argsort(np.linalg.norm(x - x[i], axis=1))[:9]  # the point itself and eight more
        values = spectrum(torch.from_numpy(x[near]))
        if method == "fo":
            counts.append((values > 0.05 * values[0]).sum())
        else:
            counts.append(next(k for k in range(1, 6) if values[:k].sum() >= 0.95 * values.sum()))
    found = pca_dimension(points, method, 0.05, num_neighbors=8)
    assert found.dimension == pytest.approx(np.mean(counts))
    assert found.standard_error == pytest.approx(np.std(counts, ddof=1) / math.sqrt(40), rel=1e-6)


@pytest.mark.parametrize(
    ("estimate", "least"),
    [
        (two_nn_dimension, 3),
        (lambda points: levina_bickel_dimension(points, 4), 5),
        (lambda points: levina_bickel_dimension(points, None), 6),
        (lambda points: gride_dimension(points, 1, 3), 4),
        (lambda points: correlation_dimension(points, 1, 3), 4),
        (participation_ratio, 3),
        (pca_dimension, 3),
        (lambda points: pca_dimension(points, num_neighbors=4), 5),
    ],
    ids=["two_nn", "levina_bickel", "levina_bickel in two passes", "gride", "correlation", "ratio", "pca", "local pca"],
)
def test_the_least_number_of_points_is_enough_and_one_fewer_is_not(estimate, least):
    assert math.isfinite(estimate(cloud(least)).dimension)
    found = estimate(cloud(least - 1))
    assert math.isnan(found.dimension)
    assert found.reason in (f"{least - 1} different points are too few; {least} are needed", "2 points are too few")


def test_clouds_of_three_points_are_the_smallest():
    assert PointCloud(cloud(3)).reason == ""
    assert PointCloud(cloud(2)).reason == "2 points are too few"


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-16, 1.0, 2.0**16, 2.0**40])
def test_distances_of_a_rescaled_cloud_have_its_ratios(scale):
    found, plain = (PointCloud(points, 5).neighbor_distances(5) for points in (cloud(30) * scale, cloud(30)))
    torch.testing.assert_close(found / found[0, 0], plain / plain[0, 0], rtol=1e-6, atol=0)


def test_neighbors_and_pairs_of_a_cloud_are_those_of_a_loop():
    points = cloud(70)
    made = PointCloud(points, num_neighbors=0)
    rows = torch.from_numpy(distances(points))
    for count in (1, 4, 69):  # more than were found at first
        torch.testing.assert_close(made.neighbor_distances(count), rows[:, :count], rtol=1e-5, atol=1e-6)
    assert made.count_within(1.5).tolist() == (rows < 1.5).sum(1).tolist()
    every = torch.cdist(points.double(), points.double()).fill_diagonal_(math.inf)
    assert torch.equal(made.neighbor_indices(3), every.topk(3, largest=False).indices)
    centred = points.double() - points.double().mean(0)
    torch.testing.assert_close(made.moments, (centred @ centred.T).square().sum(1), rtol=1e-5, atol=1e-5)
