import math

import pytest
import torch
from torch import nn

from forge_lightning.grokfast.filter import GradientFilter
from tests.grokfast.test_functional import gradients, published_ema, published_ma, published_projection, relative_error


def run(gradient_filter, steps):
    out = []
    for grads in steps:
        named = {str(i): g.clone() for i, g in enumerate(grads)}
        gradient_filter(named)
        out.append(list(named.values()))
    return out


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"filter": "ema", "alpha": 0.98, "lamb": 2.0}, lambda s: published_ema(s, 0.98, 2.0)),
        ({"filter": "ma", "window_size": 10, "lamb": 5.0}, lambda s: published_ma(s, 10, 5.0)),
        ({"filter": "projection", "alpha": 0.98, "lamb": 0.25}, lambda s: published_projection(s, 0.98, 0.25)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_fifty_steps_of_a_random_net_equal_the_published_formula(options, reference, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))
    steps = []
    for _ in range(50):
        net.zero_grad()
        net(torch.randn(8, 6)).pow(2).mean().backward()
        steps.append([p.grad.clone() for p in net.parameters()])
    filtered = run(GradientFilter(**options), steps)
    for ours, theirs in zip(filtered, reference(steps), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("filter", ["ema", "ma", "projection"])
def test_resume_is_bit_exact(filter):
    steps = gradients(30)
    make = lambda: GradientFilter(filter=filter, window_size=7, schedule="cosine_similarity")  # noqa: E731
    straight, first = make(), make()
    expected = run(straight, steps)
    run(first, steps[:13])
    second = make()
    second.load_state_dict(first.state_dict())
    for a, b in zip(run(second, steps[13:]), expected[13:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert second.steps == straight.steps
    assert second.smoothed_cosine == straight.smoothed_cosine


def test_state_waits_for_gradients_that_come_later():
    """A parameter frozen at the resume keeps its state for when it is not, and for the next checkpoint."""
    first = GradientFilter()
    first({"a": torch.ones(2), "b": torch.ones(3)})
    second = GradientFilter()
    second.load_state_dict(first.state_dict())
    second({"a": torch.ones(2)})
    assert set(second.state_dict()["buffers"]) == {"a", "b"}


def test_a_non_finite_gradient_enters_no_state_and_changes_nothing():
    gradient_filter = GradientFilter(lamb=2.0)
    gradient_filter({"a": torch.ones(2), "b": torch.ones(2)})
    before = gradient_filter.state_dict()
    for bad in (torch.inf, torch.nan):
        grads = {"a": torch.ones(2), "b": torch.tensor([1.0, bad])}
        assert gradient_filter(grads, measure=True) is None
        assert torch.equal(grads["a"], torch.ones(2))
    assert gradient_filter.skipped_steps == 2
    after = gradient_filter.state_dict()
    assert all(torch.equal(before["buffers"][n]["slow"], after["buffers"][n]["slow"]) for n in "ab")
    assert after["steps"] == 1


def test_keep_norm_changes_the_direction_only():
    gradient_filter = GradientFilter(lamb=2.0, alpha=0.5, keep_norm=True)
    for grads in gradients(5):
        named = {str(i): g.clone() for i, g in enumerate(grads)}
        stats = gradient_filter(named, measure=True)
        norm = math.sqrt(sum(g.double().square().sum() for g in named.values()))
        assert norm == pytest.approx(math.sqrt(sum(g.double().square().sum() for g in grads)), rel=1e-5)
        assert stats.grad_norm_after == pytest.approx(stats.grad_norm_before)
    assert not torch.allclose(named["0"], grads[0])


def test_stats_say_what_happened():
    gradient_filter = GradientFilter(lamb=2.0, alpha=0.9)
    first = gradient_filter({"a": torch.tensor([1.0, 0.0])}, measure=True)
    assert math.isnan(first.cosine)
    assert (first.lamb, first.grad_norm_before, first.grad_norm_after) == (2.0, 1.0, pytest.approx(3.0))
    second = gradient_filter({"a": torch.tensor([0.0, 1.0])}, measure=True)
    assert second.cosine == pytest.approx(0.0, abs=1e-6)
    third = gradient_filter({"a": torch.tensor([-1.0, 0.0])}, measure=True)
    assert third.cosine == pytest.approx(-0.9 / math.hypot(0.9, 0.1), rel=1e-5)


def test_cosine_schedule_turns_itself_off_on_noise_and_on_with_a_signal():
    generator = torch.Generator().manual_seed(0)
    gradient_filter = GradientFilter(lamb=2.0, schedule="cosine_similarity")
    noise = [gradient_filter({"a": torch.randn(4000, generator=generator)}, measure=True).lamb for _ in range(60)]
    assert sum(noise[5:]) / len(noise[5:]) < 0.05
    steady = torch.randn(4000, generator=generator)
    signal = [
        gradient_filter({"a": 3 * steady + torch.randn(4000, generator=generator)}, measure=True).lamb
        for _ in range(200)
    ]
    assert signal[-1] > 1.5


def test_other_schedules():
    warmup = GradientFilter(lamb=2.0, lamb_init=1.0, schedule="linear_warmup", warmup_steps=4)
    lambs = [warmup({"a": torch.ones(1)}, measure=True).lamb for _ in range(6)]
    assert lambs == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
    staged = GradientFilter(lamb=2.0, schedule="by_stage", stage_lambs={1: 0.0, 2: 2.0}, lamb_init=0.5)
    lambs = [staged({"a": torch.ones(1)}, stage=stage, measure=True).lamb for stage in (None, 1, 2, 3)]
    assert lambs == [0.5, 0.0, 2.0, 0.5]


@pytest.mark.parametrize(("filter", "expected"), [("ema", (0, 2)), ("ma", (0, 5)), ("projection", (0.05, 0.25))])
def test_defaults_are_those_of_the_literature_and_the_requirements(filter, expected):
    gradient_filter = GradientFilter(filter=filter)
    assert (gradient_filter.lamb_init, gradient_filter.lamb) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "median"}, r"`Me\(filter='median'\)` must be one of"),
        ({"schedule": "exponential"}, r"`Me\(schedule='exponential'\)` must be one of"),
        ({"alpha": 1.0}, r"`Me\(alpha=1.0\)` must be in \[0, 1\)"),
        ({"lamb": -1.0}, r"`Me\(lamb=-1.0\)` must be at least 0"),
        ({"lamb": math.inf}, r"`Me\(lamb=inf\)` must be at least 0 and finite"),
        ({"window_size": 0}, r"`Me\(window_size=0\)` must be at least 1"),
        ({"warmup_steps": 0}, r"`Me\(warmup_steps=0\)` must be at least 1"),
        ({"cosine_decay": 1.0}, r"`Me\(cosine_decay=1.0\)` must be in \[0, 1\)"),
        ({"lamb": 1.0, "lamb_init": 2.0, "schedule": "linear_warmup"}, r"`Me\(lamb_init=2.0\)` must be in \[0, lamb"),
        ({"schedule": "by_stage"}, r"`Me\(stage_lambs=None\)` must be given with schedule='by_stage'"),
        ({"schedule": "by_stage", "stage_lambs": {1: 9.0}}, r"`Me\(stage_lambs=\{1: 9.0\}\)` must be in \[0, lamb=2"),
        ({"ring_dtype": "int8"}, r"`Me\(ring_dtype='int8'\)` must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GradientFilter(**options, owner="Me")


def test_a_state_that_does_not_fit_is_refused():
    first = GradientFilter(filter="ma", window_size=3)
    first({"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"saved with filter='ma' and cannot continue as filter='ema'"):
        GradientFilter(filter="ema").load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"saved with window_size=3 and cannot continue with window_size=4"):
        GradientFilter(filter="ma", window_size=4).load_state_dict(first.state_dict())
    second = GradientFilter(filter="ma", window_size=3)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"filter state of 'a' has shape \(2,\), the parameter \(5,\)"):
        second({"a": torch.ones(5)})


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'e' is sparse"):
        GradientFilter()({"e": embedding.weight.grad})


def test_half_precision_ring_halves_the_memory_and_stays_close():
    steps = gradients(40, [(500,)])
    narrow, wide = (GradientFilter(filter="ma", window_size=10, ring_dtype=d) for d in ("bfloat16", "float32"))
    for a, b in zip(run(narrow, steps), run(wide, steps), strict=True):
        torch.testing.assert_close(a[0], b[0], atol=0.05, rtol=0.02)
    assert narrow._rings["0"].nbytes * 2 == wide._rings["0"].nbytes


def test_defaults_that_the_paper_names():
    gradient_filter = GradientFilter()
    assert (gradient_filter.alpha, gradient_filter.window_size) == (0.98, 100)
    assert (gradient_filter.warmup_steps, gradient_filter.cosine_decay) == (100, 0.9)


@pytest.mark.parametrize("lamb", [0.0, 0.5, 1.0])
def test_it_is_off_at_a_lamb_of_zero_alone(lamb):
    gradient_filter, grads = GradientFilter(lamb=lamb), {"a": torch.ones(2)}
    stats = gradient_filter(grads, measure=True)
    assert gradient_filter.is_off == (lamb == 0)
    assert gradient_filter.steps == int(lamb > 0)
    assert (stats is None) == (lamb == 0)
    assert torch.equal(grads["a"], torch.full((2,), 1 + lamb))


def test_a_first_lamb_counts_only_where_a_schedule_is_on():
    assert GradientFilter(lamb=0.1, lamb_init=0.5).lamb_init == 0.5
    assert GradientFilter(lamb=0.0, lamb_init=0.5, schedule="linear_warmup").is_off


def test_the_cosine_is_smoothed_from_zero():
    """Cosines of NaN, 1 and 1 at a decay of 0.75 give 0, 0.25 and 0.4375."""
    gradient_filter = GradientFilter(lamb=2.0, lamb_init=0.5, schedule="cosine_similarity", cosine_decay=0.75)
    lambs = [gradient_filter({"a": torch.ones(4)}, measure=True).lamb for _ in range(3)]
    assert lambs == pytest.approx([0.0, 0.5 + 1.5 * 0.25, 0.5 + 1.5 * 0.4375])


def test_a_slow_gradient_of_zero_has_no_cosine_and_a_norm_of_zero_is_kept():
    gradient_filter = GradientFilter(lamb=2.0, keep_norm=True)
    zero = gradient_filter({"a": torch.zeros(3)}, measure=True)
    assert (zero.grad_norm_before, zero.grad_norm_after) == (0.0, 0.0)
    assert math.isnan(gradient_filter({"a": torch.ones(3)}, measure=True).cosine)
    cancelled = {"a": torch.full((3,), -1.0)}
    both = GradientFilter(lamb=2.0, alpha=0.5, keep_norm=True)
    both({"a": torch.full((3,), 2.0)})  # the EMA of 2 and -1 at 0.5 is 0.5: -1 + 2 · 0.5 is 0
    stats = both(cancelled, measure=True)
    assert torch.equal(cancelled["a"], torch.zeros(3))
    assert stats.grad_norm_after == 0.0


def test_the_least_settings_are_taken():
    gradient_filter = GradientFilter("ma", window_size=1, lamb=2.0, schedule="linear_warmup", warmup_steps=1)
    assert [gradient_filter({"a": torch.ones(1)}, measure=True).lamb for _ in range(2)] == [0.0, 2.0]
