import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from forge_lightning.core.labels import LabelReader, NoClassesError, OutputsOfPass, loss_doubt

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
        (torch.arange(16) % 3, ONE, r"no classes below 2, .* they hold \[2\]"),
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


ZERO_TO_ONE = torch.linspace(0.05, 0.95, 16)[:, None]
SOME = torch.tensor([0, 1] * 8)


def test_one_output_is_read_as_the_loss_of_the_step_reads_it():
    as_logit = F.binary_cross_entropy_with_logits(ZERO_TO_ONE[:, 0], SOME.float())
    as_probability = F.binary_cross_entropy(ZERO_TO_ONE[:, 0], SOME.float())
    for loss in (as_logit, as_probability):
        logits, found = LabelReader().read((X, SOME), ZERO_TO_ONE, loss)
        torch.testing.assert_close(F.cross_entropy(logits, found), loss)
    logits, found = LabelReader().read((X, SOME), ZERO_TO_ONE, torch.tensor(17.0))
    torch.testing.assert_close(F.cross_entropy(logits, found), as_probability)


@pytest.mark.parametrize("loss", [None, torch.tensor(0.6931)])
def test_a_head_that_starts_at_zero_puts_out_logits(loss):
    reader = LabelReader()
    reader.read((X, SOME), torch.zeros(16, 1), loss)
    assert torch.equal(reader.read((X, SOME), ZERO_TO_ONE, loss)[0][:, 1:], ZERO_TO_ONE)


@pytest.mark.parametrize(("module", "expected"), [(nn.Sigmoid(), True), (nn.Identity(), False)])
def test_what_computes_outputs_says_what_they_are(module, expected):
    """Whatever the loss, and however few there are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 1), module, nn.Flatten(0))
    nn.init.zeros_(net[0].weight)
    nn.init.constant_(net[0].bias, 0.5)
    reader = LabelReader()
    outputs = net(X[:4]).half().float().unsqueeze(-1).clamp(1e-6, 1 - 1e-6)
    logits, labels = reader.read((X[:4], SOME[:4]), outputs, (outputs - SOME[:4, None]).square().mean())
    assert reader.are_probabilities is expected
    loss = F.binary_cross_entropy if expected else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(F.cross_entropy(logits, labels), loss(outputs[:, 0], SOME[:4].float()))


def test_a_softmax_of_few_digits_returns_probabilities():
    net = nn.Sequential(nn.Linear(3, 300), nn.Softmax(-1))
    outputs = net(X)
    logits, labels = LabelReader().read((X, Y), outputs.bfloat16().float())
    torch.testing.assert_close(F.cross_entropy(logits, labels), F.nll_loss(outputs.log(), Y), rtol=1e-2, atol=1e-2)


def test_missing_float_labels_are_ignored():
    labels = torch.tensor([0.0, 1.0, -1.0, torch.nan] * 4)
    _, found = LabelReader(ignore_index=-1).read((X, labels), ONE)
    assert found.tolist() == [0, 1, -100, -100] * 4


def test_double_precision_is_kept():
    outputs = torch.full((16, 1), 1 - 1e-12, dtype=torch.float64)
    logits, labels = LabelReader().read((X, torch.zeros(16)), outputs, torch.tensor(0.0))
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(-math.log(1e-12), rel=1e-3)


def test_one_output_outside_0_to_1_was_never_a_probability():
    reader = LabelReader()
    assert reader.read((X, SOME), ZERO_TO_ONE)[0][:, 0].any(), "logarithms of both"
    restored = LabelReader()
    restored.load_state_dict(reader.state_dict())
    for each in (reader, restored):
        assert torch.equal(each.read((X, SOME), ONE)[0][:, 1:], ONE)
        assert torch.equal(each.read((X, SOME), ZERO_TO_ONE)[0][:, 1:], ZERO_TO_ONE)
    assert reader.state_dict()["probabilities"] is False


@torch.no_grad()
def test_short_batches_of_one_output_are_read_as_training_was():
    for outputs, loss in ((ZERO_TO_ONE, F.binary_cross_entropy), (ONE, F.binary_cross_entropy_with_logits)):
        reader = LabelReader()
        with torch.enable_grad():
            reader.read((X, SOME), outputs)
        logits, found = reader.read((X[:3], SOME[:3]), ZERO_TO_ONE[:3])
        torch.testing.assert_close(F.cross_entropy(logits, found), loss(ZERO_TO_ONE[:3, 0], SOME[:3].float()))


def test_outputs_of_a_pass_are_probabilities_only_if_all_can_be():
    for last, expected in ((ZERO_TO_ONE, True), (torch.tensor([[1.2]]), False)):
        outputs = OutputsOfPass()
        for batch in (ZERO_TO_ONE[:3], ZERO_TO_ONE, last):
            outputs.see(batch)
        assert outputs.are_probabilities() is expected
    few = OutputsOfPass()
    few.see(ZERO_TO_ONE[:3])
    assert not few.are_probabilities()
    assert few.are_probabilities((0.5, 0.7), [0.3, 0.7])
    assert few.are_probabilities(in_training=True)
    zero = OutputsOfPass()
    zero.see(torch.zeros(100, 1))
    assert not zero.are_probabilities()
    many = OutputsOfPass()
    assert many.see(X.softmax(-1))
    assert many.are_probabilities()
    assert not many.see(X)
    assert not many.are_probabilities()


@pytest.mark.parametrize(
    ("labels", "outputs", "says"),
    [
        (2 * SOME - 1, ONE, "hold -1 and never 0, .* set `ignore_index=-1`"),
        (Y.repeat(2) + 1, X.repeat(2, 1), "hold 3 and never 0, .* set `ignore_index=3`"),
    ],
)
def test_classes_that_are_not_counted_from_0_are_refused(labels, outputs, says):
    with pytest.raises(NoClassesError, match=says):
        LabelReader().read((X, labels), outputs)
    ignored = int(labels.min()) if outputs is ONE and labels.min() < 0 else int(labels.max())
    assert (LabelReader(ignore_index=ignored).classes((X, labels), outputs) == -100).any(), "said to be ignored"


def test_a_batch_without_the_first_class_after_one_with_it_is_no_reason_to_refuse():
    reader = LabelReader()
    reader.classes((X, SOME), ONE)
    assert (reader.classes((X, 2 * SOME - 1), ONE) == -100).sum() == 8
