import io

import pytest
import torch
from torch import nn

from forge_lightning.optim import GrokfastAdamW, GrokfastSGD

PAIRS = [
    (GrokfastAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (GrokfastAdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    (GrokfastSGD, torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps, start=0, closure=False):
    for step in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def loss(x=x):
            optimizer.zero_grad()
            value = model(x).pow(2).mean()
            value.backward()
            return value

        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("ours", "parent", "options"), PAIRS)
def test_lamb_zero_is_the_parent_bit_by_bit(ours, parent, options):
    a, b, c = net(), net(), net()
    plain = train(a, parent(a.parameters(), **options), 20)
    off = train(b, ours(b.parameters(), lamb=0.0, **options), 20)
    on = train(c, ours(c.parameters(), lamb=2.0, alpha=0.9, **options), 20)
    assert torch.equal(plain, off)
    assert not torch.equal(plain, on)


@pytest.mark.parametrize(("ours", "parent", "options"), PAIRS)
def test_a_closure_is_the_same_as_a_backward_before(ours, parent, options):
    """Reading gradients before the closure has run would filter those of the step before."""
    a, b = net(), net()
    assert torch.equal(
        train(a, ours(a.parameters(), alpha=0.9, **options), 10),
        train(b, ours(b.parameters(), alpha=0.9, **options), 10, closure=True),
    )


def test_equals_filtering_by_hand():
    from forge_lightning.functional import ema_filter

    a, b = net(), net()
    ours = train(a, GrokfastSGD(a.parameters(), lr=0.1, alpha=0.9, lamb=2.0, schedule="constant"), 10)
    plain, emas = torch.optim.SGD(b.parameters(), lr=0.1), [None] * 4
    for step in range(10):
        plain.zero_grad()
        b(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).pow(2).mean().backward()
        for i, p in enumerate(b.parameters()):
            p.grad, emas[i] = ema_filter(p.grad, emas[i], alpha=0.9, lamb=2.0)
        plain.step()
    torch.testing.assert_close(ours, torch.cat([p.detach().flatten() for p in b.parameters()]))


@pytest.mark.parametrize("filter", ["ema", "ma", "projection"])
def test_state_dict_resumes_bit_exactly_and_loads_safely(filter):
    options = {"lr": 0.01, "filter": filter, "window_size": 4, "alpha": 0.9}
    a = net()
    straight = train(a, GrokfastAdamW(a.parameters(), **options), 20)
    b = net()
    first = GrokfastAdamW(b.parameters(), **options)
    train(b, first, 9)
    file = io.BytesIO()
    torch.save({"model": b.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    c = net()
    c.load_state_dict(saved["model"])
    second = GrokfastAdamW(c.parameters(), **options)
    second.load_state_dict(saved["optimizer"])
    assert torch.equal(train(c, second, 11, start=9), straight)


def test_the_state_of_a_plain_optimizer_loads():
    a = net()
    plain = torch.optim.AdamW(a.parameters(), lr=0.01)
    train(a, plain, 5)
    ours = GrokfastAdamW(a.parameters(), lr=0.01, schedule="constant")
    ours.load_state_dict(plain.state_dict())
    assert set(ours.state_dict()) == {"state", "param_groups", "grokfast"}
    train(a, ours, 5, start=5)


@pytest.mark.parametrize("kind", [GrokfastAdamW, GrokfastSGD])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_fused_step_comes_to_the_same_also_under_a_scaler(kind, scaled):
    found = []
    for fused in (False, True):
        model = net()
        optimizer = kind(model.parameters(), lr=0.01, alpha=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(10):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step))).pow(2).mean()
            if step == 4:
                loss = loss * (torch.inf if scaled else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`GrokfastSGD\(alpha=2\)` must be in"):
        GrokfastSGD(net().parameters(), alpha=2, schedule="constant")


def test_parameters_added_later_are_filtered():
    model, late = net(), nn.Parameter(torch.ones(3))
    optimizer = GrokfastSGD(model.parameters(), lr=0.1, lamb=2.0, schedule="constant")
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(late.grad, torch.full((3,), 3.0))


def test_learning_rate_schedulers_work():
    model = net()
    optimizer = GrokfastAdamW(model.parameters(), lr=0.1, schedule="constant")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
