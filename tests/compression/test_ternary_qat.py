"""Ternary training: the forward pass by its formula, the ramp, what is undone, and the files."""

import copy
import json
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from forge_lightning.callbacks import TernaryQAT
from forge_lightning.compression import load
from forge_lightning.compression.codecs.ternary import ternary
from forge_lightning.compression.ternary_export import write_bitnet, write_packed_ternary
from forge_lightning.compression.ternary_forward import TernaryForward, rounded_activations, straight_through
from forge_lightning.core.mistakes import UsageError
from tests.compression.tiny import tiny_model
from tests.contract.modules import LossOnly
from tests.contract.rows import fit


def layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(64, 48)


def test_forward_and_gradients_are_bitnets():
    """By the formula, with integers: y = (q_x q_wᵀ) s_x γ; gradients as if nothing was rounded after that."""
    linear = layer()
    x = torch.randn(5, 7, 64, requires_grad=True)
    out = TernaryForward(linear, torch.ones(()), 8)(x)
    out.square().sum().backward()
    scale = linear.weight.detach().abs().mean()
    trits = (linear.weight.detach() / scale).round().clamp(-1, 1)
    step = x.detach().abs().amax(-1, keepdim=True) / 127
    whole = (x.detach() / step).round().clamp(-128, 127)
    expected = (whole @ trits.T) * step * scale + linear.bias.detach()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    upstream = 2 * expected
    torch.testing.assert_close(x.grad, upstream @ (trits * scale), atol=1e-4, rtol=1e-4)
    of_weight = torch.einsum("bto,bti->oi", upstream, whole * step)
    torch.testing.assert_close(linear.weight.grad, of_weight, atol=1e-3, rtol=1e-4)


def test_activations_are_integers_of_each_token():
    x = torch.tensor([[1.0, -0.5, 0.003], [0.0, 0.0, 0.0], [100.0, 1.0, 0.3]])
    rounded = rounded_activations(x)
    assert rounded[0].tolist() == pytest.approx([1.0, -64 / 127, 0.0])
    assert rounded[1].tolist() == [0, 0, 0]
    assert rounded[2].tolist() == pytest.approx([100.0, 100 / 127, 0.0])
    assert rounded_activations(x, 2)[0].tolist() == [1, 0, 0]  # half to even


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_mean_moves_to_the_rounded_values(share):
    exact = torch.randn(100, requires_grad=True)
    rounded = ternary(exact.detach())
    mean = straight_through(exact, rounded, torch.tensor(share))
    torch.testing.assert_close(mean, exact + share * (rounded - exact))
    if share in (0, 1):
        assert torch.equal(mean, rounded if share else exact)
    (gradient,) = torch.autograd.grad(mean.sum(), exact)
    assert torch.equal(gradient, torch.ones(100))


def test_the_ramp_rises_once_a_step():
    callback = TernaryQAT(lamb=0.8, ramp_steps=4)
    assert [callback.lamb_at(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


class Watched(LossOnly):
    """Notes which layers are replaced, and what share of them is rounded."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        shares = [float(part.forward.share) for part in self.net if "forward" in vars(part)]
        self.__dict__.setdefault("seen", []).append(shares)

    def on_validation_batch_end(self, *_):
        self.__dict__.setdefault("validated", []).append(["forward" in vars(part) for part in self.net])


def test_layers_are_replaced_while_fitting_and_given_back():
    model, trainer = fit([callback := TernaryQAT(ramp_steps=4)], Watched)
    assert model.seen == [[pytest.approx(min(1, (step + 1) / 4))] for step in range(8)]  # not the output layer
    assert model.validated == [[True, False, False, False]]
    assert not any("forward" in vars(part) for part in model.net)
    trainer.validate(model, verbose=False)  # the model that was trained
    assert model.validated[-1] == [True, False, False, False]
    assert not any("forward" in vars(part) for part in model.net)
    assert callback.state_dict() == {"lamb": 1.0}


def test_layers_are_chosen_by_name():
    model, _ = fit([TernaryQAT(layers=["net.*"])], Watched)
    assert model.seen[0] == [1.0, 1.0]
    with pytest.raises(MisconfigurationException, match=r"TernaryQAT\(layers='nett'\).*No layer is called"):
        fit([TernaryQAT(layers="nett")])
    with pytest.raises(MisconfigurationException, match="no `nn.Linear` among its `layers`"):
        fit([TernaryQAT(layers="net.2")])
    with pytest.raises(MisconfigurationException, match="replaced already"):
        fit([TernaryQAT(), TernaryQAT(name="second")])


@pytest.mark.parametrize("options", [{"lamb": 1.5}, {"ramp_steps": -1}, {"activation_bits": 1}])
def test_arguments_are_refused(options):
    with pytest.raises(ValueError, match=rf"TernaryQAT\({next(iter(options))}="):
        TernaryQAT(**options)


def test_copies_and_pickles_are_plain_layers():
    linear, x = layer(), torch.randn(3, 64)
    expected = F.linear(x, linear.weight, linear.bias)
    vars(linear)["forward"] = TernaryForward(linear, torch.ones(()), 8)
    assert not torch.equal(linear(x), expected)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.weight.zero_()  # its own
        assert torch.equal(other(x), linear.bias.expand(3, 48))
        assert linear.weight.abs().sum() > 0


def test_what_is_logged(tmp_path):
    model, _ = fit([TernaryQAT(lamb=0.5)], logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=8)
    row = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    found = {key: value for key, value in zip(row[0], row[1], strict=True) if key.startswith("forge/ternary")}
    weight = model.net[0].weight.detach()
    rounded = ternary(weight)
    assert float(found["forge/ternary/lamb"]) == 0.5
    assert float(found["forge/ternary/weight_error"]) == pytest.approx(float((rounded - weight).norm() / weight.norm()))
    assert float(found["forge/ternary/zero_share"]) == pytest.approx(float((rounded == 0).float().mean()))


def linear_layers(model):
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]


@torch.no_grad()
def with_ternary_forward(model, tokens):
    for name in linear_layers(model):
        part = model.get_submodule(name)
        vars(part)["forward"] = TernaryForward(part, torch.ones(()), 8)
    logits = model(input_ids=tokens).logits
    for name in linear_layers(model):
        del vars(model.get_submodule(name))["forward"]
    return logits


def test_packed_files_hold_the_rounded_weights(tmp_path):
    model = tiny_model()
    names = linear_layers(model)
    size = write_packed_ternary(tmp_path, model, names)
    assert size < 40_000
    read = load(tmp_path)
    for name in names:
        assert torch.equal(read.get_submodule(name).weight, ternary(model.get_submodule(name).weight))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_transformers_own_loader_reads_bitnet(tmp_path):
    """Plain ``from_pretrained`` gives the logits that training had."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model, tokens = tiny_model(), torch.arange(12).view(1, 12)
    expected = with_ternary_forward(model, tokens)
    write_bitnet(tmp_path, model, linear_layers(model))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitnet"
    torch.compiler.set_stance("force_eager")  # transformers compiles its layers, which wants a compiler
    try:
        read = AutoModelForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            logits = read(input_ids=tokens).logits
    finally:
        torch.compiler.set_stance("default")
    assert type(read.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_bitnet_needs_all_layers(tmp_path):
    model = tiny_model()
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj is not"):
        write_bitnet(tmp_path, model, linear_layers(model)[1:])
