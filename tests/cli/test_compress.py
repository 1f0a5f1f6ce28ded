"""`forge-fit compress` and what reads its folder."""

import json
import random
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from forge_lightning.cli.commands import COMMANDS
from forge_lightning.cli.main import main
from forge_lightning.compression import load
from forge_lightning.compression.codecs.ternary import ternary
from forge_lightning.compression.container import FILE_NAME
from forge_lightning.models import ForgeModule

WORDS = ["for", "while", "name", "value", "return", "def", "x", "y", "= 1", "+ 2", "(", "):", "\n"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with text, a model that has seen some of it, and a config."""
    folder = tmp_path_factory.mktemp("compress")
    draw = random.Random(0)
    for name, number in (("train.jsonl", 60), ("val.jsonl", 60)):
        lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=80))}) for _ in range(number)]
        (folder / name).write_text("\n".join(lines) + "\n")
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "ForgeModule",
            "init_args": {
                "config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": data(folder),
        "trainer": {
            "accelerator": "cpu", "max_steps": 60, "num_sanity_val_steps": 0, "limit_val_batches": 2,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "TernaryQAT", "init_args": {"ramp_steps": 5}}],
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger",
                        "init_args": {"save_dir": str(folder / "runs"), "name": "small"}}],
        },
    }  # fmt: skip
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    config["trainer"]["callbacks"] = []
    config["trainer"]["logger"][0]["init_args"]["name"] = "plain"
    (folder / "plain.yaml").write_text(yaml.safe_dump(config))
    for name in ("fit", "plain"):
        assert main(["fit", "--config", str(folder / f"{name}.yaml")]) == 0
    assert (
        main(["export", "--run", str(folder / "runs" / "plain" / "version_0"), "--output", str(folder / "model")]) == 0
    )
    return folder


def data(folder):
    paths = {"path": str(folder / "train.jsonl"), "val_path": str(folder / "val.jsonl")}
    return {"class_path": "TextData", "init_args": {**paths, "block_size": 64, "batch_size": 8}}


def config(place, output, **options):
    content = {
        "model": str(place / "model"), "output": str(output), "data": data(place), "calibration_sequences": 16,
        "tuning_sequences": 16, "gate": {"max_rel_ppl": 0.05, "sequences": 32}, **options,
    }  # fmt: skip
    path = output.parent / "compress.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_folder_is_compressed_and_used(place, tmp_path, capsys):
    small = tmp_path / "small"
    assert main(["compress", "--config", config(place, small)]) == 0
    said = capsys.readouterr().out
    assert "stage 1: accepted. perplexity rises by" in said
    report = json.loads((small / "compression.json").read_text())
    assert report["file_bytes"] == (small / FILE_NAME).stat().st_size
    assert report["bits_per_parameter"] == pytest.approx(8 * report["file_bytes"] / report["num_weights"])
    verdict = report["stages"][0]["verdict"]
    assert verdict["upper"] < verdict["limit"]
    assert not (small / ".forge-compress").exists()
    page = (small / "report.html").read_text()
    assert "stage 1: accepted" in page
    assert page.count("<figure>") == 2
    assert not re.search(r"(src|href)=.http", page)

    assert main(["generate", "--model", str(small), "--prompt", "def", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def")
    test = ["--model", "ForgeModule", "--model.pretrained", str(small), "--data", "TextData"]
    test += [f"--data.{key}={value}" for key, value in data(place)["init_args"].items()]
    test += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["test", *test]) == 0
    assert "test/loss" in capsys.readouterr().out
    assert main(["export", "--dense", str(small), "--output", str(tmp_path / "dense")]) == 0
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.bfloat16
    torch.testing.assert_close(dense.lm_head.weight, load(small).lm_head.weight.bfloat16())
    module = ForgeModule(pretrained=str(small))
    module.build()
    assert torch.equal(module.model.lm_head.weight, load(small).lm_head.weight)


def test_a_run_directory_is_compressed(place, tmp_path, capsys):
    stages = [{"codecs": [{"class_path": "GPTQ", "init_args": {"bits": 6, "group_size": 32}}]}]
    run = str(place / "runs" / "plain" / "version_0")
    assert main(["compress", "--config", config(place, tmp_path / "small", model=run, stages=stages)]) == 0
    assert "bits a parameter" in capsys.readouterr().out
    assert load(tmp_path / "small").num_parameters() > 0


def test_a_bad_stage_is_refused(place, tmp_path, capsys):
    bad = {"class_path": "VPTQ", "init_args": {"vector": 8, "centroids": 2}}
    stages = [{"name": "far too small", "codecs": [bad]}]
    path = config(place, tmp_path / "small", stages=stages, strict=True)
    assert main(["compress", "--config", path]) == 1
    assert "far too small: refused. perplexity may rise by" in capsys.readouterr().out
    model = load(tmp_path / "small")
    original = ForgeModule(pretrained=str(place / "model"))
    original.build()
    for name, value in original.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": [{"targets": ["*.q_prj.*"]}]}, r"no weight matches '\*\.q_prj\.\*'\. Close: .*q_proj"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"stages": [{"codecs": [{"class_path": "GPTQ", "init_args": {"bits": 1}}]}]}, r"GPTQ\(bits=1\)"),
        ({"stages": [{"codecs": [{"class_path": "Zip"}]}]}, "Zip"),
        ({"gate": {"max_rel_ppl": -1}}, r"Gate\(max_rel_ppl=-1"),
        ({"gate": {"max_pass_drop": 0.1, "sequences": 4}}, "needs data of programming problems"),
        ({"calibration_sequences": 0}, "calibration_sequences"),
    ],
)
def test_mistakes_end_in_one_message(place, tmp_path, capsys, options, said):
    assert main(["compress", "--config", config(place, tmp_path / "small", **options)]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "small" / FILE_NAME).exists()


def test_an_output_that_exists_is_kept(place, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / FILE_NAME).write_text("mine")
    assert main(["compress", "--config", config(place, tmp_path / "small")]) == 2
    assert "holds a compressed model already" in capsys.readouterr().err
    assert (tmp_path / "small" / FILE_NAME).read_text() == "mine"
    before = (place / "model" / "config.json").read_text()
    assert main(["compress", "--config", config(place, tmp_path / "x"), "--output", str(place / "model")]) == 2
    assert "holds a model" in capsys.readouterr().err
    assert (place / "model" / "config.json").read_text() == before
    (tmp_path / "file").write_text("")
    assert main(["compress", "--config", config(place, tmp_path / "x"), "--output", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_damaged_folder_is_named(place, tmp_path, capsys):
    (tmp_path / FILE_NAME).write_bytes(b"nothing")
    (tmp_path / "config.json").write_text((place / "model" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (place / "model" / name).exists():
            (tmp_path / name).write_text((place / "model" / name).read_text())
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 2
    assert "is damaged or cut off" in capsys.readouterr().err


def test_a_ternary_run_is_exported(place, tmp_path, capsys):
    """The three forms hold the same weights, those that training rounded to."""
    run = str(place / "runs" / "small" / "version_0")
    for form in ("rounded", "packed", "bitnet"):
        assert main(["export", "--run", run, "--output", str(tmp_path / form), "--ternary", form]) == 0
        assert ("forge-fit generate --model" in capsys.readouterr().out) == (form == "packed")
    from transformers import AutoModelForCausalLM

    checkpoint = torch.load(next((place / "runs" / "small").rglob("*.ckpt")), weights_only=True)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = ternary(checkpoint["state_dict"][f"model.{name}"])
    assert len(expected.unique()) == 3
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded").get_parameter(name)
    assert torch.equal(rounded, expected)
    assert torch.equal(load(tmp_path / "packed").get_parameter(name), expected)
    stored = load_file(tmp_path / "bitnet" / "model.safetensors")
    assert 1 / float(stored[f"{name}_scale"]) == pytest.approx(float(expected.abs().max()))
    # What goes on from a run has them too.
    assert main(["generate", "--run", run, "--prompt", "def", "--max_new_tokens", "2"]) == 0
    assert "Weights of the layers of TernaryQAT are rounded" in capsys.readouterr().err


def test_ternary_is_refused_of_another_run(place, tmp_path, capsys):
    run = str(place / "runs" / "plain" / "version_0")
    assert main(["export", "--run", run, "--output", str(tmp_path / "x"), "--ternary", "packed"]) == 2
    assert "has no `TernaryQAT`" in capsys.readouterr().err


def test_help_says_what_is_there(capsys):
    assert main(["compress", "--help"]) == 0
    text = capsys.readouterr().out
    for argument in ("--model", "--output", "--data", "--stages", "--gate", "--serial", "--strict"):
        assert argument in text
    assert "compress" in COMMANDS
