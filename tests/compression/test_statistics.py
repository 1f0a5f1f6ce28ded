"""Hessians and output weights against plain loops and the loss itself."""

import pytest
import torch

from forge_lightning.compression.layers import matrices, select
from forge_lightning.compression.statistics import (
    Statistics,
    by_block,
    input_hessians,
    output_weights,
    statistics_of,
    token_frequencies,
)
from tests.compression.tiny import batches, tiny_model

pytest.importorskip("transformers")


def test_matrices_are_found_once():
    model = tiny_model()
    found = matrices(model)
    assert next(iter(found)) == "model.embed_tokens.weight"
    assert set(found["model.embed_tokens.weight"].layers) == {"model.embed_tokens", "lm_head"}
    assert len(found) == 1 + 2 * 7
    assert "lm_head.weight" in matrices(tiny_model(tied=False))


def test_conv1d_is_read_as_out_by_in():
    model = tiny_model(kind="gpt2")
    found = matrices(model)["transformer.h.0.mlp.c_fc.weight"]
    assert found.transposed
    assert found.read().shape == (128, 32)
    found.write(torch.arange(128 * 32.0).view(128, 32))
    assert model.transformer.h[0].mlp.c_fc.weight[0, :3].tolist() == [0, 32, 64]


def test_patterns_choose_and_name_close_ones():
    found = matrices(tiny_model())
    assert len(select(found, ["*.mlp.*"])) == 6
    assert list(select(found, ["lm_head"])) == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"'\*q_prj\*'.*q_proj"):
        select(found, ["*q_prj*"])


def test_hessians_are_means_over_inputs():
    model, data = tiny_model(), batches(8)
    layers = {
        name: model.get_submodule(name) for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj")
    }
    inputs = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().flatten(0, 1)))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"])
    [hook.remove() for hook in hooks]
    found = input_hessians(model, layers, data)
    for name, seen in inputs.items():
        rows = torch.cat(seen)
        torch.testing.assert_close(found[name], rows.T @ rows / len(rows), atol=1e-4, rtol=1e-4)


def test_padding_does_not_count():
    model, (batch,) = tiny_model(), batches(2, size=2)
    layers = {"o": model.model.layers[0].self_attn.v_proj}
    short = {name: value[:1, :10] for name, value in batch.items()}
    padded = {name: value[:1].clone() for name, value in batch.items()}
    padded["attention_mask"][:, 10:] = 0
    padded["labels"][:, 10:] = -100
    torch.testing.assert_close(input_hessians(model, layers, [padded]), input_hessians(model, layers, [short]))
    found = matrices(model)
    one, two = (output_weights(model, found, [b])["model.layers.1.mlp.down_proj"] for b in (padded, short))
    torch.testing.assert_close(one, two)


def test_prompts_without_labels_count():
    """Answers look back at them: gradients reach their keys and values."""
    model, (batch,) = tiny_model(), batches(2, size=2)
    masked = batch | {"labels": batch["labels"].clone()}
    masked["labels"][:, :20] = -100
    layers = {"k": model.model.layers[0].self_attn.k_proj}
    torch.testing.assert_close(input_hessians(model, layers, [masked]), input_hessians(model, layers, [batch]))


def test_layers_of_one_input_share_a_sum():
    model = tiny_model()
    layers = {name: model.get_submodule(f"model.layers.0.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")}
    found = input_hessians(model, layers, batches(8))
    assert found["q_proj"].norm() > 0
    torch.testing.assert_close(found["q_proj"], found["k_proj"])
    torch.testing.assert_close(found["q_proj"], found["v_proj"])


def test_nothing_is_left_on_the_model():
    model = tiny_model()
    state = torch.get_rng_state()
    output_weights(model, matrices(model), batches(4))
    input_hessians(model, {"a": model.model.layers[0].mlp.up_proj}, batches(4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(param.requires_grad and param.grad is None for param in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_frequencies_count_tokens():
    data = [{"input_ids": torch.tensor([[1, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 0]])}]
    assert token_frequencies(4, data).tolist() == pytest.approx([0.125, 0.625, 0.125, 0.125])


def test_statistics_predict_the_rise_of_the_loss():
    """Of labels that the model draws itself, for small errors at random in each kind of matrix."""
    model = tiny_model(tied=False)
    found, data = matrices(model), batches(256, seed=5, size=64)
    outputs = output_weights(model, found, data)
    known = {}
    for group in by_block(found):
        known |= statistics_of(model, group, outputs, data)
    assert known.keys() == found.keys()

    def log_probabilities():
        with torch.no_grad():
            return torch.cat([model(input_ids=b["input_ids"]).logits[:, :-1].double().log_softmax(-1) for b in data])

    before = log_probabilities()
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        matrix = found[name]
        weight = matrix.read()
        noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        matrix.write(weight + noise)
        rise = (before.exp() * (before - log_probabilities())).sum(-1).mean()  # the expected loss of its own labels
        matrix.write(weight)
        assert known[name].error(weight, weight + noise) == pytest.approx(float(rise), rel=0.35), name


def test_terms_of_a_shared_matrix_add_up():
    eye = torch.eye(3)
    both = Statistics([(eye, torch.tensor([1.0, 3.0])), (2 * eye, torch.tensor([1.0, 1.0]))])
    error = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    assert both.error(torch.zeros(2, 3), error) == pytest.approx(0.5 * (1 + 3) + 0.5 * (2 + 2))
    torch.testing.assert_close(both.hessian, 4 * eye)
    torch.testing.assert_close(both.row_weights, torch.tensor([0.75, 1.25]))
