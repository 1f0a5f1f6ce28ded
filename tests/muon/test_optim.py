import copy
import io
import pickle

import pytest
import torch
from torch import nn

from forge_lightning.muon import optim
from forge_lightning.muon.functional import newton_schulz
from forge_lightning.optim import MuonAdamW
from tests.grokfast.test_optim import net, train

MUON = {"lr": 0.05, "weight_decay": 0.5, "momentum": 0.9, "ns_steps": 4}


def by_hand(matrices, grads, momenta, *, lr, weight_decay, momentum, ns_steps, nesterov=True, match=False):
    """One step of Muon on each matrix, by the published formula in double precision."""
    for matrix, grad, moving in zip(matrices, grads, momenta, strict=True):
        moving.mul_(momentum).add_(grad, alpha=1 - momentum)
        update = (1 - momentum) * grad + momentum * moving if nesterov else moving
        u, s, vh = torch.linalg.svd(update / update.norm(), full_matrices=False)
        for _ in range(ns_steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        rows, columns = matrix.shape
        factor = 0.2 * max(rows, columns) ** 0.5 if match else max(1, rows / columns) ** 0.5
        matrix.mul_(1 - lr * weight_decay).sub_(u @ torch.diag(s) @ vh, alpha=lr * factor)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_muon_takes_the_published_step_for_matrices_of_all_shapes(nesterov, adjust_lr_fn):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 3), (3, 6), (6, 3), (4, 4), (6, 3)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    wanted = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(matrix) for matrix in wanted]
    optimizer = MuonAdamW(params, **MUON, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        grads = [param.grad.double() for param in params]
        by_hand(wanted, grads, momenta, **MUON, nesterov=nesterov, match=adjust_lr_fn == "match_rms_adamw")
    for param, matrix, moving in zip(params, wanted, momenta, strict=True):
        torch.testing.assert_close(param.detach().double(), matrix, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(optimizer.state[param]["momentum_buffer"].double(), moving, atol=1e-6, rtol=1e-5)


def test_muon_goes_the_way_of_torchs():
    """torch multiplies in bf16, which is a rounding of what ours does."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 24, generator=generator)
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [MuonAdamW([ours], **MUON), torch.optim.Muon([torchs], **MUON)]
    for _ in range(3):
        ours.grad = torch.randn(16, 24, generator=generator)
        torchs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = ours.detach() - start
    assert (ours.detach() - torchs.detach()).norm() < 0.02 * moved.norm()


def test_other_parameters_take_the_step_of_adamw():
    a, b = net(), net()
    train(a, MuonAdamW(a.parameters(), **MUON, adamw_lr=3e-3), 1)
    vectors = [p for p in b.parameters() if p.ndim != 2]
    train(b, torch.optim.AdamW(vectors, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0), 1)
    for ours, plain in zip(a.parameters(), b.parameters(), strict=True):
        if ours.ndim != 2:
            assert torch.equal(ours, plain)


def test_a_stack_holds_no_more_than_its_share_of_memory(monkeypatch):
    """Matrices of one shape in several stacks move as in one, and those without a gradient stay."""
    stacks = []

    def counted(matrices, *args):
        stacks.append(len(matrices))
        return newton_schulz(matrices, *args)

    monkeypatch.setattr(optim, "newton_schulz", counted)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 4, generator=generator) for _ in range(6)]
    found = []
    for most in (1 << 20, 32):
        monkeypatch.setattr(optim, "_MOST_STACKED", most)
        params = [nn.Parameter(value.clone()) for value in start]
        for param, grad in zip(params[:5], start[1:], strict=True):
            param.grad = grad.clone()
        MuonAdamW(params, **MUON).step()
        found.append(torch.stack([p.detach() for p in params]))
    assert stacks == [5, 2, 2, 1]
    torch.testing.assert_close(*found)
    assert torch.equal(found[0][5], start[5])


@pytest.mark.parametrize("named", [False, True])
def test_muon_beside_adamw_goes_on_from_its_state_under_a_schedule(named):
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
        assert (turned.detach().T - plain.detach()).norm() < 1e-5 * moved.norm()
        assert optimizers[1].param_groups[0]["lr"] == 0.1
        assert optimizers[1].param_groups[0]["weight_decay"] == 0.1


def test_transposed_weights_of_two_shapes_have_their_own_factors():
    wide, tall = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 32), (32, 8)))
    optimizer = MuonAdamW([{"params": [wide, tall], "transposed": True}], lr=0.1, weight_decay=0.0)
    wide.grad = torch.randn(wide.shape, generator=torch.Generator().manual_seed(0))
    tall.grad = wide.grad.T.clone()
    optimizer.step()
    assert float(wide.detach().norm() / tall.detach().norm()) == pytest.approx(2.0, rel=1e-5)
    clone = MuonAdamW([{"params": [nn.Parameter(p.detach().clone()) for p in (wide, tall)], "transposed": True}])
    clone.load_state_dict(optimizer.state_dict())
    assert [group["transposed"] for group in clone.param_groups] == [True]


def test_an_optimizer_that_was_pickled_goes_on_as_before():
    straight, pickled = net(), net()
    optimizer = MuonAdamW(straight.parameters(), **MUON)
    wanted = train(straight, optimizer, 6)
    optimizer = MuonAdamW(pickled.parameters(), **MUON)
    train(pickled, optimizer, 3)
    pickled, optimizer = pickle.loads(pickle.dumps((pickled, optimizer)))
    assert torch.equal(train(pickled, optimizer, 3, start=3), wanted)


def test_defaults_are_muons_and_adamw_s_published_ones():
    muon, adamw = MuonAdamW(net().parameters()).param_groups
    assert (muon["lr"], muon["weight_decay"], muon["momentum"], muon["nesterov"], muon["ns_steps"]) == (
        0.02, 0.1, 0.95, True, 5,
    )  # fmt: skip
    assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (1e-3, (0.9, 0.98), 0.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_groups_may_be_added_to_a_copy(copied):
    optimizer = copied(MuonAdamW(net().parameters(), **MUON))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert optimizer.param_groups[-1]["momentum"] == MUON["momentum"]


def test_a_learning_rate_that_is_a_tensor_is_each_part_s_own():
    optimizer = MuonAdamW([{"params": net().parameters(), "lr": torch.tensor(0.1)}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.1**step])
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.025, 0.001])
