import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import nn

from forge_lightning.data import AlgorithmicData
from forge_lightning.models import AlgorithmicModule
from forge_lightning.models.algorithmic import Decoder
from tests.accelerator import ACCELERATOR


def whole_forward(model, tokens):
    """The paper's model as written there: every position, torch's own attention module, a mask of -inf."""
    x = model.token_embeddings(tokens) + model.position_embeddings(torch.arange(tokens.shape[1]))
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    for layer in model.layers:
        x = layer.ln_1(x)
        x = x + layer.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        x = x + layer.mlp(layer.ln_2(x))
    return model.head(model.ln_f(x))


def test_the_last_position_alone_gives_the_logits_and_gradients_of_the_whole():
    torch.manual_seed(0)
    model = Decoder(99, 5)
    assert sum(p.numel() for p in model.parameters()) == 422_784
    assert len(list(model.parameters())) == 29
    tokens = torch.randint(0, 99, (7, 4))
    found = []
    for forward in (model, lambda tokens: whole_forward(model, tokens)[:, -1]):
        model.zero_grad()
        logits = forward(tokens)
        nn.functional.cross_entropy(logits, tokens[:, 0]).backward()
        found.append((logits, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (fast, fast_grads), (whole, whole_grads) = found
    torch.testing.assert_close(fast, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast_grads, whole_grads, atol=1e-6, rtol=1e-4)


def fit(module, data, **kwargs):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator=ACCELERATOR,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(module, data)
    return trainer


@torch.no_grad()
def accuracy_of(module, data):
    """Share of right answers in validation, written out."""
    right = [module.eval()(b["input_ids"]).argmax(-1) == b["target"] for b in data.val_dataloader()]
    return float(torch.cat(right).float().mean())


@pytest.mark.parametrize("operation", ["add", "s5", "sparse_parity"])
def test_learns_every_kind_of_task(operation):
    data = AlgorithmicData(operation, modulus=11, train_fraction=0.8, batch_size=64, num_bits=8, num_relevant_bits=2)
    module = AlgorithmicModule(dim=32, num_heads=2, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    start = fit(AlgorithmicModule(dim=32, num_heads=2), data, max_steps=1).callback_metrics["train/loss"]
    trainer = fit(module, data, max_steps=60, limit_train_batches=20)
    assert trainer.callback_metrics["train/loss"] < start
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(accuracy_of(module, data))


def test_outputs_are_per_example():
    data = AlgorithmicData("add", modulus=5)
    module = AlgorithmicModule(dim=16, num_heads=2)
    fit(module, data, max_steps=1)
    batch = next(iter(data.val_dataloader()))
    outputs, logits = module._step(batch)
    torch.testing.assert_close(outputs["example_loss"].mean(), outputs["loss"].detach())
    assert torch.equal(outputs["example_success"], (logits.argmax(1) == batch["target"]).float())
    assert torch.equal(module.predict_step(batch, 0), logits.argmax(1))


def test_embedding_scale_scales_the_initial_embeddings():
    data = AlgorithmicData("add", modulus=5)
    norms = []
    for scale in (1.0, 0.05):
        module = AlgorithmicModule(dim=16, num_heads=2, embedding_scale=scale)
        fit(module, data, max_steps=0)
        norms.append(module.model.token_embeddings.weight.norm().item())
    assert norms[1] == pytest.approx(0.05 * norms[0], rel=1e-5)


def test_data_without_a_vocabulary_is_refused():
    class Other(LightningDataModule):
        def train_dataloader(self):
            return []

        val_dataloader = train_dataloader

    with pytest.raises(MisconfigurationException, match="must have `num_tokens` and `seq_len`.*got Other"):
        fit(AlgorithmicModule(), Other(), max_steps=1)
    with pytest.raises(ValueError, match=r"`AlgorithmicModule\(num_heads=3\)` must divide dim=128"):
        AlgorithmicModule(num_heads=3)


@pytest.mark.slow
def test_the_papers_flags_grok_in_the_papers_iterations():
    """Also `python -m benchmarks.grokking --only ema --seeds 0`, with the published random stream: 910 iterations."""
    from benchmarks.grokking import CONFIGURATIONS, run

    assert run(0, CONFIGURATIONS["ema"], 1500)["first"] == pytest.approx(910, abs=300)


def test_the_recipe_groks_in_the_iterations_that_the_readme_says():
    """Also `python -m benchmarks.grokking --only recipe --seeds 0`: 140 iterations."""
    from benchmarks.grokking import CONFIGURATIONS, run

    assert run(0, CONFIGURATIONS["recipe"], 200)["first"] == pytest.approx(140, abs=30)
