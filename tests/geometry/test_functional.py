"""scikit-dimension, in fp64 on the same points, is the oracle."""

import math
import re

import numpy as np
import pytest
import skdim
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

ESTIMATORS = {
    "two_nn": two_nn_dimension,
    "levina_bickel": levina_bickel_dimension,
    "gride": gride_dimension,
    "correlation": correlation_dimension,
    "participation_ratio": participation_ratio,
    "pca": pca_dimension,
}


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def ball(n, dim, width, normal):
    x = torch.nn.functional.normalize(normal(n, dim)) * torch.rand(n, 1).pow(1 / dim)
    return x @ torch.linalg.qr(normal(width, dim)).Q.T


def swiss_roll(n, normal):
    turn = 4.7 + 9.4 * torch.rand(n)
    x = torch.stack([turn * turn.cos(), 21 * torch.rand(n), turn * turn.sin()], 1)
    return x @ torch.linalg.qr(normal(768, 3)).Q.T


def massive(n, normal):
    """As language models have them: a few rows with one huge coordinate."""
    x = normal(n, 20) @ normal(20, 256)
    x[:8, 3] += 3000 * x.std()
    return x


SETS = {
    "sphere of 2 dimensions": lambda n, normal: torch.nn.functional.normalize(normal(n, 3)),
    "ball of 10": lambda n, normal: ball(n, 10, 768, normal),
    "ball of 10, noise": lambda n, normal: ball(n, 10, 768, normal) + 0.002 * normal(n, 768),
    "swiss roll": swiss_roll,
    "Gaussian of 50": lambda n, normal: normal(n, 50) @ torch.linalg.qr(normal(768, 50)).Q.T,
    "curved": lambda n, normal: torch.tanh(normal(n, 6) @ normal(6, 36)),
    "large offset": lambda n, normal: normal(n, 20) @ normal(20, 128) + 1200 * normal(1, 128),
    "massive activations": massive,
    "parabola": lambda n, normal: (lambda z: torch.cat([z, z.square()], 1))(normal(n, 7)),
}


def oracle(points):
    x = points.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):  # its gaps between eigenvalues, of no interest here
        return _oracle(x)


def _oracle(x):
    return {
        "two_nn": skdim.id.TwoNN().fit(x).dimension_,
        "levina_bickel": skdim.id.MLE().fit(x, n_neighbors=20, comb="mle").dimension_,
        "gride": skdim.id.GRIDE().fit(x).dimension_,
        "correlation": skdim.id.CorrInt().fit(x).dimension_,
        "participation_ratio": skdim.id.lPCA(ver="participation_ratio").fit(x).dimension_,
        "pca": skdim.id.lPCA(ver="FO").fit(x).dimension_,
    }


TOLERANCE = {"correlation": 1e-3, "participation_ratio": 1e-3, "pca": 0}


@pytest.mark.parametrize("n", [512, 1024])
@pytest.mark.parametrize("name", SETS)
def test_equals_scikit_dimension_also_with_duplicates(name, n):
    torch.manual_seed(0)
    points = SETS[name](n, draw(n))
    expected = oracle(points)
    repeated = torch.cat([points, points[: n // 10]])[torch.randperm(n + n // 10)]
    for given in (points, repeated):
        cloud = PointCloud(given, num_neighbors=64)
        assert cloud.num_points == n
        for estimator, function in ESTIMATORS.items():
            found = function(cloud)
            assert found.dimension == pytest.approx(expected[estimator], rel=TOLERANCE.get(estimator, 1e-4)), estimator
            assert found.num_points == n
            assert found.standard_error >= 0
            assert not found.reason
    scales = skdim.id.GRIDE(multiscale=True).fit(points.double().numpy())
    found = gride_dimension(points)
    assert found.scales == tuple(scales.scales_)
    assert found.dimensions == pytest.approx(scales.dimension_scales_, rel=1e-4)
    assert found.standard_errors == pytest.approx(scales.error_scales_, rel=1e-4)


def test_more_points_than_distances_are_kept_for():
    points = draw()(4500, 6)
    expected = oracle(points)
    for name, function in ESTIMATORS.items():
        assert function(points).dimension == pytest.approx(expected[name], rel=TOLERANCE.get(name, 1e-4)), name


def test_tight_clusters_beyond_the_points_that_distances_are_kept_for():
    normal = draw()
    points = (normal(450, 1, 20) + 2e-3 * normal(450, 12, 20)).flatten(0, 1)
    for function in (correlation_dimension, levina_bickel_dimension):
        assert math.isfinite(function(points).dimension)


def test_a_line_cancels_everywhere_and_is_still_right():
    points = torch.rand(1500, 1, generator=torch.Generator().manual_seed(0)) @ draw()(1, 64) + 5
    expected = oracle(points)
    for name in ("two_nn", "levina_bickel", "gride", "correlation"):
        tolerance = 1e-3 if name == "correlation" else 1e-4
        assert ESTIMATORS[name](points).dimension == pytest.approx(expected[name], rel=tolerance), name


def test_neighbors_that_rounding_makes_equally_far_still_count():
    """One point of 500 would be 2e-3."""
    points = draw()(500, 5)
    tied, apart = PointCloud(points, 2), PointCloud(points, 2)
    tied._nearest[7, 1] = tied._nearest[7, 0]
    apart._nearest[7, 1] = apart._nearest[7, 0] * (1 + 1e-9)
    for estimate in (gride_dimension, two_nn_dimension):
        options = {"max_neighbors": 2} if estimate is gride_dimension else {}
        assert estimate(tied, **options).dimension == pytest.approx(estimate(apart, **options).dimension, rel=1e-6)


def test_near_duplicates_count_as_duplicates():
    points = draw()(400, 10)
    near = points[:40] + 1e-8 * draw(1)(40, 10)
    assert two_nn_dimension(torch.cat([points, near.float()])) == two_nn_dimension(points)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_same_in_every_setting_of_training(estimator):
    points = draw()(300, 32).requires_grad_()
    before = torch.backends.mkldnn.matmul.fp32_precision
    plain = estimator(points)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert estimator(points) == plain
    assert estimator(points.double()).dimension == pytest.approx(plain.dimension, rel=1e-4)
    assert estimator(points.bfloat16()).dimension == pytest.approx(plain.dimension, rel=0.02)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (torch.ones(50, 4), "all the same"),
        (torch.randn(2, 4), "too few"),
        (torch.full((50, 4), math.nan), "not finite"),
        (torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(20, 1), "too few"),
    ],
)
def test_no_estimate_has_a_reason(estimator, points, reason):
    found = estimator(points)
    assert math.isnan(found.dimension)
    assert math.isnan(found.standard_error)
    assert reason in found.reason


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_the_scale_does_not_matter_however_large(estimator, power):
    """Fourth powers of 1e12 have no place in fp32."""
    points = draw()(300, 8)
    assert estimator(points * 2.0**power) == estimator(points)


def test_fewer_points_than_neighbours_give_no_estimate():
    points = draw()(20, 8)
    found = levina_bickel_dimension(points)
    assert math.isnan(found.dimension)
    assert found.reason == "20 different points are too few; 21 are needed"
    assert math.isfinite(levina_bickel_dimension(points, 19).dimension)


def test_a_regular_grid_has_no_ratio():
    """Neighbours all equally far."""
    axis = torch.arange(8.0)
    grid = torch.cartesian_prod(axis, axis, axis)
    assert "equally far" in two_nn_dimension(grid).reason


@pytest.mark.parametrize("name", ["two_nn", "levina_bickel", "gride", "correlation", "participation_ratio"])
def test_standard_errors_are_the_spread_over_samples(name):
    """Within a factor of two, on samples whose spread is itself known to 11 %."""
    normal = draw(3)
    spectrum = 0.7 ** torch.arange(12)
    found = [ESTIMATORS[name](normal(256, 12) * spectrum) for _ in range(40)]
    spread = np.std([f.dimension for f in found], ddof=1)
    stated = np.mean([f.standard_error for f in found])
    assert 0.5 < stated / spread < 2


def test_two_passes_choose_the_number_of_neighbors():
    """More for a surface than for a ball of ten dimensions, as stated: ``N^(4 / (4 + d))``."""
    surface, solid = SETS["sphere of 2 dimensions"](1000, draw()), ball(1000, 10, 16, draw())
    for points in (surface, solid):
        first = levina_bickel_dimension(points).dimension
        k = round(1000 ** (4 / (4 + first)))
        assert levina_bickel_dimension(points, None) == levina_bickel_dimension(points, k)
    assert abs(levina_bickel_dimension(surface, None).dimension - 2) < 0.1


def test_local_pca_sees_the_surface_that_global_pca_does_not():
    points = SETS["sphere of 2 dimensions"](600, draw())
    assert pca_dimension(points).dimension == 3
    local = pca_dimension(points, num_neighbors=30)
    expected = skdim.id.lPCA(ver="FO").fit_pw(points.double().numpy(), n_neighbors=30).dimension_pw_.mean()
    assert local.dimension == pytest.approx(expected, rel=0.02)
    assert local.dimension < 2.2
    assert pca_dimension(draw()(300, 8), num_neighbors=12).standard_error > 0


def test_ratio_counts_the_share_of_variance():
    points = draw()(2000, 3) * torch.tensor([10.0, 5.0, 0.1])
    assert pca_dimension(points, "ratio").dimension == 2
    assert pca_dimension(points, "ratio", alpha=0.5).dimension == 1
    assert pca_dimension(points[:, :1].repeat(1, 4), "ratio").dimension == 1


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x: two_nn_dimension(x, 1.0), "discard_fraction=1.0"),
        (lambda x: levina_bickel_dimension(x, 1), "num_neighbors=1"),
        (lambda x: gride_dimension(x, 4, 3), "n1=4, n2=3"),
        (lambda x: correlation_dimension(x, 20, 10), "k1=20, k2=10"),
        (lambda x: pca_dimension(x, "kaiser"), "method='kaiser'"),
        (lambda x: pca_dimension(x, alpha=0.0), "alpha=0.0"),
        (lambda x: pca_dimension(x, num_neighbors=1), "num_neighbors=1"),
        (lambda x: two_nn_dimension(x[None]), "(N, D)"),
        (lambda x: two_nn_dimension(x.long()), "int64"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=re.escape(argument)):
        call(draw()(50, 3))


def grid(width=2):
    axes = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 2) / 31 @ torch.eye(2, width)


LATTICES = {
    "grid": grid(),
    "grid, turned": grid() @ draw()(2, 64),
    "binary": torch.randint(0, 2, (1024, 10), generator=torch.Generator().manual_seed(0)).float(),
    "16 bits far from 0": (draw()(1024, 2) + 30).bfloat16().float(),
}


@pytest.mark.parametrize("points", LATTICES)
def test_a_lattice_has_no_two_nn_and_says_why(points):
    for estimator in (two_nn_dimension, gride_dimension):
        found = estimator(LATTICES[points])
        assert math.isnan(found.dimension)
        assert "of the neighbours are equally far: the points lie on a lattice" in found.reason
    assert math.isnan(levina_bickel_dimension(LATTICES["binary"]).dimension)
    assert math.isnan(correlation_dimension(LATTICES["binary"]).dimension)


def test_numbers_of_16_bits_are_no_lattice_near_0_or_in_more_dimensions():
    for width, offset in ((2, 0), (2, 5), (4, 30), (8, 30)):
        points = (draw()(1024, width) + offset).bfloat16()
        for estimator in (two_nn_dimension, levina_bickel_dimension, correlation_dimension):
            assert estimator(points).dimension == pytest.approx(width, rel=0.25)
