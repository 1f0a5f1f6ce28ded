import pytest
import torch
from torch.nn import functional as F

from forge_lightning.components.labels import LabelReader, NoClassesError, loss_doubt

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))
BINARY = (Y > 0).long()
ONE = X[:, :1]


@pytest.mark.parametrize("labels", [Y.int(), Y.to(torch.uint8), Y.to(torch.int8), Y[:, None], Y])
def test_integer_labels_of_any_width_are_classes(labels):
    logits, found = LabelReader().read((X, labels), X)
    assert torch.equal(logits, X)
    assert torch.equal(found, Y)
    assert found.dtype == torch.int64


@pytest.mark.parametrize("labels", [BINARY, BINARY.bool(), BINARY.float(), BINARY[:, None], BINARY.float()[:, None]])
def test_one_output_is_the_logit_of_the_second_of_two_classes(labels):
    logits, found = LabelReader().read((X, labels), ONE)
    assert logits.shape == (16, 2)
    expected = F.binary_cross_entropy_with_logits(ONE[:, 0], BINARY.float())
    torch.testing.assert_close(F.cross_entropy(logits, found), expected)


@pytest.mark.parametrize("labels", [BINARY.bool()])
def test_boolean_labels_of_two_outputs_are_classes(labels):
    assert torch.equal(LabelReader().read((X, labels), X[:, :2])[1], BINARY)


@pytest.mark.parametrize("ignored", [-1, 255, -100])
def test_a_number_that_is_no_class_is_ignored(ignored):
    labels = Y.clone()
    labels[::4] = ignored
    _, found = LabelReader().read((X, labels), X)
    assert F.cross_entropy(X, found) == F.cross_entropy(X, labels, ignore_index=ignored)


def test_an_ignored_class_is_named_by_ignore_index():
    _, found = LabelReader(ignore_index=0).read((X, Y), X)
    assert F.cross_entropy(X, found) == F.cross_entropy(X, Y, ignore_index=0)


@pytest.mark.parametrize(
    ("labels", "outputs", "says"),
    [
        (torch.arange(16), X, r"no classes below 3, .* they hold \[3, 4, 5, 6\]"),
        (torch.arange(16), ONE, r"no classes below 2, .* they hold \[2, 3, 4, 5\]"),
        (torch.randn(16), ONE, "floating-point numbers other than 0 and 1: no classes"),
        (torch.randn(16, 3), X, "float32 numbers: no classes"),
        (None, ONE, "one output, and there are no labels"),
    ],
)
def test_labels_of_regressions_are_no_classes(labels, outputs, says):
    with pytest.raises(NoClassesError, match=says):
        LabelReader().read({"x": X} if labels is None else (X, labels), outputs)


def test_probabilities_are_taken_by_their_logarithms():
    reader = LabelReader()
    with torch.no_grad():
        logits, found = reader.read((X, Y), X.softmax(-1))
        torch.testing.assert_close(F.cross_entropy(logits, found), F.cross_entropy(X, Y))
        logits, found = reader.read((X, BINARY), ONE.sigmoid())
        torch.testing.assert_close(
            F.cross_entropy(logits, found), F.binary_cross_entropy_with_logits(ONE[:, 0], BINARY.float())
        )
        assert torch.equal(reader.read((X, Y), X)[0], X), "logits in another call are logits"
    sure = torch.eye(3)[Y]
    assert LabelReader().read((X, Y), sure)[0].isfinite().all()


def test_a_distribution_over_classes_is_no_label():
    assert LabelReader().read((X, X.softmax(-1)), X)[1] is None


def test_loss_doubt_names_losses_that_differ_and_no_others():
    assert loss_doubt(2.58, 0.52, "val/loss is") is not None
    assert loss_doubt(0.776, 0.386, "val/loss is") is not None
    for nll, loss in ((2.3, 2.4), (0.05, 0.2), (1.0, 1.25), (float("nan"), 1.0), (1.0, float("inf"))):
        assert loss_doubt(nll, loss, "") is None
