"""The command line, in this process where that is enough."""

import gzip
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from forge_lightning import callbacks, models
from forge_lightning.cli.checks import refuse_optimizer
from forge_lightning.cli.configs import config_folders, refuse_doubled_keys, shipped_configs
from forge_lightning.cli.main import main
from tests import processes
from tests.models.test_forge_module import word_tokenizer

SHIPPED = [name for name, _ in shipped_configs()]
QUICK = ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])


def forge_fit(*args, env=None):
    if env is None:
        return processes.run_module("forge_lightning.cli", *args, cwd=Path.cwd())
    code = "import sys; from forge_lightning.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    return processes.run(command, env=env)


def small_modular(tmp_path, *more):
    """A fit of a second: the shipped config, made small."""
    return main(
        [
            "fit", "--config=grokfast_modular", "--model.dim=16", "--model.num_heads=2", "--data.modulus=11",
            "--trainer.enable_progress_bar=false", *QUICK, *more,
        ]
    )  # fmt: skip


def test_every_shipped_config_has_a_description():
    assert len(SHIPPED) >= 6
    assert all(len(about) > 20 for _, about in shipped_configs())


def test_list_prints_them(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {name.removesuffix(".yaml") for name in SHIPPED} <= {line.split()[0] for line in lines if line.split()}
    assert max(map(len, lines)) <= 80
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "Run"))]
    assert groups == ["Language models:", "Algorithmic tasks:", "Add-ons:", "Loggers:"]
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out.split() == SHIPPED


def test_list_tells_of_callbacks_what_they_tell_of_themselves(capsys):
    assert main(["list", "--callbacks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown, name = {}, ""
    for line in lines:
        name = name if line.startswith(" ") else line.split()[0]
        shown[name] = " ".join([*shown.get(name, "").split(), *line.removeprefix(name).split()])
    assert shown["Grokfast"] == callbacks.Grokfast.__doc__.split("\n")[0]
    assert set(shown) == {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert main(["list", "--callbacks", "DreamReplay"]) == 0
    card = capsys.readouterr().out
    for part in (
        "Hook:",
        "Reads:",
        "Changes:",
        "forge/dream/stored",
        "When it does not help:",
        "callbacks.help=DreamReplay",
    ):
        assert part in card
    assert "every_n_steps: Optimizer steps" not in card, "the arguments are the command's own help"
    with pytest.raises(SystemExit):
        main(["list", "--callbacks", "Grokslow"])
    assert "Grokfast" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid(name, capsys, small_mbpp, monkeypatch):
    monkeypatch.setenv("FORGE_MBPP", small_mbpp)
    Path("data.txt").write_text("named in grokfast_text.yaml")
    names = [name] if "/" not in name else ["grokfast_modular", "--config", name]
    if name.startswith("callbacks/"):  # may add what the recipe has already
        names = ["base.yaml", "--config", name]
        Path("base.yaml").write_text("model: AlgorithmicModule\ndata: GeneratedTasks\ntrainer: {callbacks: []}\n")
    assert main(["check", *names]) == 0
    assert "valid." in capsys.readouterr().out
    assert main(["check", "--config", *names]) == 0  # as `fit` takes it


# Lightning's remark on sharded models, which those recipes do not have.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize("name", [name for name in SHIPPED if "/" not in name])
def test_every_shipped_recipe_runs_dry(name, small_mbpp, monkeypatch):
    monkeypatch.setenv("FORGE_MBPP", small_mbpp)
    Path("data.txt").write_text("some text of one's own. " * 200)
    assert main(["fit", "--config", name, "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]) == 0


def test_a_run_leaves_a_directory_that_can_be_read(tmp_path, capsys):
    assert small_modular(tmp_path, "--trainer.max_steps=20") == 0
    run = tmp_path / "runs/grokfast_modular/version_0"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.csv", "summary.json", "learning_curves.png", "checkpoints",
    }  # fmt: skip
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["modulus"] == 11
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["run"] == "runs/grokfast_modular/version_0"
    assert Path(summary["last_checkpoint"]).exists()
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert {"Grokfast", "RunSummary"} <= set(checkpoint["callbacks"])
    assert "Run finished" in capsys.readouterr().out


# Lightning ends the epoch once more when it resumes at an epoch's end, and by then the metrics are gone.
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor='val/accuracy'.` could not find the monitored key")
def test_a_saved_config_repeats_the_run_and_a_checkpoint_continues_it(tmp_path):
    assert small_modular(tmp_path, "--trainer.max_steps=6") == 0
    run = "runs/grokfast_modular/version_0"
    again = ["fit", f"--config={run}/config.yaml", "--trainer.max_steps=9"]
    assert main([*again, f"--ckpt_path={run}/checkpoints/last.ckpt"]) == 0
    assert main(["validate", f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]) == 0
    assert main(again) == 0
    paths = sorted(Path("runs/grokfast_modular").glob("version_*/checkpoints/last.ckpt"))
    _, continued, straight = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(continued[key], straight[key]) for key in straight)


def test_configs_are_found_in_the_working_directory_first(tmp_path, capsys):
    Path("configs").mkdir()
    shipped = (config_folders()[-1] / "grokfast_modular.yaml").read_text()
    Path("configs/grokfast_modular.yaml").write_text(shipped.replace("modulus: 97", "modulus: 9999991"))
    Path("mine.yaml").write_text(shipped.replace("AlgorithmicData", "NoSuchData"))
    assert main(["check", "grokfast_modular"]) == 0
    assert "NoSuchData" in explained(capsys, "check", "mine")


def test_add_on_configs_append(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    assert small_modular(tmp_path, "--config=loggers/tensorboard", "--trainer.max_steps=4") == 0
    assert list((tmp_path / "runs/tensorboard").rglob("events.out.tfevents*"))
    assert (tmp_path / "runs/grokfast_modular/version_0/metrics.csv").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_wandb_offline_is_one_line(tmp_path):
    assert small_modular(tmp_path, "--config=loggers/wandb", "--trainer.max_steps=4") == 0
    assert list((tmp_path / "runs").rglob("*.wandb"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_steps=abc"], "trainer.max_steps"),
        (["--data.train_fraction=2"], r"train_fraction=2.0)` must be in (0, 1)"),
        (["--trainer.callbacks=Grokfast", "--trainer.callbacks.alhpa=1"], "alhpa"),
        (["--trainer.callbacks=Grokfast", "--trainer.callbacks.lamb=-1"], "Grokfast(lamb=-1.0)` must be at least 0"),
        (["--trainer.callbacks=Grokfast", "--trainer.callbacks.filter=median"], "median"),
        (["--no_such_option=1"], "no_such_option"),
    ],
)
def test_bad_types_ranges_and_keys_end_in_a_message(args, message, capsys):
    try:
        code = main(["check", "grokfast_modular", *args])
    except SystemExit as stop:  # the parser's way
        code = stop.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def explained(capsys, *args):
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert "forge-fit: " in err
    assert "Traceback" not in err
    return err


def test_bad_input_is_explained(capsys, tmp_path, small_mbpp, monkeypatch):
    monkeypatch.delenv("FORGE_MBPP", raising=False)
    assert "grokfast_modular.yaml" in explained(capsys, "fit", "--config", "nope")
    assert "no such command" in explained(capsys, "train")
    mbpp = ["fit", "--config=grokfast_mbpp", "--trainer.enable_progress_bar=false", *QUICK]
    assert "Cannot read the data file" in explained(capsys, *mbpp, "--data.path=absent.jsonl")
    Path("bad.jsonl").write_text('{"task_id": 1}\n')
    assert "bad.jsonl, line 1: field 'text' is missing" in explained(capsys, *mbpp, "--data.path=bad.jsonl")
    assert "yardstick" in explained(capsys, "check", "grokfast_mbpp", "--data.dataset=humaneval")
    no_model = ["--model.config=null", "--model.pretrained=no/such"]
    assert "local folder" in explained(capsys, *mbpp, f"--data.path={small_mbpp}", *no_model)
    assert "`ForgeModule(pretrained='no/such')` is neither" in explained(
        capsys, "check", "grokfast_mbpp", f"--data.path={small_mbpp}", *no_model
    )
    for command in (["check", "grokfast_mbpp"], mbpp):
        told = explained(capsys, *command, f"--data.path={small_mbpp}", "--data.tokenizer=.")
        assert "`tokenizer='.'` is neither a local folder with a tokenizer" in told
        assert "(the folder holds none)" in told
    assert not Path("runs").exists(), "nothing that cannot start leaves a run"
    assert "the hub cannot be reached" in explained(capsys, *mbpp)
    assert "holds no config.yaml" in explained(capsys, "generate", "--run", "absent", "--prompt", "x")
    assert "`--data.path=absent.jsonl`: no such file" in explained(
        capsys, "check", "grokfast_mbpp", "--data.path=absent.jsonl"
    )
    assert "it is a directory" in explained(capsys, "check", "grokfast_mbpp", "--data.path=/usr")
    rest = ["check", "grokfast_mbpp", f"--data.path={small_mbpp}"]
    assert "`embed_dim` must be divisible" in explained(capsys, *rest, "--model.config.n_head=5")
    assert "`--ckpt_path nope.ckpt`: no such file" in explained(capsys, *rest, "--ckpt_path=nope.ckpt")
    assert "reaches the last callback alone" in explained(capsys, *rest, "--trainer.callbacks.lamb=0.1")
    assert "Close: ['max_steps'" in explained(capsys, *rest, "--trainer.max_step=150")
    assert "`val_check_interval` (900) must be" in explained(
        capsys, *mbpp, *rest[2:], "--trainer.val_check_interval=900"
    )
    assert "Close: ['n_head'" in explained(capsys, "check", "grokfast_mbpp", "--model.config.n_haed=3")
    modular = ["fit", "--config=grokfast_modular", "--trainer.enable_progress_bar=false"]
    assert "given as checkpoint is none" in explained(capsys, *modular, "--ckpt_path=bad.jsonl")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"callbacks": [{"class_path": "RunSumary"}]}, "RunSumary.*Close: \\['RunSummary'"),
        (
            {"callbacks": [{"class_path": "Grokfast", "init_args": {"alhpa": 0.9}}]},
            "'alhpa' is not accepted.*Close: \\['alpha'",
        ),
        (
            {"callbacks": [{"class_path": "DreamReplay", "init_args": {"fraction": 0.5}}]},
            r"'fraction' is not accepted\n`fraction` is now `schedule=Mix\(fraction=...\)`",
        ),
        (
            {
                "callbacks": [
                    {
                        "class_path": "DreamReplay",
                        "init_args": {"schedule": {"class_path": "Sleep", "init_args": {"num_step": 5}}},
                    }
                ]
            },
            r"Sleep':\n +Option 'num_step' is not accepted.*Close: \['num_steps'",
        ),
        (
            {"callbacks": [{"class_path": "Grokfast", "init_args": {"filter": "mean"}}]},
            "'ema', 'ma', 'projection'.*mean",
        ),
        ({"callbacks": [{"class_path": "EdgeController"}]}, "nothing to choose from in this AlgorithmicData"),
        ({"max_steps": "many"}, "max_steps.*many"),
        (
            {"callbacks": [{"class_path": "RunSummary", "init_args": {"threshold": "fast"}}]},
            "Expected a <class 'float'>",
        ),
    ],
)
def test_a_mistake_in_a_config_is_told_in_a_few_lines(capsys, wrong, says):
    text = yaml.safe_dump({"model": "AlgorithmicModule", "data": "AlgorithmicData", "trainer": wrong})
    Path("wrong.yaml").write_text(text)
    told = explained(capsys, "check", "wrong.yaml")
    assert re.search(says, told, re.DOTALL), told
    assert len(told.splitlines()) <= 10
    assert "usage" not in told


def test_a_mistake_is_told_with_its_file_and_line(capsys):
    recipe = ["check", "grokking_fast", "--config", "more.yaml"]
    more = Path("more.yaml")
    more.write_text("trainer:\n  max_steps: 3\n callbacks:\n")
    told = explained(capsys, *recipe)
    assert 'in "more.yaml", line 3' in told
    assert "unicode string" not in told
    more.write_text("trainer:\n  max_epochs: 3\n  max_stepz: 3\n")
    told = explained(capsys, *recipe)
    assert "There is no option 'trainer.max_stepz'\n(more.yaml, line 3)\nClose: ['max_steps'" in told
    more.write_text("trainer:\n  max_steps: many\n")
    assert "(more.yaml, line 2)" in explained(capsys, *recipe)  # and not the recipe, which sets it too
    assert ".yaml, line" not in explained(capsys, *recipe, "--trainer.max_steps=more")
    more.write_text("data:\n  class_path: AlgorithmicData\n  init_args:\n    batch_size: many\n")
    Path("last.yaml").write_text("data:\n  init_args:\n    modulus: 7\n")
    assert "(more.yaml, line 4)" in explained(capsys, *recipe, "--config=last.yaml")
    more.write_text("trainr:\n  max_steps: 3\n")
    assert "(more.yaml, line 1)\nClose: ['trainer']" in explained(capsys, "test", *recipe[2:])


def test_classes_and_numbers_that_are_wrong_inside_a_model(capsys):
    optimizer = "    optimizer:\n      class_path: torch.optim.{}\n      init_args: {{lr: {}}}\n"
    model = "model:\n  class_path: AlgorithmicModule\n  init_args:\n" + optimizer
    command = ["check", "more.yaml", "--data=AlgorithmicData"]
    Path("more.yaml").write_text(model.format("AdmW", 0.1))
    told = explained(capsys, *command)
    assert told.endswith(
        "module 'torch.optim' has no attribute 'AdmW'\n(more.yaml, line 5)\nClose: ['AdamW', 'Adam', 'RAdam'].\n"
    )
    Path("more.yaml").write_text(model.format("AdamW", "fast"))
    told = explained(capsys, *command)
    assert told.endswith("Expected a <class 'float'>\n            Given value: fast\n(more.yaml, line 6)\n")
    Path("more.yaml").write_text("")
    assert explained(capsys, *command) == "forge-fit: more.yaml is empty.\n"
    heads = "--model.config.num_attention_heads=5"
    assert "not a multiple of the number of attention heads" in explained(
        capsys, "check", "grokfast_text", "--data.path=more.yaml", heads
    )
    missing = ["fit", "--config=grokking_fast", "--ckpt_path=absent.ckpt"]
    assert "`--ckpt_path absent.ckpt`: no such file" in explained(capsys, *missing)
    assert main(["list", "--callbacks", "grokfast"]) == 0
    assert "Amplify" in capsys.readouterr().out


def test_what_is_out_of_range_is_placed(capsys):
    callbacks = "trainer:\n  callbacks:\n    - class_path: RunSummary\n      init_args: {mode: mi}\n"
    Path("more.yaml").write_text(callbacks)
    told = explained(capsys, "check", "grokfast_mbpp", "--config=more.yaml", "--data.path=more.yaml")
    assert told.endswith("`RunSummary(mode='mi')` must be 'max' or 'min'.\n(more.yaml, line 4)\n")
    Path("more.yaml").write_text("data:\n  init_args:\n    path: absent.txt\n")
    told = explained(capsys, "check", "grokfast_text", "--config=more.yaml")
    assert told.endswith("`--data.path=absent.txt`: no such file.\n(more.yaml, line 3)\n")


def test_no_file_is_blamed_for_what_it_does_not_say(capsys, monkeypatch):
    Path("right.yaml").write_text("trainer:\n  max_steps: 3\n")
    Path("check.yaml").write_text("trainer:\n  max_steps: many\n")  # and not asked for
    recipe = ["check", "grokking_fast", "--config", "right.yaml"]
    assert ".yaml, line" not in explained(capsys, *recipe, "--config", "trainer:\n  max_steps: many\n")
    long = ["--trainer.max_steps=many", f"--trainer.default_root_dir={300 * 'a'}"]
    assert "max_steps" in explained(capsys, *recipe, *long)
    monkeypatch.setenv("FORGE_FIT__TRAINER__MAX_STEPS", "many")
    assert ".yaml, line" not in explained(capsys, "check", "right.yaml", "--model=AlgorithmicModule")


def test_a_text_that_is_too_short_leaves_no_run(capsys):
    Path("short.txt").write_text("too short")
    told = explained(capsys, "fit", "--config=grokfast_text", "--data.path=short.txt", *QUICK)
    assert "short.txt is too short for a train block of block_size=256" in told
    assert not Path("runs").exists()


def test_a_text_of_any_length_is_validated_by_steps():
    for name, words in (("short", 300), ("long", 30_000)):
        Path(f"{name}.txt").write_text("words " * words)
        arguments = [f"--data.path={name}.txt", "--data.block_size=16", f"--trainer.logger.name={name}", *QUICK]
        arguments += ["--trainer.max_steps=5", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
        assert main(["fit", "--config=grokfast_text", "--trainer.enable_progress_bar=false", *arguments]) == 0
        (run,) = Path("runs", name).iterdir()
        assert json.loads((run / "summary.json").read_text())["best_step"] in (2, 4)
        assert sorted(path.name for path in run.glob("checkpoints/step=*.ckpt")) in (["step=2.ckpt"], ["step=4.ckpt"])


@pytest.mark.filterwarnings("ignore:.ModelCheckpoint.monitor:UserWarning")
def test_what_is_not_read_is_not_asked_for(capsys, small_mbpp):
    text = Path("corpus.txt")
    text.write_text("some words, and some more. " * 40)
    short = ["--data.block_size=16", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false", *QUICK]
    assert main(["fit", "--config=grokfast_text", "--data.path=corpus.txt", *short]) == 0
    text.rename("moved.txt")
    (run,) = Path("runs").glob("*/version_0")
    assert main(["generate", "--run", str(run), "--prompt", "some", "--max_new_tokens=2"]) == 0
    assert "`--data.path=corpus.txt`: no such file" in explained(
        capsys, "validate", "--config", str(run / "config.yaml")
    )
    test = ["--data.path=absent.jsonl", "--data.test_dataset=mbpp", f"--data.test_path={small_mbpp}"]
    assert main(["test", "--config=grokfast_mbpp", "--trainer.callbacks=null", *test, *QUICK[1:]]) == 0


class Timed(models.AlgorithmicModule):
    """Knows the length of its schedule only in training."""

    def configure_optimizers(self):
        return super().configure_optimizers()


def test_optimizers_that_a_module_makes_are_those_that_are_tried(capsys):
    groups = [
        "check", "grokfast_text", "--data.path=corpus.txt", "--model.lr_scheduler=OneCycleLR",
        "--model.lr_scheduler.max_lr=[0.001,0.002]", "--model.lr_scheduler.total_steps=9",
    ]  # fmt: skip
    Path("corpus.txt").write_text("words")
    assert main(groups) == 0
    fused = ["--model.optimizer=Adam", "--model.optimizer.fused=true", "--model.optimizer.foreach=true"]
    assert "`fused` and `foreach` cannot be" in explained(capsys, "check", "grokking_fast", *fused)
    muon = ["--model.optimizer=torch.optim.Muon"]
    assert "only supports 2D parameters" in explained(capsys, "check", "grokking_fast", *muon)
    refuse_optimizer(Timed(lr_scheduler=lambda optimizer: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        refuse_optimizer(models.AlgorithmicModule(lr_scheduler=lambda optimizer: 1 / 0))


def test_what_cannot_train_is_refused_before_there_is_a_run(capsys, monkeypatch):
    fast = "grokking_fast"
    for command in (["fit", "--config", fast], ["check", fast]):
        assert "Learning rate should be >= 0" in explained(capsys, *command, "--model.optimizer.lr=-1")
        assert "factor expected to be between 0 and 1" in explained(
            capsys, *command, "--model.lr_scheduler.end_factor=-1"
        )
        assert "max_steps" in explained(capsys, *command, "--trainer.max_steps=-5")
    monkeypatch.setenv("FORGE_MBPP", "absent.jsonl")
    for command in (["fit", "--config", "grokfast_mbpp"], ["check", "grokfast_mbpp"]):
        assert "`FORGE_MBPP=absent.jsonl`: no such file" in explained(capsys, *command)
    monkeypatch.delenv("FORGE_MBPP")
    monkeypatch.delenv("FORGE_HUMANEVAL", raising=False)
    Path("more.yaml").touch()
    assert "the hub cannot be reached" in explained(capsys, "fit", "--config", "grokfast_mbpp")
    assert not Path("runs").exists()
    assert main(["check", "grokfast_mbpp"]) == 0
    assert "comes from the Hugging Face hub" in capsys.readouterr().out
    assert main(["check", "grokfast_mbpp", "--data.path=more.yaml", "--data.test_dataset=humaneval"]) == 0
    assert "test data comes from the Hugging Face hub, since neither `--data.test_path` nor" in capsys.readouterr().out
    assert main(["check", "--config", "full_suite_tiny"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("full_suite_tiny: valid.")  # its data is generated
    assert "hub" not in shown.out
    assert shown.err == ""


def test_a_mistake_in_the_arguments_is_told(capsys):
    assert "Close: ['max_steps'" in explained(capsys, "check", "grokking_fast", "--trainer.max_stps=3")
    assert "Close: ['callbacks'" in explained(capsys, "check", "grokking_fast", "--trainer.calbacks+=Grokfast")
    assert "Close: ['trainer']" in explained(capsys, "check", "grokking_fast", "--trainr.max_steps=3")
    Path("more.yaml").write_text("trainer: {max_steps: 3}\n")
    assert "behind a `--config` of its own" in explained(capsys, "check", "grokking_fast", "more.yaml")
    assert "behind a whole recipe" in explained(capsys, "check", "callbacks/grokfast")
    assert "Close: ['grokking_fast.yaml'" in explained(capsys, "check", "groking_fast")
    assert "Close: ['Grokfast']" in explained(capsys, "fit", "--trainer.callbacks.help=Grokfats")


def test_a_run_is_looked_for_below(capsys):
    folder = Path("runs/mine/version_0")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert str(folder) in explained(capsys, "generate", "--run", "runs", "--prompt", "x")


def test_an_unwritable_run_directory_is_explained(capsys, tmp_path):
    Path("runs").write_text("a file, where the folder should be")
    args = ["fit", "--config=grokfast_modular", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]
    assert re.search("Not a directory: '.*runs", explained(capsys, *args))
    assert Path("runs").read_text().startswith("a file")


def test_a_pretrained_folder_needs_a_config_and_weights(capsys, small_mbpp, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", n_embd=8, n_head=1, n_layer=1, vocab_size=384)
    folder = tmp_path / "folder"
    config.save_pretrained(folder)
    arguments = ["check", "grokfast_mbpp", f"--data.path={small_mbpp}", "--model.config=null"]
    arguments += [f"--model.pretrained={folder}"]
    assert "no file in the folder ends in .safetensors or .bin" in explained(capsys, *arguments)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert main(arguments) == 0
    assert "valid. ForgeModule on CodeTasks" in capsys.readouterr().out
    word_tokenizer(folder, 300)
    assert "of which 0 are the same" in explained(capsys, *arguments, "--data.tokenizer=bytes")
    (folder / "config.json").unlink()
    assert "folder that holds config.json" in explained(capsys, *arguments)


class Elsewhere(models.ForgeModule):
    """Knows another place for its weights."""

    def _pretrained_model(self):
        raise AssertionError("no check makes weights")


def test_check_builds_as_fit_does_and_leaves_other_builds_alone(capsys):
    Path("corpus.txt").write_text("some words, and some more. " * 40)
    text = ["check", "grokfast_text", "--data.path=corpus.txt", "--trainer.callbacks=null"]
    small = ["hidden_size=32", "intermediate_size=64", "num_attention_heads=4", "num_key_value_heads=4"]
    phi = [f"--model.config.{setting}" for setting in ("model_type=phi3", "vocab_size=384", *small)]
    assert "negative dimension" in explained(capsys, *text, "--model.config.intermediate_size=-8")
    assert main([*text, *phi]) == 0  # whose own padding is beyond this vocabulary: the tokenizer's is taken
    other = ["--model=tests.cli.test_cli.Elsewhere", "--model.config=null", "--model.pretrained=no/such"]
    assert main([*text, *other]) == 0
    shown = capsys.readouterr().out
    assert "valid. Elsewhere on TextData" in shown
    assert "not known" not in shown


def test_check_says_where_a_model_could_not_be_tried(capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    def needs_weights(config):
        return torch.ones(1).item()

    Path("corpus.txt").write_text("some words, and some more. " * 40)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", needs_weights)
    assert main(["check", "grokfast_text", "--data.path=corpus.txt"]) == 0
    assert "Whether its model can be made is not known" in capsys.readouterr().out


def test_a_checkpoint_of_another_shape_is_explained(capsys, tmp_path):
    assert small_modular(tmp_path, "--trainer.max_steps=1") == 0
    capsys.readouterr()
    path = "runs/grokfast_modular/version_0/checkpoints/last.ckpt"
    args = ["fit", "--config=grokfast_modular", "--trainer.enable_progress_bar=false", f"--ckpt_path={path}"]
    before = Path(path).read_bytes()
    err = explained(capsys, *args)
    assert "does not fit the model of this config" in err
    assert "size mismatch" in err
    assert Path(path).read_bytes() == before
    assert "absent.ckpt" in explained(capsys, *args[:-1], "--ckpt_path=absent.ckpt")


def test_explicit_settings_win_over_those_of_a_checkpoint(tmp_path):
    """Lightning's own order is the other way round."""
    Path("mine.py").write_text(
        "import torch, lightning as L\n"
        "from torch.utils.data import DataLoader\n"
        "class Mine(L.LightningModule):\n"
        "    def __init__(self, width: int = 2, depth: int = 1, rate: float = 0.1):\n"
        "        super().__init__()\n"
        "        self.save_hyperparameters()\n"
        "        self.net = torch.nn.Linear(2, 1)\n"
        "    def training_step(self, batch, i): return self.net(batch).mean()\n"
        "    def test_step(self, batch, i):\n"
        "        print('HAS', self.hparams.width, self.hparams.depth, self.hparams.rate)\n"
        "    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)\n"
        "class Data(L.LightningDataModule):\n"
        "    def train_dataloader(self): return DataLoader(torch.ones(4, 2))\n"
        "    test_dataloader = train_dataloader\n"
    )
    base = "model: {class_path: mine.Mine, init_args: {width: %d}}\ndata: mine.Data\n"
    base += "trainer: {max_epochs: 1, logger: false, enable_progress_bar: false, accelerator: cpu, devices: 1}\n"
    Path("a.yaml").write_text(base % 5)
    Path("b.yaml").write_text(base % 7)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    fit = forge_fit("fit", "--config", "a.yaml", "--model.depth=3", env=environment)
    assert fit.returncode == 0, fit.stderr
    (path,) = tmp_path.rglob("*.ckpt")
    test = forge_fit("test", "--config", "b.yaml", "--model.rate=0.5", "--ckpt_path", path, env=environment)
    assert "HAS 7 3 0.5" in test.stdout, test.stdout + test.stderr


def test_generate_and_export_read_a_run(small_mbpp, capsys, tmp_path):
    args = ["fit", "--config=grokfast_mbpp", f"--data.path={small_mbpp}", "--trainer.max_steps=3"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.callbacks=ModelCheckpoint"]
    args += ["--trainer.check_val_every_n_epoch=1", *QUICK]
    assert main(args) == 0
    run = "runs/grokfast_mbpp/version_0"
    capsys.readouterr()
    assert main(["generate", "--run", run, "--prompt", "def f", "--max_new_tokens", "4"]) == 0
    assert main(["generate", "--run", run, "--prompt", "def f", "--max_new_tokens", "4", "--temperature", "1"]) == 0
    assert main(["export", "--run", run, "--output", "exported"]) == 0
    assert re.search(r"Weights: .*[.]ckpt, of step \d+$", capsys.readouterr().err, re.MULTILINE)
    assert "holds a model already" in explained(capsys, "export", "--run", run, "--output", "exported")
    assert "at least 1" in explained(capsys, "generate", "--run", run, "--prompt", "x", "--max_new_tokens", "0")
    assert "is a file" in explained(capsys, "export", "--run", run, "--output", f"{run}/config.yaml")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("exported")
    (checkpoint,) = Path(run).rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(p, state[f"model.{name}"]) for name, p in model.named_parameters())
    assert len(AutoTokenizer.from_pretrained("exported")) == 384
    assert "default: the run's newest" in forge_fit("generate", "--help").stdout


def test_exit_codes_and_help(capsys):
    bad = forge_fit("check", "grokfast_modular", "--data.modulus=1")
    assert bad.returncode == 2
    assert "`AlgorithmicData(modulus=1)` must be at least 3" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert main(["check", "grokfast_modular"]) == 0
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "export" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--trainer.callbacks.help=Grokfast"])
    assert "Largest λ, at least 0; 0 turns the callback off" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_fit_leaves_a_resumable_checkpoint(tmp_path, number, code):
    arguments = ["fit", "--config=grokfast_modular", "--trainer.enable_progress_bar=false"]
    arguments += ["--model.dim=16", "--model.num_heads=2", "--data.modulus=11", "--trainer.max_steps=100000"]
    command = [sys.executable, "-W", "ignore", "-m", "forge_lightning.cli", *arguments]
    metrics, said = tmp_path / "runs/grokfast_modular/version_0/checkpoints/last.ckpt", tmp_path / "output.txt"
    with open(said, "w") as file, processes.started(command, stdout=file, stderr=subprocess.STDOUT) as process:
        processes.wait(process, until=metrics.exists)
        process.send_signal(number)
        processes.wait(process)
    output = said.read_text()
    assert process.returncode == code, output
    path = metrics.with_name("interrupted.ckpt")
    steps = torch.load(path, weights_only=True)["global_step"]
    summary = json.loads((metrics.parents[1] / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] == steps > 0
    assert f"--ckpt_path {path.relative_to(tmp_path)}" in output
    resumed = forge_fit(*arguments, f"--ckpt_path={path}", f"--trainer.max_steps={steps + 3}")
    assert resumed.returncode == 0, resumed.stderr


def observed(tmp_path, *more):
    """A second of the shipped recipe."""
    small = ["--model.dim=16", "--model.num_heads=2", "--data.modulus=11", "--trainer.enable_progress_bar=false"]
    small += ["--trainer.max_steps=120", "--trainer.log_every_n_steps=5", "--trainer.accelerator=cpu"]
    return main(["fit", "--config=grokking_observed", *small, *more])


@pytest.mark.filterwarnings("ignore:GeometryProbe. no correlation")  # 48 examples are few
@pytest.mark.filterwarnings("ignore:GeometryProbe. a probe takes")  # the steps are short
def test_an_observed_run_is_analysed(tmp_path, capsys):
    assert observed(tmp_path) == 0
    run = tmp_path / "runs/grokking_observed/version_0"
    assert (run / "trace.jsonl").exists()
    assert main(["analyze", str(run)]) == 0
    assert str(run / "analysis/report.html") in capsys.readouterr().out
    numbers = json.loads((run / "analysis/analysis.json").read_text())["runs"][0]
    assert numbers["last_step"] == 120
    assert any("geometry" in name for name in numbers["series"])
    assert main(["analyze", "--checkpoint", str(run / "checkpoints/last.ckpt")]) == 0
    assert (run / "checkpoints/last_analysis/report.html").exists()
    assert main(["analyze", str(run), str(run / "trace.jsonl"), "--output", "both"]) == 0
    assert (tmp_path / "both/comparison_light.png").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "no such file or directory"),
        (["empty"], "neither a trace.jsonl nor a metrics.csv"),
        (["--checkpoint", "nowhere.ckpt"], "no such file"),
        (["--checkpoint", "text.ckpt"], "is none, or holds more than weights"),
    ],
)
def test_what_cannot_be_analysed_is_explained(args, says, tmp_path, capsys):
    Path("empty").mkdir()
    Path("text.ckpt").write_text("not a checkpoint")
    assert main(["analyze", *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_analyze_needs_runs_or_a_checkpoint(capsys):
    for args in ([], ["run", "--checkpoint", "file"]):
        with pytest.raises(SystemExit) as stop:
            main(["analyze", *args])
        assert stop.value.code == 2
    assert "name one or more runs" in capsys.readouterr().err


def test_a_misspelt_layer_is_explained(tmp_path, capsys):
    Path("layer.yaml").write_text(
        "trainer: {callbacks+: [{class_path: GeometryProbe, init_args: {layers: [model.layer.0], name: mine}}]}"
    )
    assert observed(tmp_path, "--config=layer.yaml") == 2
    assert "Close: ['model.layers.0'" in capsys.readouterr().err


def test_weights_and_biases_gets_config_tags_and_name(tmp_path):
    """Offline: what it wrote to disk."""
    small = ["--model.dim=16", "--model.num_heads=2", "--data.modulus=11", "--trainer.max_steps=4", *QUICK]
    add_on = ["--config=loggers/wandb", "--trainer.logger.name=my_run", "--trainer.enable_progress_bar=false"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    result = forge_fit("fit", "--config=grokfast_modular", *add_on, *small, env=clean)
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "runs/wandb").glob("offline-run-*/*.wandb")
    text = written.read_bytes()
    for expected in (b"my_run", b"forge-lightning", b"AlgorithmicData", b"modulus"):
        assert expected in text


def test_two_heads_are_refused_before_a_model_is_built(capsys):
    assert main(["check", "self_knowledge_tiny", "--config", "callbacks/self_model"]) == 2
    assert "a head of its own, `self_model`, and this callback would be a second" in capsys.readouterr().err


def test_one_callback_twice_is_told_in_fit(capsys):
    arguments = ["fit", "--config", "self_knowledge_tiny.yaml", "--config", "callbacks/calibration"]
    assert main([*arguments, "--trainer.max_steps=1"]) == 2
    assert "more than one stateful callback" in capsys.readouterr().err


def test_weights_of_a_head_that_is_missing_are_explained(tmp_path, capsys):
    fit = ["fit", "--config", "edge_arithmetic.yaml", "--trainer.max_steps=2", "--data.num_val=2"]
    assert main([*fit, "--config", "callbacks/self_model"]) == 0
    (checkpoint,) = (tmp_path / "runs").rglob("last.ckpt")
    capsys.readouterr()
    test = ["test", "--config", "edge_arithmetic.yaml", "--data.num_val=2", "--ckpt_path", str(checkpoint)]
    assert main(test) == 2
    assert (
        "A callback that adds weights to the model, as `SelfModel` does, belongs in both runs"
        in capsys.readouterr().err
    )
    run = str(checkpoint.parents[1])
    assert main(["export", "--run", run, "--output", str(tmp_path / "out")]) == 0  # without the head
    deeper = torch.load(checkpoint, weights_only=True)
    deeper["state_dict"]["model.transformer.h.9.ln_1.weight"] = torch.ones(2)
    torch.save(deeper, tmp_path / "deeper.ckpt")
    capsys.readouterr()
    words = ["generate", "--run", run, "--prompt", "1+1", "--ckpt_path", str(tmp_path / "deeper.ckpt")]
    assert main(words) == 2
    assert "model.transformer.h.9.ln_1.weight" in capsys.readouterr().err


RECORD = {"text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
RECORD |= {"test_setup_code": "", "score": float("nan")}
SMALL = """
model: {class_path: ForgeModule, init_args: {config: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2}}}
data: {class_path: CodeTasks, init_args: {path: d.jsonl, max_length: 400, batch_size: 2}}
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, logger: false, enable_checkpointing: false}
"""


@pytest.fixture
def small_config(tmp_path):
    def write(name, more="", **change):
        lines = (json.dumps(RECORD | {"task_id": i} | change) for i in (601, 602, 511, 11))
        (tmp_path / name).write_text("\n".join(lines) + "\n" + more)

    write("d.jsonl")
    write("surrogate.jsonl", text="cut emoji \ud83d")
    write("tests.jsonl", test_list=[1, 2])
    write("bigint.jsonl", '{"task_id": ' + "9" * 5000 + "}\n")
    write("deep.jsonl", '{"task_id": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    whole = bytearray(gzip.compress((tmp_path / "d.jsonl").read_bytes() * 50))
    whole[60:90] = bytes(255 - b for b in whole[60:90])
    (tmp_path / "corrupt.jsonl.gz").write_bytes(whole)
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"a": torch.zeros(999)}, tmp_path / "whole.pt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    (tmp_path / "b.yaml").write_text(SMALL)
    return tmp_path / "b.yaml"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--data.path=surrogate.jsonl", r"line 1: field 'text' holds half of a character"),
        ("--data.path=tests.jsonl", r"field 'test_list' must be a list of texts, but holds a int"),
        ("--data.path=bigint.jsonl", r"line 5: Exceeds the limit"),
        ("--data.path=deep.jsonl", r"line 5: nested too deeply"),
        ("--data.path=corrupt.jsonl.gz", r"not a complete gzip file"),
        ("--data.prompt_template={text} {tests} {x}", r"has other braces than {text} and {tests} \('x'\)"),
        ("--data.difficulty=score", r"`CodeTasks\(difficulty='score'\)`.*with 2 that are not finite"),
        ("--data.difficulty=tokens", r"`CodeTasks\(difficulty='tokens'\)`.*is the same for all"),
        ("--data.num_workers=-1", r"`CodeTasks\(num_workers=-1\)` must be at least 0"),
        ("--ckpt_path=empty.ckpt", r"The checkpoint empty.ckpt is empty"),
        ("--ckpt_path=cut.ckpt", r"The checkpoint cut.ckpt is cut off"),
    ],
)
def test_a_broken_input_is_explained(capsys, small_config, option, says):
    assert re.search(says, explained(capsys, "fit", "--config", str(small_config), option), re.DOTALL)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_misspelt_monitor_and_overfitting_made_examples_are_explained(capsys, small_config):
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/los"]
    assert "metric `val/los` which is not available" in explained(capsys, "fit", "--config=b.yaml", *stopping)
    made = ["--data=GeneratedTasks", "--trainer.overfit_batches=1"]
    assert "its examples are made when they are drawn" in explained(capsys, "fit", "--config=b.yaml", *made)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--trainer.accelerator=gpuu", r"accelerator=gpuu` is unknown to Lightning. Close: \['gpu'"),
        ("--trainer.strategy=dpp", r"strategy=dpp` is unknown to Lightning. Close: \['ddp'"),
        ("--trainer.profiler=simpel", r"profiler=simpel` is unknown to Lightning. Close: \['simple'"),
        ("--trainer.devices=0", r"devices=0` must be at least 1"),
        ("--config=trainer:\n  devices: '-2'", r"devices=-2` must be at least 1"),
        ("--trainer.devices=1 2", r"devices=1 2` must be a number"),
        ("--config=trainer:\n  devices: '1, 1'\n  accelerator: gpu", r"devices=\[1, 1\]` must be different"),
        ("--config=trainer:\n  devices: '0, 2'", r"devices=\[0, 2\]`: CPUs are counted, not numbered"),
        ("--config=trainer:\n  devices: '-1'", r"devices=-1` must be at least 1"),
        ("--trainer.devices=two", r"devices=two` must be a number, \"0, 2\", or \"auto\""),
        ("--trainer.accumulate_grad_batches=0", r"accumulate_grad_batches=0` must be at least 1"),
    ],
)
def test_check_knows_what_no_trainer_takes(capsys, small_config, option, says):
    assert re.search(says, explained(capsys, "check", str(small_config), option))


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.profiler=Simple",
        "--trainer.strategy=DDP",
        "--config=trainer:\n  devices: '-1'\n  accelerator: gpu",
        "--config=trainer:\n  devices: '+1'",
        "--config=trainer:\n  devices: '0, 2'\n  accelerator: gpu",
        "--config=trainer:\n  devices: '2'",
        "--trainer.devices=auto",
    ],
)
def test_check_takes_what_lightning_takes(small_config, option):
    assert main(["check", str(small_config), option]) == 0


def test_a_saved_config_names_classes_as_users_import_them(capsys):
    for name in ("full_suite_tiny.yaml", "grokking_fast.yaml"):
        with pytest.raises(SystemExit, match="^0$"):
            main(["fit", "--config", name, "--print_config"])
    named = set(re.findall(r"class_path: (forge_lightning\S+)", capsys.readouterr().out))
    assert {path.rpartition(".")[0] for path in named} == {
        f"forge_lightning.{catalogue}" for catalogue in ("callbacks", "components", "data", "models", "optim")
    }
    assert all(hasattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in named)


def test_a_key_that_stands_twice_is_refused(capsys, small_config, monkeypatch):
    small_config.write_text(SMALL + "trainer: {max_steps: 3}\n")
    for command in (("check", "b.yaml"), ("fit", "--config", "b.yaml")):
        assert "b.yaml, line 5: `trainer` was set in line 4 already" in explained(capsys, *command)
    inline = explained(capsys, "fit", "--config", small_config.read_text())
    assert "--config, line 5: `trainer` was set in line 4 already" in inline
    monkeypatch.setenv("FORGE_FIT__CONFIG", "b.yaml")
    assert "b.yaml, line 5: `trainer` was set in line 4 already" in explained(capsys, "fit")


def test_keys_that_only_look_alike_are_taken(tmp_path):
    texts = {
        "merged twice": "a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: *a\n  <<: *b\n",
        "a number and its name": "x:\n  1: a\n  '1': b\n",
        "keys of several parts": "? [a, b]\n: 1\n? [a, c]\n: 2\n",
        "deep": "[" * 3000,
    }
    for text in texts.values():
        (tmp_path / "some.yaml").write_text(text)
        refuse_doubled_keys(["fit", "--config", str(tmp_path / "some.yaml")])


def test_a_config_that_is_nested_too_deep_is_explained(capsys, small_config):
    small_config.write_text("[" * 3000)
    assert "b.yaml" in explained(capsys, "check", "b.yaml")
    small_config.write_text(SMALL + "x: &x [*x]\n")
    assert "holds itself" in explained(capsys, "fit", "--config", "b.yaml")


def test_without_a_logger_a_config_in_the_working_directory_stays(tmp_path, small_config):
    text = SMALL.replace("max_steps: 2", "fast_dev_run: false, max_steps: 1, limit_val_batches: 0")
    (tmp_path / "config.yaml").write_text(text)
    assert main(["fit", "--config", "config.yaml"]) == 0
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_module_of_pytorch_lightning_is_named(capsys, tmp_path, small_config, monkeypatch):
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    (tmp_path / "theirs.py").write_text("import pytorch_lightning as pl\nclass Net(pl.LightningModule): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = explained(capsys, "fit", "--config=b.yaml", "--model=theirs.Net")
    assert "Net is a class of the package `pytorch_lightning`" in said
