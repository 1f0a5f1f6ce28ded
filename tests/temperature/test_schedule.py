"""The schedule of temperatures, the teacher, and the tap, without a Trainer."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from forge_lightning.core.logit_tap import (
    LogitTap,
    find_network,
    given_labels,
    is_shifted,
    logits_of,
    predicted_rows,
    share_of_rows,
)
from forge_lightning.temperature.schedule import TemperatureSchedule
from forge_lightning.temperature.teacher import EMATeacher

BINS = [(2, 4), (1, 2), (0.5, 1)]


def test_round_one_stays_inside_its_bin():
    schedule = TemperatureSchedule(BINS)
    drawn = [schedule.draw(step) for step in range(500)]
    assert {index for index, _ in drawn} == {0}
    assert 2 <= min(t for _, t in drawn) < 2.1
    assert 3.9 < max(t for _, t in drawn) <= 4


def test_draws_depend_on_seed_and_step_alone():
    a, b, c = TemperatureSchedule(BINS, seed=1), TemperatureSchedule(BINS, seed=1), TemperatureSchedule(BINS, seed=2)
    before = torch.get_rng_state()
    assert [a.draw(step) for step in range(20)] == [b.draw(step) for step in reversed(range(20))][::-1]
    assert [a.draw(step) for step in range(20)] != [c.draw(step) for step in range(20)]
    assert torch.equal(before, torch.get_rng_state())


def test_bins_end_when_their_likelihood_stops_improving():
    schedule = TemperatureSchedule(BINS, patience=2)
    for nll in (3.0, 2.9, 2.8, 2.8, 2.7):
        schedule.observe([nll, 9.0, 9.0])
    assert schedule.index == 0
    schedule.observe([2.7, 9.0, 9.0])
    schedule.observe([2.71, 9.0, 9.0])
    assert schedule.index == 1  # others' likelihoods do not matter, nor does what was before
    schedule.observe([1.0, 9.0, 9.0])
    schedule.observe([1.0, 9.1, 9.0])
    schedule.observe([1.0, 9.1, 9.0])
    assert (schedule.round, schedule.index) == (1, 2)
    for _ in range(3):
        schedule.observe([1.0, 1.0, 5.0])
    assert schedule.round == 2


def test_bins_end_after_so_many_steps():
    schedule = TemperatureSchedule(BINS, max_steps_per_bin=3)
    seen = []
    for _ in range(10):
        schedule.count_step()
        seen.append((schedule.round, schedule.index))
    assert seen == [(1, 0)] * 2 + [(1, 1)] * 3 + [(1, 2)] * 3 + [(2, 2)] * 2


def in_round_two(nll, **kwargs):
    schedule = TemperatureSchedule(BINS, max_steps_per_bin=1, **kwargs)
    for _ in BINS:
        schedule.count_step()
    schedule.observe(nll)
    return schedule


def test_round_two_draws_by_need_from_bins_that_overlap():
    schedule = in_round_two([3.0, 2.0, 1.0], overlap=0.25)
    drawn = [schedule.draw(step) for step in range(4000)]
    shares = Counter(index for index, _ in drawn)
    assert [shares[i] / 4000 for i in range(3)] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.03)
    of_first = [t for index, t in drawn if index == 0]
    assert min(of_first) == pytest.approx(2 / 2**0.25, rel=0.01)
    assert max(of_first) == pytest.approx(4 * 2**0.25, rel=0.01)


@pytest.mark.parametrize("nll", [[math.nan] * 3, [0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]])
def test_weights_of_what_is_not_known(nll):
    assert in_round_two(nll).weights() == pytest.approx([1 / 3] * 3)


def test_state_goes_on():
    schedule = in_round_two([3.0, 2.0, 1.0])
    other = TemperatureSchedule(BINS, max_steps_per_bin=1)
    other.load_state_dict(schedule.state_dict())
    assert [other.draw(step) for step in range(50)] == [schedule.draw(step) for step in range(50)]
    with pytest.raises(ValueError, match=r"saved with bins=.* and cannot be resumed with bins=\[\(1.0, 2.0\)\]"):
        TemperatureSchedule([(1, 2)]).load_state_dict(schedule.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bins": []}, "at least one"),
        ({"bins": [(0, 1)]}, r"not \(0, 1\)"),
        ({"bins": [(2, 1)]}, "low < high"),
        ({"bins": [(1, 2, 3)]}, "low, high"),
        ({"bins": BINS, "overlap": -0.1}, "overlap=-0.1"),
        ({"bins": BINS, "patience": 0}, "patience=0"),
        ({"bins": BINS, "min_improvement": -1}, "min_improvement=-1"),
        ({"bins": BINS, "max_steps_per_bin": 0}, "max_steps_per_bin=0.*or None"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(**kwargs)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_teacher_is_the_mean_of_the_weights():
    net = network()
    teacher = EMATeacher(net, decay=0.9)
    teacher.begin()
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    for n in range(1, 6):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        teacher.update()
        decay = min(0.9, (1 + n) / (10 + n))
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    means = teacher.state_dict()["means"]
    assert means.keys() == expected.keys()
    for name, mean in means.items():
        assert torch.allclose(mean, expected[name], atol=1e-6)


def test_teacher_leaves_the_network_as_it_was():
    net = network().train()
    net[1].eval()
    teacher = EMATeacher(net, decay=0.5)
    teacher.begin()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    memory = [p.data_ptr() for p in net.parameters()]
    x = torch.randn(6, 4)
    rng = torch.get_rng_state()
    out = teacher(x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not out.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert memory == [p.data_ptr() for p in net.parameters()]
    assert [m.training for m in net] == [True, False, True, True]
    reference = network().eval()
    assert torch.allclose(out, reference(x))


def test_teacher_between_forward_and_backward_changes_no_gradient():
    gradients = []
    for taught in (False, True):
        net = network()
        net[1].p = 0.0
        teacher = EMATeacher(net, decay=0.5)
        teacher.begin()
        with torch.no_grad():
            net[0].weight.add_(1.0)
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        loss = net(x).square().sum()
        if taught:
            teacher(x)
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_teacher_restores_weights_when_the_call_fails():
    net = network()
    teacher = EMATeacher(net, decay=0.5)
    teacher.begin()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    weight = net[0].weight.clone()
    with pytest.raises(RuntimeError):
        teacher(torch.randn(6, 5))
    assert torch.equal(net[0].weight, weight)
    assert net.training


def test_teacher_under_autocast_does_not_leave_its_casts():
    """Autocast caches the casts of weights: the teacher's must not be what the network is run with."""
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    teacher = EMATeacher(net, decay=0.5)
    teacher.begin()
    with torch.no_grad():
        net.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        torch.clear_autocast_cache()
        other = teacher(x)
        again = net(x)
    assert torch.equal(again, expected)
    assert again.requires_grad
    assert not torch.allclose(other, expected)


def test_teacher_takes_what_is_unfrozen_late_and_leaves_the_rest():
    net = network()
    net[0].requires_grad_(False)
    teacher = EMATeacher(net, decay=0.9)
    teacher.begin()
    assert set(teacher.state_dict()["means"]) == {"2.weight", "2.bias", "3.weight", "3.bias"}
    net[0].requires_grad_(True)
    teacher.update()
    assert "0.weight" in teacher.state_dict()["means"]
    for p in net.parameters():  # as `toggle_optimizer` does: it is still the mean that is used
        p.requires_grad_(False)
    with torch.no_grad():
        before = teacher(torch.ones(2, 4))
        net[3].weight.add_(1.0)
    assert torch.equal(teacher(torch.ones(2, 4)), before)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no weights that are trained"):
        EMATeacher(frozen, decay=0.9).begin()


def test_teacher_of_half_precision_weights_is_single():
    net = nn.Linear(4, 3).bfloat16()
    teacher = EMATeacher(net, decay=0.999)
    teacher.begin()
    assert teacher.state_dict()["means"]["weight"].dtype == torch.float32
    assert teacher(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_teacher_state_goes_on_and_must_fit():
    net = network()
    teacher = EMATeacher(net, decay=0.9)
    teacher.begin()
    teacher.update()
    other = EMATeacher(network(), decay=0.9)
    other.load_state_dict(teacher.state_dict())
    assert other.state_dict()["means"].keys() == teacher.state_dict()["means"].keys()  # before it is used, too
    x = torch.randn(3, 4)
    assert torch.equal(other(x), teacher(x))
    wrong = EMATeacher(nn.Sequential(nn.Linear(4, 9)), decay=0.9)
    wrong.load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match=r"teacher has '0.weight' of shape \(8, 4\), the network \(9, 4\)"):
        wrong.begin()


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("wrap", [lambda x: x, Output, lambda x: {"logits": x}, lambda x: (x, None)])
def test_logits_are_found(wrap):
    x = torch.randn(2, 3)
    assert logits_of(wrap(x)) is x


@pytest.mark.parametrize(
    "output", [torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, dtype=torch.long), {"loss": torch.zeros(1)}, 3]
)
def test_what_are_no_logits(output):
    with pytest.raises(ValueError, match=r"the network returns .*; logits are \(B, V\) or \(B, T, V\)"):
        logits_of(output)


def test_tap_gives_the_last_call_once_and_forgets():
    net = nn.Linear(2, 3)
    tap = LogitTap(net)
    net(torch.zeros(1, 2))
    assert tap.take() is None
    tap.start()
    net(torch.zeros(1, 2))
    out = net(torch.ones(4, 2))
    args, kwargs, logits = tap.take()
    assert logits is out
    assert (len(args[0]), kwargs) == (4, {})
    assert tap.take() is None
    net(torch.zeros(1, 2))
    tap.start(with_gradient=True)
    counted = net(torch.zeros(1, 2))
    with torch.no_grad():
        net(torch.zeros(2, 2))  # somebody only looks
    assert tap.take()[2] is counted
    tap.stop()
    assert tap.take() is None
    tap.detach()
    assert not net._forward_hooks


def test_network_is_found_or_asked_for():
    class Module(nn.Module):
        def __init__(self, **children):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    assert find_network(Module(anything=a, loss=nn.CrossEntropyLoss())) is a
    assert find_network(Module(encoder=a, model=b)) is b
    assert find_network(Module(encoder=a, other=nn.Sequential(b)), "other.0") is b
    with pytest.raises(ValueError, match=r"cannot infer which submodule .*candidates: 'encoder', 'other'"):
        find_network(Module(encoder=a, other=b))
    with pytest.raises(ValueError, match=r"no submodule is called 'x'. There are \['encoder'\]"):
        find_network(Module(encoder=a), "x")


def test_labels_are_found():
    y = torch.tensor([1, 2])
    x = torch.randn(2, 3)
    for batch in ({"labels": y}, {"x": x, "target": y}, (x, y), [x, y]):
        assert given_labels(batch, "auto") is y
    assert given_labels({"mine": y}, "auto") is None
    assert given_labels({"mine": y}, "mine") is y
    assert given_labels((y, x), "auto") is x
    assert given_labels((y, x), 0) is y
    assert given_labels(x, "auto") is None


def test_rows_that_count():
    logits = torch.arange(24.0).view(2, 3, 4)
    labels = torch.tensor([[0, 1, -100], [-100, -100, 2]])
    rows, targets = predicted_rows(logits, labels, None, shift=False)
    assert torch.equal(rows, torch.stack([logits[0, 0], logits[0, 1], logits[1, 2]]))
    assert targets.tolist() == [0, 1, 2]
    rows, targets = predicted_rows(logits, labels, None, shift=True)
    assert torch.equal(rows, torch.stack([logits[0, 0], logits[1, 1]]))
    assert targets.tolist() == [1, 2]
    for dtype in (torch.uint8, torch.int32):  # which cannot say -100, or are no index
        rows, targets = predicted_rows(logits, torch.tensor([[0, 1, 2], [3, 1, 2]], dtype=dtype), None, shift=True)
        assert torch.equal(rows, logits[:, :-1].flatten(0, 1))
        assert targets.tolist() == [1, 2, 1, 2]
    rows, targets = predicted_rows(logits, None, torch.tensor([[1, 1, 0], [1, 0, 0]]), shift=True)
    assert (len(rows), targets) == (3, None)
    assert len(predicted_rows(logits, None, None, shift=True)[0]) == 6
    flat, of_flat = predicted_rows(logits[:, 0], torch.tensor([1, -100]), None, shift=True)
    assert (len(flat), of_flat.tolist()) == (1, [1])
    channels_first = logits.transpose(1, 2)
    for bad in (channels_first, logits[:, 0]):
        with pytest.raises(ValueError, match=r"the labels are \(2, 3\), the logits .* must be alike"):
            predicted_rows(bad, labels, None, shift=False)


def test_a_share_of_the_rows_goes_round():
    logits, labels, mask = torch.randn(4, 3, 5), torch.arange(12).view(4, 3), torch.ones(4, 3)
    kept = torch.randn(1, 3)  # as positions that all rows share
    seen = []
    for step in range(4):
        call, some, none = share_of_rows(((logits,), {"x": kept, "y": labels}, logits), labels, mask, 0.75, step)
        args, kwargs, chosen = call
        flat, of_flat, _ = share_of_rows(((labels,), {}, logits.flatten(0, 1)), labels.flatten(), None, 0.75, step)
        assert torch.equal(args[0], chosen)
        assert torch.equal(kwargs["y"], some)
        assert kwargs["x"] is kept
        assert torch.equal(flat[2].view(3, 3, 5), chosen)
        assert torch.equal(of_flat.view(3, 3), some)
        assert none is None  # labels say what counts
        seen += (some[:, 0] // 3).tolist()
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    _, _, masked = share_of_rows(((logits,), {}, logits), None, torch.arange(4)[:, None], 0.25, 6)
    assert masked.tolist() == [[2]]
    with pytest.raises(ValueError, match="called without a tensor"):
        share_of_rows(((None,), {}, logits), labels, None, 0.5, 0)


def test_labels_of_encoder_decoders_are_not_shifted():
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    gpt2 = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    t5 = AutoConfig.for_model("t5", num_layers=1, d_model=8, d_kv=4, num_heads=1, d_ff=8, vocab_size=9)
    assert is_shifted(AutoModelForCausalLM.from_config(gpt2))
    assert not is_shifted(AutoModelForSeq2SeqLM.from_config(t5))
    assert not is_shifted(nn.Linear(1, 1))
