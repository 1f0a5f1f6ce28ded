"""Estimators of intrinsic dimension by name: ours, and scikit-dimension's."""

import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor

from forge_lightning.core.extras import require_extra
from forge_lightning.geometry.functional import (
    DimensionEstimate,
    correlation_dimension,
    gride_dimension,
    levina_bickel_dimension,
    participation_ratio,
    pca_dimension,
    two_nn_dimension,
)
from forge_lightning.geometry.point_cloud import PointCloud

Estimates = dict[str, DimensionEstimate]

_OURS: dict[str, Callable[[PointCloud], DimensionEstimate]] = {
    "two_nn": two_nn_dimension,
    "levina_bickel": levina_bickel_dimension,
    "correlation": correlation_dimension,
    "participation_ratio": participation_ratio,
    "pca": pca_dimension,
}
_BACKEND = "skdim:"


def check_estimators(names: Sequence[str]) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: If an estimator is unknown, naming close ones.
    """
    known = [*_OURS, "gride"]
    for name in names:
        if name.startswith(_BACKEND):
            skdim = require_extra("skdim.id", "geometry", f"`GeometryProbe(estimators=[{name!r}])`")
            theirs = [_BACKEND + n for n in dir(skdim) if isinstance(getattr(skdim, n), type)]
            if name not in theirs:
                raise ValueError(f"No estimator is called {name!r}. scikit-dimension's are {theirs}.")
        elif name not in known:
            close = get_close_matches(name, known) or known
            raise ValueError(f"No estimator is called {name!r}. Close: {close}; scikit-dimension's are 'skdim:MLE' ...")


def quantities(names: Sequence[str]) -> list[str]:
    """What `estimate` returns for these names: "gride" gives one value for each of its scales."""
    scales = [f"gride_{2**power}" for power in range(6)]
    return [q for name in names for q in (scales if name == "gride" else [name])]


def estimate(points: Tensor, names: Sequence[str]) -> Estimates:
    """Several estimates of one cloud of points, from one Gram matrix.

    Args:
        points: ``(N, D)``.
        names: "two_nn", "levina_bickel", "gride" (neighbour ranks 1, 2, ... 32, as "gride_1" ...), "correlation",
            "participation_ratio", "pca", or "skdim:X" for the estimator X of scikit-dimension with its defaults.
    """
    cloud = PointCloud(points, 64 if "gride" in names else 20)
    found: Estimates = {}
    for name in names:
        if name == "gride":
            result = gride_dimension(cloud)
            for quantity in quantities(["gride"]):
                scale = int(quantity.removeprefix("gride_"))
                at = result.scales.index(scale) if scale in result.scales else None
                value, error = (
                    (float("nan"), float("nan")) if at is None else (result.dimensions[at], result.standard_errors[at])
                )
                reason = result.reason or ("" if at is not None else f"no {2 * scale} neighbours")
                found[quantity] = DimensionEstimate(value, error, result.num_points, reason)
        elif name in _OURS:
            found[name] = _OURS[name](cloud)
        else:
            found[name] = _scikit_dimension(cloud, name.removeprefix(_BACKEND))
    return found


def _scikit_dimension(cloud: PointCloud, name: str) -> DimensionEstimate:
    """Estimate on the points without duplicates, in fp64. The global random generator is left as it was."""
    import numpy as np
    import skdim.id

    nan = float("nan")
    if cloud.reason:
        return DimensionEstimate(nan, nan, cloud.num_points, cloud.reason)
    points = cloud.points.to("cpu", torch.float64).numpy()
    state = np.random.get_state()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            fitted = getattr(skdim.id, name)()
            fitted = fitted.fit(points, n_neighbors=20, comb="mle") if name == "MLE" else fitted.fit(points)
        return DimensionEstimate(float(fitted.dimension_), nan, cloud.num_points)
    except (ValueError, IndexError, ArithmeticError) as error:
        return DimensionEstimate(nan, nan, cloud.num_points, f"scikit-dimension: {error}")
    finally:
        np.random.set_state(state)
