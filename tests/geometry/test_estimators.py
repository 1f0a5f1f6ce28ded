import numpy as np
import pytest
import torch

from forge_lightning.functional import gride_dimension
from forge_lightning.geometry.estimators import check_estimators, estimate, quantities

POINTS = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))


def test_gride_gives_a_value_for_each_scale():
    found = estimate(POINTS, ["gride", "two_nn"])
    assert list(found) == quantities(["gride", "two_nn"])
    whole = gride_dimension(POINTS)
    assert [found[f"gride_{scale}"].dimension for scale in whole.scales] == list(whole.dimensions)
    assert "no 64 neighbours" in estimate(POINTS[:60], ["gride"])["gride_32"].reason


def test_every_estimator_of_the_backend_has_a_value_or_a_reason():
    """On few points, so that the slow ones are quick; the global stream of NumPy is left alone."""
    names = [f"skdim:{name}" for name in ("TwoNN", "MLE", "CorrInt", "lPCA", "KNN", "MOM", "FisherS", "TLE")]
    check_estimators(names)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for name, result in estimate(POINTS, names).items():
        assert np.isfinite(result.dimension) or result.reason, name
    assert (np.random.get_state()[1] == before).all()
    assert estimate(torch.ones(20, 3), ["skdim:MLE"])["skdim:MLE"].reason == "the points are all the same"


@pytest.mark.parametrize(("name", "says"), [("twonn", "Close: .*two_nn"), ("skdim:two_nn", "skdim:TwoNN")])
def test_unknown_names_are_explained(name, says):
    with pytest.raises(ValueError, match=says):
        check_estimators([name])
