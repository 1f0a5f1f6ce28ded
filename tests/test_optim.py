import io

import pytest
import torch
from torch import nn

from forge_lightning.optim import GrokfastAdamW, GrokfastSGD, MuonAdamW

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
    ours = train(a, GrokfastSGD(a.parameters(), lr=0.1, alpha=0.9, lamb=2.0), 10)
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
    ours = GrokfastAdamW(a.parameters(), lr=0.01)
    ours.load_state_dict(plain.state_dict())
    assert set(ours.state_dict()) == {"state", "param_groups", "grokfast"}
    train(a, ours, 5, start=5)


def test_fused_and_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`GrokfastAdamW\(fused=True\)`"):
        GrokfastAdamW(net().parameters(), fused=True)
    with pytest.raises(ValueError, match=r"`GrokfastSGD\(alpha=2\)` must be in"):
        GrokfastSGD(net().parameters(), alpha=2)


def test_parameters_added_later_are_filtered():
    model, late = net(), nn.Parameter(torch.ones(3))
    optimizer = GrokfastSGD(model.parameters(), lr=0.1, lamb=2.0)
    train(model, optimizer, 3)
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(late.grad, torch.full((3,), 3.0))


def test_learning_rate_schedulers_work():
    model = net()
    optimizer = GrokfastAdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


MUON = {"lr": 0.05, "weight_decay": 0.5, "momentum": 0.9, "ns_steps": 4}


def test_muon_beside_adamw_is_both_of_them_stepped_in_turn():
    from forge_lightning.optim import MuonAdamW

    a, b = net(), net()
    together = train(a, MuonAdamW(a.parameters(), **MUON, adamw_lr=3e-3), 10)
    muon = torch.optim.Muon([p for p in b.parameters() if p.ndim == 2], **MUON)
    adamw = torch.optim.AdamW([p for p in b.parameters() if p.ndim != 2], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)

    class Both:
        def zero_grad(self):
            b.zero_grad()

        def step(self):
            muon.step()
            adamw.step()

    assert torch.equal(together, train(b, Both(), 10))


@pytest.mark.parametrize("named", [False, True])
def test_muon_beside_adamw_goes_on_from_its_state_under_a_schedule(named):
    import copy

    from forge_lightning.optim import MuonAdamW

    def start(model):
        optimizer = MuonAdamW(model.named_parameters() if named else model.parameters(), **MUON)
        return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8)

    def steps(model, optimizer, schedule, start, count):
        for step in range(start, start + count):
            flat = train(model, optimizer, 1, start=step)
            schedule.step()
        return flat

    a = net()
    straight = steps(a, *start(a), 0, 8)
    b = net()
    optimizer, schedule = start(b)
    steps(b, optimizer, schedule, 0, 3)
    assert [group["lr"] for group in optimizer.param_groups] != [MUON["lr"], 1e-3]
    buffer = io.BytesIO()
    torch.save([b.state_dict(), optimizer.state_dict(), schedule.state_dict()], buffer)
    buffer.seek(0)
    weights, state, progress = torch.load(buffer, weights_only=True)
    c = net()
    c.load_state_dict(weights)
    optimizer, schedule = start(c)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(progress)
    assert torch.equal(steps(c, optimizer, schedule, 3, 5), straight)
    d = copy.deepcopy(optimizer)
    assert d.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_group_says_which_of_the_two_has_it():
    from forge_lightning.optim import MuonAdamW

    model = net()
    groups = [
        {"params": model[0].parameters(), "use_muon": False, "lr": 0.5},
        {"params": model[2].parameters(), "weight_decay": 0.3},
    ]
    found = [(g["use_muon"], g["lr"], g["weight_decay"]) for g in MuonAdamW(groups, lr=0.02).param_groups]
    assert found == [(False, 0.5, 0.0), (True, 0.02, 0.3), (False, 1e-3, 0.3)]
    with pytest.raises(ValueError, match="only hold parameters of two dimensions"):
        MuonAdamW([{"params": model.parameters(), "use_muon": True}])
    with pytest.raises(ValueError, match="Learning rate"):
        MuonAdamW(model.parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="beta"):
        MuonAdamW(model.parameters(), adamw_betas=(0.9, 1.5))


def test_transposed_weights_move_as_those_the_other_way_round():
    """GPT-2 keeps its matrices as (inputs, outputs): Muon's factor is that of (outputs, inputs)."""
    for shape in ((8, 32), (32, 8), (8, 8)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        plain, turned = nn.Parameter(weight.clone()), nn.Parameter(weight.T.clone())
        optimizers = [MuonAdamW([plain], lr=0.1), MuonAdamW([{"params": [turned], "transposed": True}], lr=0.1)]
        for _ in range(3):
            plain.grad, turned.grad = grad.clone(), grad.T.clone()
            for optimizer in optimizers:
                optimizer.step()
        moved = plain.detach() - weight
        assert (turned.detach().T - plain.detach()).norm() < 0.05 * moved.norm()  # an iteration in 16 bits
        assert optimizers[1].param_groups[0]["lr"] == 0.1
        assert optimizers[1].param_groups[0]["weight_decay"] == 0.1


def test_transposed_weights_of_two_shapes_have_their_own_factors():
    wide, tall = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 32), (32, 8)))
    optimizer = MuonAdamW([{"params": [wide, tall], "transposed": True}], lr=0.1, weight_decay=0.0)
    for param in (wide, tall):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert float(wide.detach().norm() / tall.detach().norm()) == pytest.approx(2.0, rel=0.1)
    clone = MuonAdamW([{"params": [nn.Parameter(p.detach().clone()) for p in (wide, tall)], "transposed": True}])
    clone.load_state_dict(optimizer.state_dict())
    assert [group["transposed"] for group in clone.param_groups] == [True, True]
