import shutil
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from forge_lightning.callbacks import Grokfast, RNGState, SelfModel, Telemetry, TemperatureCurriculum
from forge_lightning.core.extras import MissingExtraError, require_extra
from forge_lightning.data import TextData
from forge_lightning.models import ForgeModule
from tests.accelerator import QUIET

LORA = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_size": 32, "intermediate_size": 64, "vocab_size": 384,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with its tokenizer, as Hugging Face writes it, and a text."""
    from forge_lightning.data.tokens import build_tokenizer

    torch.manual_seed(0)
    module = ForgeModule(config=LLAMA)
    module.build(build_tokenizer("bytes"))
    made = tmp_path_factory.mktemp("adapters")
    module.export(made / "base")
    (made / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return made


def build(folder, base="base", peft=LORA):
    seed_everything(0, verbose=False)
    return ForgeModule(
        pretrained=str(folder / base), peft=peft, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)
    )


def fit(folder, module, steps, callbacks=(), **kwargs):
    data = TextData(str(folder / "text.txt"), block_size=32, batch_size=4)
    ckpt_path = kwargs.pop("ckpt_path", None)
    options = QUIET | {"enable_model_summary": False, "max_steps": steps, "num_sanity_val_steps": 0} | kwargs
    trainer = Trainer(**options, callbacks=[RNGState(), *callbacks])
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def weights(module):
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def test_adapters_alone_are_trained_and_exported_either_way(folder, tmp_path):
    module = build(folder)
    fit(folder, module, 8)
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for name, param in base.named_parameters():
        layer, _, kind = name.rpartition(".")
        own = dict(module.model.base_model.model.named_parameters())
        assert torch.equal(own.get(name, own.get(f"{layer}.base_layer.{kind}")), param)

    ids = torch.arange(10, 30)[None]
    module.eval()
    expected = module(ids)
    assert (expected - base(ids).logits).abs().max() > 0.01
    module.export(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert "lora" not in str([name for name, _ in whole.named_parameters()])
    torch.testing.assert_close(whole(ids).logits, expected, atol=1e-5, rtol=1e-4)
    module.export(tmp_path / "adapter", adapter=True)
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 100_000
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids).logits, expected)
    assert torch.equal(module(ids), expected)  # exporting changes nothing
    plain = ForgeModule(config=LLAMA)
    plain.build()
    with pytest.raises(MisconfigurationException, match="no adapter to export"):
        plain.export(tmp_path / "none", adapter=True)


def test_checkpoints_hold_the_adapters_and_resume_bit_by_bit(folder, tmp_path):
    straight = build(folder)
    fit(folder, straight, 7)
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, filename="at")
    fit(folder, build(folder), 3, [saving], enable_checkpointing=True)
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name or "metrics" in name for name in state)
    resumed = build(folder)
    fit(folder, resumed, 7, ckpt_path=tmp_path / "at.ckpt")
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_adapters_to_other_weights_are_refused(folder, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="at")
    fit(folder, build(folder), 2, [saving], enable_checkpointing=True)
    other = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 0.5
    shutil.copytree(folder / "base", folder / "other")
    other.save_pretrained(folder / "other")
    with pytest.raises(MisconfigurationException, match="holds adapters to the weights of .*base"):
        fit(folder, build(folder, "other"), 4, ckpt_path=tmp_path / "at.ckpt")


def test_new_weights_stay_in_the_checkpoint(folder, tmp_path):
    module = ForgeModule(config=LLAMA, peft=LORA)
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="at")
    fit(folder, module, 1, [saving], enable_checkpointing=True)
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    assert any("base_layer" in name for name in state)


@pytest.mark.parametrize("kind", ["IA3", "LOHA"])
def test_other_kinds(folder, kind):
    modules = {"target_modules": ["q_proj", "down_proj"]} | (
        {"feedforward_modules": ["down_proj"]} if kind == "IA3" else {}
    )
    module = build(folder, peft={"peft_type": kind, **modules})
    before = {}
    fit(folder, module, 1)
    before = weights(module)
    fit(folder, module, 4)
    changed = [name for name, value in weights(module).items() if not torch.equal(value, before[name])]
    assert changed
    assert all(dict(module.named_parameters())[name].requires_grad for name in changed)


def test_callbacks_work_on_adapters(folder):
    module = build(folder)
    callbacks = [SelfModel(), TemperatureCurriculum(weight=0.1), Grokfast(lamb=0.5, schedule="constant"), Telemetry()]
    trainer = fit(folder, module, 4, callbacks, gradient_clip_val=1.0, accumulate_grad_batches=2, log_every_n_steps=1)
    assert trainer.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "LAURA"}, r"peft has no type 'LAURA', but \[.*'LORA'"),
        ({"rank": 4}, "rank"),
        ({"peft_type": "ADALORA", "total_step": 20}, "ADALORA wants a call after each step"),
        ({"inference_mode": True}, "are not for training a language model"),
        ({"task_type": "SEQ_CLS"}, "other than CAUSAL_LM"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "Use an adapter of weights"),
    ],
)
def test_bad_settings_are_refused_when_the_module_is_made(settings, named):
    with pytest.raises(MisconfigurationException, match=named):
        ForgeModule(config=LLAMA, peft=settings)


def test_layers_that_are_not_there_are_named(folder):
    module = build(folder, peft={"target_modules": ["query"]})
    with pytest.raises(MisconfigurationException, match=r"linear layers are called \['down_proj', .*'q_proj'"):
        module.build()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [_Without("peft"), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"needs the package `peft`: pip install 'forge-lightning\[peft\]'"):
        ForgeModule(config=LLAMA, peft=LORA)
    with pytest.raises(ModuleNotFoundError):
        require_extra("json.nothing", "x", "y")


class _Without:
    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return


def test_what_peft_refuses_is_one_message(folder):
    with pytest.raises(MisconfigurationException, match=r"`ForgeModule\(peft="):
        build(folder, peft={"r": "x", "target_modules": ["q_proj"]}).build()


def test_a_difference_anywhere_in_the_weights_is_seen(folder, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="at")
    fit(folder, build(folder), 1, [saving], enable_checkpointing=True)
    other = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[-8:] += 1e-4
    shutil.copytree(folder / "base", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    module = build(folder, tmp_path / "other")
    with pytest.raises(MisconfigurationException, match="holds adapters to the weights of"):
        fit(folder, module, 2, ckpt_path=tmp_path / "at.ckpt")


def test_pure_bf16_resumes(folder, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="at")
    fit(folder, build(folder), 2, [saving], enable_checkpointing=True, precision="bf16-true")
    trainer = fit(folder, build(folder), 3, ckpt_path=tmp_path / "at.ckpt", precision="bf16-true")
    assert trainer.global_step == 3


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_weights_of_tied_models_stay_out(folder, tmp_path, tied):
    from forge_lightning.data.tokens import build_tokenizer

    torch.manual_seed(0)
    base = ForgeModule(config=LLAMA | {"tie_word_embeddings": tied})
    base.build(build_tokenizer("bytes"))
    base.export(tmp_path / "tied")
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, filename="at")
    fit(folder, build(folder, tmp_path / "tied"), 1, [saving], enable_checkpointing=True)
    state = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if "lora_" not in name and "metrics" not in name]


def test_adapters_taken_out_of_the_base_keep_it_in_the_checkpoint(folder, tmp_path):
    settings = LORA | {"init_lora_weights": "pissa", "lora_dropout": 0.0}
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="at")
    module = build(folder, peft=settings)
    fit(folder, module, 2, [saving], enable_checkpointing=True)
    assert any("base_layer" in name for name in torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"])
    again = build(folder, peft=settings)
    fit(folder, again, 2, ckpt_path=tmp_path / "at.ckpt", max_steps=2)


def test_completing_leaves_the_generation_config(folder):
    module = build(folder)
    module.build()
    from forge_lightning.data.tokens import build_tokenizer

    module.tokenizer = build_tokenizer("bytes")
    inner = module.model.get_base_model()
    inner.generation_config.repetition_penalty = 1.3
    module.complete(["ab"], max_new_tokens=2)
    assert inner.generation_config.repetition_penalty == 1.3
