import copy
import pickle

import pytest
import torch
from torch import nn

from forge_lightning.core.batch import PositionFields, field_of
from forge_lightning.geometry.activation_tap import ActivationTap

B, T, D = 4, 6, 3


class Layer(nn.Module):
    """Puts out what it is given, in the form asked for."""

    def __init__(self, form=None):
        super().__init__()
        self.form = form

    def forward(self, x):
        return x if self.form is None else self.form(x)


def activations():
    """Row ``(b, t)`` is ``(b, t, 1)``."""
    b, t = torch.meshgrid(torch.arange(B), torch.arange(T), indexing="ij")
    return torch.stack([b, t, torch.ones_like(b)], -1).float()


@pytest.fixture(autouse=True)
def stopped(monkeypatch):
    """No test leaves a tap on, which holds compiled modules up."""
    started, start = [], ActivationTap.start
    monkeypatch.setattr(ActivationTap, "start", lambda tap, *args: started.append(tap) or start(tap, *args))
    yield
    for tap in started:
        tap.stop()


def tapped(fields=None, limit=1000, form=None, x=None, seed=0, **options):
    layer = Layer(form)
    tap = ActivationTap({"layer": layer}, **options)
    tap.attach()
    tap.start(fields or PositionFields(), limit, seed)
    try:
        layer(activations() if x is None else x)
        if tap.error is not None:
            raise tap.error
        rows = torch.cat(tap.rows["layer"])
    finally:
        tap.detach()
    assert not layer._forward_hooks
    return sorted((int(row[0]), int(row[1])) for row in rows)


MASK = torch.arange(T) < torch.tensor([[6], [3], [1], [4]])
LABELS = torch.where(torch.arange(T) >= 2, 7, -100).expand(B, T)
EVERY = [(b, t) for b in range(B) for t in range(T)]


def test_padding_never_enters():
    assert tapped(PositionFields(mask=MASK), positions="all") == [(b, t) for b, t in EVERY if MASK[b, t]]


def test_layers_that_put_positions_first_are_turned():
    turned = tapped(PositionFields(mask=MASK), positions="all", form=lambda x: x.transpose(0, 1))
    assert turned == [(b, t) for b, t in EVERY if MASK[b, t]]
    last = tapped(PositionFields(mask=MASK), positions="last", form=lambda x: x.transpose(0, 1))
    assert last == [(0, 5), (1, 2), (2, 0), (3, 3)]


def test_a_mask_that_does_not_fit_is_refused_where_it_matters():
    shorter = lambda x: x[:, :4]  # noqa: E731
    with pytest.raises(ValueError, match=r"mask is \(4, 6\) and a layer returns \(4, 4\)"):
        tapped(PositionFields(mask=MASK), positions="all", form=shorter)
    assert len(tapped(PositionFields(mask=torch.ones(B, T)), positions="all", form=shorter)) == 16
    assert len(tapped(PositionFields(mask=MASK), form=lambda x: x[:, 0])) == B  # one row an example


def test_labelled_positions_are_taken_where_there_are_labels():
    expected = [(b, t) for b, t in EVERY if MASK[b, t] and t >= 2]
    for positions in ("auto", "labelled"):
        assert tapped(PositionFields(mask=MASK, labels=LABELS), positions=positions) == expected
    assert tapped(PositionFields(labels=torch.zeros(B))) == EVERY


def test_the_first_position_is_left_out_where_others_are_labelled():
    assert tapped(PositionFields(labels=torch.zeros(B, T))) == [(b, t) for b, t in EVERY if t > 0]
    only_first = torch.where(torch.arange(T) == 0, 1, -100).expand(B, T)
    assert tapped(PositionFields(labels=only_first)) == [(b, 0) for b in range(B)]


def test_the_last_position_is_the_last_that_is_not_padding():
    assert tapped(PositionFields(mask=MASK), positions="last") == [(0, 5), (1, 2), (2, 0), (3, 3)]
    assert tapped(positions="last") == [(b, T - 1) for b in range(B)]


def test_a_layer_that_puts_out_one_position_gives_all():
    assert tapped(PositionFields(mask=MASK), form=lambda x: x[:, -1:], positions="last") == [
        (b, T - 1) for b in range(B)
    ]


def test_each_token_counts_once_on_request():
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(B, T)
    rows = tapped(PositionFields(tokens=tokens), unique_tokens=True)
    assert sorted(t % 3 for _, t in rows) == [0, 1, 2]


def test_each_token_counts_once_over_all_batches_of_a_probe():
    layer = Layer()
    tap = ActivationTap({"layer": layer}, unique_tokens=True)
    tap.attach()
    counts = []
    for ids in ([0, 1, 2, 0, 1, 2], [2, 3, 4, 2, 3, 4]):
        tap.start(PositionFields(tokens=torch.tensor([ids]).expand(B, T)), 100, 0)
        layer(activations())
        tap.stop()
        counts.append(tap.num_rows())
    tap.clear()
    tap.start(PositionFields(tokens=torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(B, T)), 100, 0)
    layer(activations())
    assert [*counts, tap.num_rows()] == [3, 5, 3]


def test_hooks_are_neither_pickled_nor_shared_with_a_copy():
    layer = Layer()
    tap = ActivationTap({"layer": layer})
    tap.attach()
    pickled = pickle.dumps(layer)
    assert b"forge_lightning" not in pickled
    tap.start(PositionFields(), 100, 0)
    pickle.loads(pickled)(activations())
    copy.deepcopy(layer)(activations())
    assert tap.num_rows() == 0
    layer(activations())
    assert tap.num_rows() == B * T


def test_sampling_follows_the_seed_and_nothing_else():
    state = torch.get_rng_state()
    first = tapped(limit=5, seed=1)
    torch.rand(3)
    assert len(first) == 5
    assert tapped(limit=5, seed=1) == first
    assert tapped(limit=5, seed=2) != first
    torch.set_rng_state(state)
    tapped(limit=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda x: (x, None), {}),
        (lambda x: [None, x], {}),
        (lambda x: {"hidden": x}, {}),
        (lambda x: {"other": x + 100, "hidden": x}, {"output_key": "hidden"}),
        (lambda x: x.flatten(0, 1), {}),
        (lambda x: x[:, :, :, None].transpose(1, 2).transpose(1, 2)[..., 0], {}),
    ],
)
def test_other_forms_of_output(form, options):
    assert tapped(form=form, **options) == EVERY


def test_images_are_one_row_per_example():
    layer = nn.Conv2d(3, 4, 3)
    tap = ActivationTap({"layer": layer})
    tap.attach()
    tap.start(PositionFields(), 5, 0)
    layer(torch.randn(7, 3, 8, 8))
    assert tap.rows["layer"][0].shape == (5, 4 * 6 * 6)


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        (lambda x: None, {}, "holds no activations"),
        (lambda x: {"ids": x.long()}, {}, "output_key"),
        (lambda x: x[0, 0], {}, r"\(3,\)"),
        (lambda x: x, {"positions": "labelled"}, "needs labels of shape"),
    ],
)
def test_what_cannot_be_tapped_says_what_to_set(form, options, says):
    with pytest.raises(ValueError, match=says):
        tapped(form=form, **options)


def test_only_the_first_call_of_a_layer_counts():
    """Gradient checkpointing calls it again in the backward pass."""
    layer = Layer()
    tap = ActivationTap({"layer": layer})
    tap.attach()
    tap.start(PositionFields(), 100, 0)
    layer(activations())
    layer(activations())
    tap.stop()
    layer(activations())
    assert tap.num_rows() == B * T


def test_fields_by_key_attribute_and_position():
    mask = torch.ones(2)

    class Batch:
        attention_mask = mask

    assert field_of({"attention_mask": mask}, "attention_mask") is mask
    assert field_of(Batch(), "attention_mask") is mask
    assert field_of((None, mask), 1) is mask
    assert field_of((mask,), 4) is None
    assert field_of({"attention_mask": [1]}, "attention_mask") is None


def test_rows_of_another_width_replace_those_before():
    layer = Layer()
    tap = ActivationTap({"layer": layer})
    tap.attach()
    for width in (6, 9):
        tap.start(PositionFields(), 5, 0)
        layer(torch.ones(4, width))
    assert torch.cat(tap.rows["layer"]).shape == (4, 9)


@pytest.mark.parametrize("first", [0, 1])
def test_taps_that_end_in_any_order_leave_the_compiler_on(first):
    from torch._dynamo import eval_frame

    taps = [ActivationTap({"layer": Layer()}) for _ in range(2)]
    for tap in taps:
        tap.start(PositionFields(), 5, 0)
    taps[first].stop()
    assert eval_frame._stance.stance == "force_eager"
    taps[1 - first].stop()
    assert eval_frame._stance.stance == "default"
