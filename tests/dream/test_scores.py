"""Loss, success and stored logits of each example, against plain torch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from forge_lightning.dream.scores import KEPT, RowScores, kept_by_example

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 4.0]])
LABELS = torch.tensor([0, 1, 2, -100])


class Table(nn.Module):
    """Returns its logits, whatever the input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits * 1.0


def scored(logits, labels, outputs=None, shift=None):
    network = Table(logits)
    scores = RowScores(network, "labels", shift)
    scores.begin({"x": torch.zeros(len(labels)), "labels": labels})
    network(None)
    assert scores.take()
    assert not scores.take()
    return scores, scores.read(outputs, len(labels))


def test_losses_and_successes_are_those_of_the_logits():
    _, (losses, successes) = scored(LOGITS, LABELS)
    expected = F.cross_entropy(LOGITS[:3], LABELS[:3], reduction="none")
    torch.testing.assert_close(losses[:3], expected)
    assert math.isnan(losses[3])
    assert successes[:3].tolist() == [1.0, 1.0, 0.0]


def test_sequences_are_scored_as_a_whole():
    logits = torch.stack([LOGITS[:2], LOGITS[2:]])
    labels = torch.tensor([[0, 1], [2, -100]])
    _, (losses, successes) = scored(logits, labels)
    assert losses[0] == pytest.approx(float(F.cross_entropy(LOGITS[:2], LABELS[:2])))
    assert losses[1] == pytest.approx(float(F.cross_entropy(LOGITS[2:3], LABELS[2:3])))
    assert successes.tolist() == [1.0, 0.0]


def test_shifted_labels_belong_to_the_position_before():
    logits = LOGITS[:3][None]
    _, (losses, successes) = scored(logits, torch.tensor([[2, 0, 1]]), shift=True)
    assert losses[0] == pytest.approx(float(F.cross_entropy(LOGITS[:2], torch.tensor([0, 1]))))
    assert successes.tolist() == [1.0]


def test_returned_numbers_win_over_logits():
    given = {"example_loss": torch.arange(4.0), "example_success": torch.ones(4)}
    assert [t.tolist() for t in scored(LOGITS, LABELS, given)[1]] == [[0.0, 1.0, 2.0, 3.0], [1.0] * 4]
    losses, successes = scored(LOGITS, LABELS, {"example_loss": torch.arange(4.0)})[1]
    assert losses.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert successes.isnan().all()


def kept_logits(scores, successes, top_k):
    return kept_by_example(scores.logits_to_keep(len(successes), top_k), successes.eq(1))


def test_stored_logits_are_log_probabilities_of_right_examples():
    scores, (_, successes) = scored(LOGITS, LABELS)
    values, classes, totals = kept_logits(scores, successes, 2).values()
    assert [len(v) for v in values] == [1, 1, 0, 0]
    assert classes[0].tolist() == [[0, 1]]
    torch.testing.assert_close(values[0][0], LOGITS[0].log_softmax(0)[:2].half())
    assert totals[1].shape == (1,)


def test_distance_is_zero_for_stored_logits_and_squared_otherwise():
    labels = torch.tensor([0, 1, 2, 2])
    scores, (_, successes) = scored(LOGITS, labels)
    kept = kept_logits(scores, successes, 3)
    assert scores.distance(kept, 4).item() == pytest.approx(0, abs=1e-6)
    moved = LOGITS.clone()
    moved[1, 2] += 0.5  # one logit of three, of one label of four
    later, _ = scored(moved, labels)
    assert later.distance(kept, 4).item() == pytest.approx(0.5**2 / 3 / 4, rel=1e-2)


def test_without_a_network_nothing_is_known():
    scores = RowScores(None, "labels", None)
    scores.begin({"labels": LABELS})
    assert not scores.take()
    with pytest.raises(ValueError, match="no submodule is known to return logits"):
        scores.read(None, 4)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2])])
def test_labels_that_are_missing_or_do_not_fit_are_named(labels):
    scores, _ = scored(LOGITS, LABELS)
    scores._known = labels
    shape = None if labels is None else r"\(3,\)"
    with pytest.raises(ValueError, match=rf"labels {shape} do not fit logits \(4, 3\)"):
        scores.read(None, 4)


def test_there_is_no_distance_where_logits_labels_or_stored_logits_are_missing():
    labels = torch.tensor([0, 1, 2, 2])
    scores, (_, successes) = scored(LOGITS, labels)
    kept = kept_logits(scores, successes, 3)
    assert scores.distance(kept, 4) is not None
    assert scores.distance({}, 4) is None
    logits, known = scores._logits, scores._known
    for missing in ((None, known), (logits, None), (logits, known[:3])):
        scores._logits, scores._known = missing
        assert scores.distance(kept, 4) is None
    scores._logits, scores._known = logits, known
    nothing = {name: [values[0][:0]] * 4 for name, values in kept.items()}
    assert scores.distance(nothing, 4) is None


def test_distance_is_that_of_the_last_examples_over_the_labels_of_all():
    """Two new examples in front of two stored ones, of which one has stored logits."""
    labels = torch.tensor([0, 1, 2, 2])
    scores, (_, successes) = scored(LOGITS, labels)
    values, classes, totals = kept_logits(scores, successes, 3).values()
    kept = {
        KEPT[0]: [values[1], values[2][:0]],
        KEPT[1]: [classes[1], classes[2][:0]],
        KEPT[2]: [totals[1], totals[2][:0]],
    }
    moved = torch.stack([LOGITS[3], LOGITS[0], LOGITS[1], LOGITS[2]])
    moved[2, 0] += 0.6
    later, _ = scored(moved, torch.tensor([2, 0, 1, 2]))
    assert later.distance(kept, 2).item() == pytest.approx(0.6**2 / 3 / 4, rel=1e-2)


def test_shifted_sequences_keep_the_logits_of_the_position_before():
    logits = torch.stack([LOGITS[:3], LOGITS[1:]])
    scores, _ = scored(logits, torch.tensor([[2, 0, -100], [0, -100, 2]]), shift=True)
    values, _, _ = kept_logits(scores, torch.ones(2), 2).values()
    assert [len(part) for part in values] == [1, 1]
    torch.testing.assert_close(values[0][0], LOGITS[0].log_softmax(0)[:2].half())
    torch.testing.assert_close(values[1][0], LOGITS[2].log_softmax(0)[[0, 2]].half())


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("shift", [False, True])
def test_the_distance_by_masks_is_that_of_chosen_rows(top_k, shift, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, moved = torch.randn(2, 5, 4, 3, generator=generator)
    labels = torch.randint(0, 3, (5, 4), generator=generator)
    labels[0, 1:3] = labels[2] = labels[4, 3] = -100
    scores, _ = scored(logits, labels, shift=shift)
    kept = kept_logits(scores, torch.tensor([1.0, 1, 1, 0, 1]), top_k)
    kept = {name: parts[1:] for name, parts in kept.items()}
    found = []
    for reads_are_free in (True, False):
        monkeypatch.setattr("forge_lightning.dream.scores.reads_are_free", lambda device, free=reads_are_free: free)
        later, _ = scored(moved, labels, shift=shift)
        distance = later.distance(kept, 4)
        distance.backward()
        found.append((distance.detach(), later.network.logits.grad))
    assert found[0][0] > 0
    torch.testing.assert_close(found[0], found[1])


def test_logits_are_kept_in_chunks_as_at_once(monkeypatch):
    logits = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    scores, _ = scored(logits, torch.zeros(3, 7, dtype=torch.int64))
    whole = scores.logits_to_keep(2, 2)
    assert whole["stored_values"].shape == (2, 7, 2)
    monkeypatch.setattr("forge_lightning.core.token_loss._ON_CPU", 16)
    for name, tensor in scores.logits_to_keep(2, 2).items():
        assert torch.equal(tensor, whole[name]), name


def test_logits_of_another_number_of_rows_than_labels_are_refused():
    """As of a network that is called once on two views of a batch."""
    scores, _ = scored(LOGITS, LABELS)
    scores._logits = torch.cat([LOGITS, LOGITS])
    with pytest.raises(ValueError, match=r"the labels are \(4,\), the logits \(8, 3\)"):
        scores.logits_to_keep(4, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_where_nothing_is_compared_has_no_gradient(value, monkeypatch):
    monkeypatch.setattr("forge_lightning.dream.scores.reads_are_free", lambda device: False)
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, -100], [2, -100, 3]])
    scores, _ = scored(logits, labels)
    kept = kept_logits(scores, torch.ones(2), 2)
    logits[0, 2, 1] = value
    later, _ = scored(logits + 0.1 * torch.arange(4.0), labels)
    later.distance(kept, 2).backward()
    assert later.network.logits.grad.isfinite().all()
