"""Steps that read nothing from the device come to the same as those that do."""

import math
from functools import cache

import pytest
import torch

from forge_lightning.grokfast import filter as module
from forge_lightning.grokfast.filter import GradientFilter
from forge_lightning.grokfast.optim import GrokfastSGD
from forge_lightning.grokfast.unread import UnreadSteps
from tests.grokfast.test_functional import gradients

SHAPES = [(30, 20), (7,), (3, 5)]


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """The tensors lie on the CPU, and are taken for those of a device that reads wait for."""

    def change(to=True):
        monkeypatch.setattr(module, "reads_are_free", lambda device: not to)

    return change


def steps(count, bad=(), dtype=torch.float32):
    made = [[grad.to(dtype) for grad in step] for step in gradients(count, SHAPES)]
    for step, value in bad:
        made[step][1][2] = value
    return [{str(i): grad for i, grad in enumerate(step)} for step in made]


def run(gradient_filter, given, measured=(), stage=None):
    found = []
    for number, step in enumerate(given):
        step = {name: grad.clone() for name, grad in step.items()}
        gradient_filter(step, measure=number in measured, stage=stage)
        found.append(step)
    return found


OPTIONS = [
    {"filter": "ema", "alpha": 0.9},
    {"filter": "ema", "alpha": 0.9, "keep_norm": True},
    {"filter": "ema", "alpha": 0.9, "schedule": "linear_warmup", "warmup_steps": 9, "lamb_init": 0.5},
    {"filter": "ema", "alpha": 0.9, "schedule": "cosine_similarity", "lamb_init": 0.3, "cosine_decay": 0.7},
    {"filter": "ema", "alpha": 0.9, "schedule": "by_stage", "stage_lambs": {1: 0.5}},
    {"filter": "ma", "window_size": 4},
    {"filter": "ma", "window_size": 4, "ring_dtype": "bfloat16", "keep_norm": True},
    {"filter": "ma", "window_size": 3, "schedule": "linear_warmup", "warmup_steps": 9},
    {"filter": "projection", "alpha": 0.9, "lamb": 0.5},
    {"filter": "projection", "alpha": 0.9, "schedule": "cosine_similarity", "keep_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thirty_steps_with_nan_and_inf_among_them(options, dtype, on_an_accelerator):
    given = steps(30, [(5, math.nan), (6, -math.inf), (17, math.inf)], dtype)
    read, unread = GradientFilter(**options), GradientFilter(**options)
    expected = run(read, given, stage=1)
    on_an_accelerator()
    found = run(unread, given, measured=(20,), stage=1)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {}
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, **tolerance)
    ours, theirs = unread.state_dict(), read.state_dict()
    assert (ours["steps"], ours["skipped_steps"]) == (theirs["steps"], theirs["skipped_steps"]) == (27, 3)
    if theirs["smoothed_cosine"] is None:
        assert ours["smoothed_cosine"] is None
    else:
        assert ours["smoothed_cosine"] == pytest.approx(theirs["smoothed_cosine"], rel=1e-4)
    for name, saved in ours["buffers"].items():
        torch.testing.assert_close(saved, theirs["buffers"][name], **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_resume_is_bit_exact_wherever_it_was_read(options, on_an_accelerator):
    on_an_accelerator()
    given = steps(30, [(5, math.nan), (17, math.inf)])
    straight, first, second = (GradientFilter(**options) for _ in range(3))
    expected = run(straight, given, measured=(15,), stage=1)
    run(first, given[:13], stage=1)
    second.load_state_dict(first.state_dict())
    found = run(second, given[13:], measured=(2,), stage=1)
    for step, wanted in zip(found, expected[13:], strict=True):
        assert all(torch.equal(step[name].nan_to_num(), wanted[name].nan_to_num()) for name in step)
    ours, theirs = second.state_dict(), straight.state_dict()
    assert (ours["steps"], ours["skipped_steps"], ours["smoothed_cosine"]) == (28, 2, theirs["smoothed_cosine"])
    for name, saved in ours["buffers"].items():
        assert all(
            torch.equal(torch.as_tensor(saved[key]), torch.as_tensor(theirs["buffers"][name][key])) for key in saved
        )


def test_a_first_gradient_that_is_not_finite_makes_no_state(on_an_accelerator):
    on_an_accelerator()
    gradient_filter = GradientFilter(lamb=2.0, alpha=0.9)
    gradient_filter({"a": torch.tensor([math.nan, 1.0])})
    grads = {"a": torch.tensor([1.0, 2.0])}
    gradient_filter(grads)
    assert torch.equal(grads["a"], torch.tensor([3.0, 6.0]))
    late = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0])}
    gradient_filter(late)
    assert torch.equal(late["b"], torch.tensor([3.0]))
    assert gradient_filter.state_dict()["skipped_steps"] == 1


def test_an_optimizer_with_the_filter_built_in_reads_nothing(on_an_accelerator):
    found = []
    for accelerator in (False, True):
        on_an_accelerator(accelerator)
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = GrokfastSGD([weight], lr=0.1, alpha=0.9, schedule="constant")
        for step in steps(6):
            weight.grad = step["1"][:4].clone()
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


def test_a_restored_parameter_may_come_back_late(on_an_accelerator):
    on_an_accelerator()
    given = steps(12)
    for filter in ("ema", "ma"):
        straight, first, second = (GradientFilter(filter, window_size=3) for _ in range(3))
        without = [step if number not in (5, 6, 7) else {"0": step["0"]} for number, step in enumerate(given)]
        expected = run(straight, without)
        run(first, without[:5])
        second.load_state_dict(first.state_dict())
        found = run(second, without[5:])
        for step, wanted in zip(found, expected[5:], strict=True):
            assert all(torch.equal(step[name], wanted[name]) for name in step)


@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e-9, 1.0, 1e10, 1e15])
def test_the_cosine_does_not_depend_on_the_size_of_gradients(size, on_an_accelerator):
    on_an_accelerator()
    options = {"alpha": 0.5, "lamb": 2.0, "schedule": "cosine_similarity", "cosine_decay": 0.0}
    gradient_filter = GradientFilter(**options)
    for _ in range(4):
        grads = {"a": torch.full((4,), size)}
        gradient_filter(grads)
    assert gradient_filter.smoothed_cosine == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(grads["a"] / size, torch.full((4,), 3.0), rtol=1e-4, atol=0)


def test_counters_are_read_when_they_are_asked_for(on_an_accelerator):
    on_an_accelerator()
    gradient_filter = GradientFilter()
    run(gradient_filter, steps(6, [(3, math.nan)]))
    assert (gradient_filter.steps, gradient_filter.skipped_steps) == (5, 1)
    run(gradient_filter, steps(2))
    assert gradient_filter.steps == 7


def test_counters_are_as_wide_as_python_s_numbers():
    counters = UnreadSteps(torch.device("cpu"), 2, 1, 0.1, {"a": 3})
    assert counters.smoothed_cosine.dtype == torch.float64
    assert counters.calls == 3
    assert counters.read() == (2, 1, 0.1, {"a": 3})
    assert UnreadSteps(torch.device("cpu"), 0, 0, None, {}).read() == (0, 0, None, {})


def test_gradients_that_are_orthogonal_do_not_turn_the_filter_on(on_an_accelerator):
    on_an_accelerator()
    gradient_filter = GradientFilter(lamb=2.0, lamb_init=0.3, schedule="cosine_similarity")
    gradient_filter({"a": torch.tensor([1.0, 0.0])})
    grads = {"a": torch.tensor([0.0, 1.0])}
    gradient_filter(grads)
    assert gradient_filter.smoothed_cosine == 0.0
    assert torch.equal(grads["a"], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of inductor
def test_compiled_passes_come_to_the_same_and_are_compiled_once(options, backend, on_an_accelerator, monkeypatch):
    if backend != "inductor":
        made = cache(lambda function: torch.compile(function.__wrapped__, dynamic=False, backend=backend))
        monkeypatch.setattr(module, "_compiled", made)
    on_an_accelerator()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given = steps(12, [(5, math.nan)])
    expected = run(GradientFilter(**options), given, measured=(7,), stage=1)
    ours = GradientFilter(**options, compile=True)
    found = run(ours, given[:4], stage=1)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    found += run(ours, given[4:], measured=(3,), stage=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    for step, wanted in zip(found, expected, strict=True):
        for name in wanted:
            torch.testing.assert_close(step[name], wanted[name], equal_nan=True, atol=1e-6, rtol=1e-6)


def test_compile_is_for_accelerators(monkeypatch):
    monkeypatch.setattr(module, "_compiled", None)
    assert run(GradientFilter(compile=True), steps(3))[0].keys() == {"0", "1", "2"}


def test_each_function_has_a_limit_of_its_own(on_an_accelerator, monkeypatch):
    """The compiler counts graphs by code, and decorated functions share that of their decorator."""
    codes = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: codes.append(function.__code__) or function)
    for function in (module.F.ema_step_, module.F.add_scaled_by_, module.F.ma_where_, module.F.ema_products_where_):
        module._compiled.__wrapped__(function)
    assert len(set(codes)) == 4
