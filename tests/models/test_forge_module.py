import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_lightning.callbacks import Grokfast, RNGState
from forge_lightning.data import CodeTasks
from forge_lightning.data.tokens import build_tokenizer
from forge_lightning.models import ForgeModule
from forge_lightning.models.forge_module import decoder_layers
from forge_lightning.models.optimizers import weight_decay_groups
from forge_lightning.optim import MuonAdamW
from tests.accelerator import QUIET

SHAPES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256},
    "llama": {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_size": 32, "intermediate_size": 64,
    },
    "qwen2": {
        "model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True,
    },
}  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES)


def built(shape, **kwargs):
    torch.manual_seed(0)
    module = ForgeModule(config=SHAPES[shape], **kwargs)
    module.build(build_tokenizer("bytes"))
    return module.eval()


def batch_of(module, *lengths, prompt=3):
    """Rows of random bytes, right-padded; the loss starts after ``prompt`` tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 250, (length,), generator=generator)
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fit(module, data, **kwargs):
    defaults = {
        **QUIET,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "max_steps": 4,
    }  # fmt: skip
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = Trainer(**defaults | kwargs)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@every_shape
def test_loss_is_the_models_own_and_per_example(shape):
    module = built(shape)
    batch = batch_of(module, 20, 13)
    outputs, *_ = module._step(batch)
    theirs = module.model(**batch).loss
    torch.testing.assert_close(outputs["loss"], theirs)
    for row, length in enumerate((20, 13)):
        alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
        torch.testing.assert_close(outputs["example_loss"][row], module.model(**alone).loss.detach())
    assert not outputs["example_loss"].requires_grad
    assert outputs["loss"].requires_grad


def test_success_is_an_exact_match_of_the_answer():
    module = built("gpt2")
    batch = batch_of(module, 12, 12)
    logits = module(batch["input_ids"], batch["attention_mask"])
    batch["labels"][0, 3:] = logits[0, 2:-1].argmax(-1)  # what the model says
    batch["labels"][1, 3:] = logits[1, 2:-1].argmax(-1)
    batch["labels"][1, 7] = (batch["labels"][1, 7] + 1) % 250
    outputs, *_ = module._step(batch)
    assert outputs["example_success"].tolist() == [1.0, 0.0]


def test_an_example_without_labels_is_nan_not_a_number_made_up():
    module = built("gpt2")
    batch = batch_of(module, 12, 3)
    outputs, *_ = module._step(batch)
    assert outputs["example_loss"].isnan().tolist() == [False, True]
    assert outputs["example_success"].isnan().tolist() == [False, True]
    assert outputs["loss"].isfinite()


@every_shape
def test_trains_on_a_local_file_and_logs_true_numbers(shape, small_mbpp):
    seed_everything(0, verbose=False)
    module = ForgeModule(config=SHAPES[shape], optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    data = CodeTasks(path=small_mbpp, batch_size=8)
    trainer = fit(module, data, max_steps=30, callbacks=[Grokfast(lamb=0.5, schedule="constant")])
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {"train/loss", "train/token_accuracy"} <= set(metrics)
    assert metrics["val/loss"] < math.log(384) - 2
    assert metrics["val/perplexity"] == pytest.approx(math.exp(metrics["val/loss"]), rel=1e-3)
    total = right = 0
    module.eval()
    for batch in data.val_dataloader():
        logits = module(batch["input_ids"], batch["attention_mask"])[:, :-1]
        kept = batch["labels"][:, 1:] != -100
        total, right = total + kept.sum(), right + (logits.argmax(-1) == batch["labels"][:, 1:])[kept].sum()
    assert metrics["val/token_accuracy"] == pytest.approx((right / total).item())


def test_resume_is_bit_exact_mid_epoch_with_dropout(small_mbpp, tmp_path):
    def run(**kwargs):
        seed_everything(0, verbose=False)
        module = ForgeModule(config=SHAPES["gpt2"])
        data = CodeTasks(path=small_mbpp, batch_size=4)
        callbacks = [Grokfast(schedule="constant"), RNGState(), *kwargs.pop("callbacks", [])]
        fit(module, data, max_steps=9, callbacks=callbacks, limit_val_batches=1, **kwargs)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    straight = run(callbacks=[checkpoint], enable_checkpointing=True)
    assert torch.equal(run(ckpt_path=tmp_path / "step=4.ckpt"), straight)


@every_shape
def test_export_is_a_hugging_face_folder(shape, tmp_path):
    module = built(shape)
    module.export(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    batch = batch_of(module, 9)
    torch.testing.assert_close(model(batch["input_ids"]).logits, module.model(batch["input_ids"]).logits)
    again = ForgeModule(pretrained=str(tmp_path))
    again.build(tokenizer)
    assert again.model.training, "from_pretrained leaves evaluation mode"


@every_shape
def test_completions_do_not_depend_on_their_neighbours_in_the_batch(shape):
    module = built(shape)
    prompts = ["def f(x):", "a", "def a_much_longer_prompt(with_arguments):\n    "]
    together = module.complete(prompts, max_new_tokens=8)
    assert together == [module.complete([prompt], max_new_tokens=8)[0] for prompt in prompts]


def test_sampling_is_seeded_and_leaves_the_random_stream_alone():
    module = built("gpt2")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = module.complete(["x"], temperature=1.0, seed=1, max_new_tokens=20)
    assert torch.equal(torch.rand(1), expected)
    assert first == module.complete(["x"], temperature=1.0, seed=1, max_new_tokens=20)
    assert first != module.complete(["x"], temperature=1.0, seed=2, max_new_tokens=20)


def test_completion_stays_inside_the_context():
    module = built("gpt2")
    texts = module.complete(["x" * 255, "y" * 400], max_new_tokens=50)
    assert len(module.tokenizer(texts[0], add_special_tokens=False)["input_ids"]) <= 1
    assert texts[1] == ""
    module.train()
    module.complete(["x"], max_new_tokens=1)
    assert module.model.training
    with pytest.raises(ValueError, match="`max_new_tokens=0` must be at least 1"):
        module.complete(["x"], max_new_tokens=0)
    with pytest.raises(ValueError, match="`temperature=-1` must be at least 0"):
        module.complete(["x"], temperature=-1)


@every_shape
def test_norms_biases_and_embeddings_do_not_decay(shape):
    module = built(shape)
    decayed, free = weight_decay_groups(module)
    assert free["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decayed["params"])
    embedding = module.model.get_input_embeddings().weight
    assert any(p is embedding for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.parameters()))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert weight_decay_groups(frozen) == []


@every_shape
def test_layers_are_found_by_structure(shape):
    layers = decoder_layers(built(shape).model)
    assert len(layers) == 2
    with pytest.raises(MisconfigurationException, match="Linear has no list of blocks"):
        decoder_layers(nn.Linear(2, 2))


@every_shape
def test_gradient_checkpointing_changes_no_gradient(shape):
    def gradient(**kwargs):
        module = built(shape, **kwargs).train()
        batch = batch_of(module, 20, 13)
        torch.manual_seed(3)
        module._step(batch)[0]["loss"].backward()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    torch.testing.assert_close(gradient(), gradient(gradient_checkpointing=True))


def test_compiled_models_train(small_mbpp, monkeypatch):
    """In eager mode of the compiler, which needs no build tools; names stay as they were."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    module = ForgeModule(config=SHAPES["gpt2"], compile=True)
    fit(module, CodeTasks(path=small_mbpp), max_steps=1, limit_val_batches=0)
    assert module.model._compiled_call_impl is not None
    assert not any("_orig_mod" in name for name, _ in module.named_parameters())


def test_bad_models_say_what_to_do():
    with pytest.raises(ValueError, match="either `pretrained` or `config`"):
        ForgeModule()
    with pytest.raises(ValueError, match="must name its 'model_type'"):
        ForgeModule(config={"n_layer": 2})
    with pytest.raises(MisconfigurationException, match=r"pretrained='no/such'.* or give `config`"):
        ForgeModule(pretrained="no/such").build()
    with pytest.raises(MisconfigurationException, match=r"`model_type='gpt9'` is unknown to transformers"):
        ForgeModule(config={"model_type": "gpt9", "vocab_size": 9}).build()
    with pytest.raises(MisconfigurationException, match=r"A gpt2 config has no 'n_haed'. Close: \['n_head'"):
        ForgeModule(config={"model_type": "gpt2", "n_haed": 9, "vocab_size": 9}).build()
    with pytest.raises(MisconfigurationException, match=r"`ForgeModule\(config=.*n_head': 5.*divisible"):
        ForgeModule(config={"model_type": "gpt2", "n_head": 5, "n_embd": 32, "vocab_size": 9}).build()
    with pytest.raises(MisconfigurationException, match="needs 'vocab_size'"):
        ForgeModule(config={"model_type": "gpt2"}).build()
    with pytest.raises(MisconfigurationException, match="tokenizer has 384 tokens, but the model's vocabulary only 9"):
        ForgeModule(config={"model_type": "gpt2", "vocab_size": 9}).build(build_tokenizer("bytes"))


def test_batches_longer_than_the_model_say_so(small_mbpp):
    module = ForgeModule(config=SHAPES["gpt2"] | {"n_positions": 64})
    with pytest.raises(MisconfigurationException, match=r"A batch is \d+ tokens long, but the model has only 64"):
        fit(module, CodeTasks(path=small_mbpp))


def test_export_needs_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MisconfigurationException, match="is a file. Name a folder"):
        built("gpt2").export(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_predict_writes_completions(small_mbpp):
    module = ForgeModule(config=SHAPES["gpt2"])
    data = CodeTasks(path=small_mbpp, batch_size=4)
    trainer = fit(module, data, max_steps=1)
    predictions = trainer.predict(module, data)
    assert [len(texts) for texts in predictions] == [4]


def saved(folder, dtype=torch.bfloat16, tokenizer="bytes", **changes):
    torch.manual_seed(0)
    module = ForgeModule(config=SHAPES["llama"] | {"max_position_embeddings": 256} | changes)
    module.build(build_tokenizer("bytes"))
    module.model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        build_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


def test_pretrained_bfloat16_weights_train_in_float32(tmp_path, small_mbpp):
    module = ForgeModule(pretrained=saved(tmp_path), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    module.build()
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    fit(module, CodeTasks(path=small_mbpp, batch_size=8), max_steps=20)
    same = sum(int((p == before[name]).sum()) for name, p in module.model.named_parameters())
    assert same < 0.4 * sum(p.numel() for p in before.values())  # of tokens that no example has


@pytest.mark.parametrize(("dtype", "found"), [("bfloat16", torch.bfloat16), ("auto", torch.float16)])
def test_dtype_and_model_kwargs_reach_transformers(tmp_path, dtype, found):
    module = ForgeModule(
        pretrained=saved(tmp_path, torch.float16), dtype=dtype, model_kwargs={"attn_implementation": "eager"}
    )
    module.build()
    assert next(module.model.parameters()).dtype == found
    assert module.model.config._attn_implementation == "eager"
    made = ForgeModule(config=SHAPES["gpt2"], dtype="bfloat16", model_kwargs={"attn_implementation": "eager"})
    made.build(build_tokenizer("bytes"))
    assert next(made.model.parameters()).dtype == torch.bfloat16
    assert made.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"`ForgeModule\(dtype='int8'\)` must be"):
        ForgeModule(config=SHAPES["gpt2"], dtype="int8")


def test_tokenizer_auto_is_that_of_the_pretrained_model(tmp_path, small_mbpp):
    words = word_tokenizer(tmp_path / "other", 300)
    module = ForgeModule(pretrained=saved(tmp_path / "model", tokenizer=str(tmp_path / "other")))
    data = CodeTasks(path=small_mbpp, batch_size=8, max_length=200)
    fit(module, data, max_steps=1)
    assert data.tokenizer.get_vocab() == words.get_vocab()
    assert CodeTasks(path=small_mbpp).tokenizer.get_vocab() == build_tokenizer("bytes").get_vocab()


def word_tokenizer(folder, count, changed=0):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<e>", "?", *(f"w{i}" for i in range(count - 2 - changed)), *(f"x{i}" for i in range(changed))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>", unk_token="?")
    fast.save_pretrained(folder)
    return fast


def test_another_tokenizer_is_refused_a_nearly_equal_one_named(tmp_path):
    word_tokenizer(tmp_path / "own", 300)
    folder = saved(tmp_path / "model", tokenizer=str(tmp_path / "own"))
    with pytest.raises(MisconfigurationException, match=r"of which 0 are the same.* Set `tokenizer: auto`"):
        ForgeModule(pretrained=folder).build(build_tokenizer("bytes"))
    near = word_tokenizer(tmp_path / "near", 300, changed=3)
    with pytest.warns(UserWarning, match="of which 297 are the same. Set `tokenizer: auto` in the data unless"):
        ForgeModule(pretrained=folder).build(near)
    ForgeModule(pretrained=folder).build(word_tokenizer(tmp_path / "more", 310))  # more tokens, the same at first
    ForgeModule(pretrained=saved(tmp_path / "bare", tokenizer=None)).build(build_tokenizer("bytes"))


def test_a_gpt2_folder_without_a_tokenizer_has_none(tmp_path):
    """Transformers makes one of a single token, by the model's type."""
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 1, "n_layer": 1}
    module = ForgeModule(config=gpt2)
    module.build(build_tokenizer("bytes"))
    module.model.save_pretrained(tmp_path)
    ForgeModule(pretrained=str(tmp_path)).build(build_tokenizer("bytes"))
    with pytest.raises(MisconfigurationException, match="the folder holds none"):
        build_tokenizer(str(tmp_path))


def test_perplexity_is_the_exponential_of_the_loss_however_large():
    metrics = built("gpt2").metrics["val_metrics"]
    metrics["perplexity"].update(torch.tensor(30.0), torch.tensor(4))
    metrics["perplexity"].update(torch.tensor(31.0), torch.tensor(4))
    assert float(metrics["perplexity"].compute()) == pytest.approx(math.exp(30.5), rel=1e-5)


def test_a_batch_without_labels_has_no_gradient_and_no_number(small_mbpp):
    class Blank(ForgeModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch | {"labels": torch.full_like(batch["labels"], -100)}, batch_idx)

    module = Blank(config=SHAPES["gpt2"], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = fit(module, CodeTasks(path=small_mbpp, batch_size=8), max_steps=2, limit_val_batches=0)
    assert trainer.callback_metrics["train/loss"].isnan()
    assert all(p.isfinite().all() for p in module.parameters())


def test_weights_of_gpt2_are_marked_transposed():
    module = built("gpt2", optimizer=MuonAdamW)
    optimizer = module.configure_optimizers()["optimizer"]
    turned = {id(p) for group in optimizer.param_groups if group.get("transposed") for p in group["params"]}
    names = {name.split(".", 3)[-1] for name, p in module.model.named_parameters() if id(p) in turned}
    assert names == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert not any(group.get("transposed") for group in weight_decay_groups(built("llama")))


def test_a_step_is_that_of_the_cross_entropy_of_all_positions_but_the_last():
    module = built("gpt2")
    ids = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3], labels[1], labels[2, 6:] = -100, -100, -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    module.eval()  # without dropout

    def gradients(loss):
        module.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    outputs, likeliest, target = module._step(batch)
    ours = gradients(outputs["loss"])
    logits = module(ids, batch["attention_mask"])[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    loss = losses.view(4, 8).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss, outputs["loss"])
    torch.testing.assert_close(gradients(loss), ours)
    assert torch.equal(likeliest, logits.argmax(-1))
    assert torch.equal(target, labels[:, 1:])
