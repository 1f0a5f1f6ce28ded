from itertools import combinations

import pytest
import torch

from forge_lightning.evaluation.functional import pass_at_k
from forge_lightning.evaluation.metric import PassAtK


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_share_of_all_choices_that_hold_a_right_one(k):
    for n in range(k, 8):
        for c in range(n + 1):
            samples = [1] * c + [0] * (n - c)
            draws = list(combinations(samples, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(torch.tensor([n]), torch.tensor([c]), k).item() == pytest.approx(expected, abs=1e-12)


def test_too_few_samples_are_nan_and_impossible_counts_an_error():
    assert pass_at_k(torch.tensor([2]), torch.tensor([1]), 3).isnan().all()
    with pytest.raises(ValueError, match=r"`num_passed` must be in \[0, num_samples\]"):
        pass_at_k(torch.tensor([2]), torch.tensor([3]), 1)
    with pytest.raises(ValueError, match="`k=0` must be at least 1"):
        pass_at_k(torch.tensor([2]), torch.tensor([1]), 0)


def test_large_counts_stay_exact():
    """Binomials of 10,000 overflow; the product does not."""
    assert pass_at_k(torch.tensor([10_000]), torch.tensor([1]), 100).item() == pytest.approx(0.01, rel=1e-9)


def test_metric_is_the_mean_over_problems_of_all_batches():
    metric = PassAtK(k=2)
    metric.update(torch.tensor([4, 4]), torch.tensor([0, 1]))
    metric.update(torch.tensor([4]), torch.tensor([4]))
    assert metric.compute().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"`PassAtK\(k=0\)` must be at least 1"):
        PassAtK(k=0)
