"""`forge-fit init`, and what is answered without Lightning."""

import json
import subprocess
import sys

import pytest
import yaml

from forge_lightning.cli.commands import COMMANDS
from forge_lightning.cli.init import GOALS
from forge_lightning.cli.main import TRAINER_COMMANDS, main
from forge_lightning.data.tokens import build_tokenizer
from forge_lightning.models import ForgeModule

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_size": 16, "intermediate_size": 32, "vocab_size": 384, "max_position_embeddings": 64,
}  # fmt: skip
MINE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    val_dataloader = train_dataloader
"""
RECORDS = {
    "text": {"text": "some words and more of them " * 8},
    "pairs": {"prompt": "1 + 1 =", "completion": " 2"},
    "chats": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "mbpp": {
        "task_id": 1, "text": "Add.", "code": "def f(a):\n    return a", "test_list": ["assert f(1) == 1"],
        "test_setup_code": "", "challenge_test_list": [],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])


@pytest.fixture
def base(tmp_path):
    tokenizer = build_tokenizer("bytes")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    module = ForgeModule(config=LLAMA)
    module.build(tokenizer)
    module.export(tmp_path / "base")
    return "base"


def written(tmp_path, kind, name="data.jsonl"):
    ids = range(601, 641)  # of MBPP's training problems
    lines = [RECORDS[kind] | ({"task_id": i} if kind == "mbpp" else {}) for i in ids]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


@pytest.mark.parametrize(
    ("goal", "kind", "more", "data", "length"),
    [
        ("finetune", "text", [], "TextData", ("block_size", 64)),
        ("finetune", "pairs", ["--lora"], "InstructionData", ("max_length", 64)),
        ("pretrain", "text", [], "TextData", ("block_size", 512)),
    ],
)
def test_what_init_writes_trains_as_it_is(tmp_path, base, capsys, goal, kind, more, data, length):
    file = written(tmp_path, kind)
    model = ["--model", base] if goal == "finetune" else []
    assert main(["init", goal, *model, "--data", file, *more, "--output", "mine.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "forge-fit check mine.yaml" in shown
    assert "@" not in (tmp_path / "mine.yaml").read_text()
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert config["data"]["class_path"] == data
    assert config["data"]["init_args"][length[0]] == length[1]
    assert ("peft" in config["model"]["init_args"]) == bool(more)
    assert main(["check", "mine.yaml"]) == 0
    quick = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    if goal == "pretrain":
        small = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
                 "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
        quick += [f"--model.config={json.dumps(small)}", "--data.block_size=64", "--trainer.val_check_interval=2"]
    assert main(["fit", "--config", "mine.yaml", *quick]) == 0
    (run,) = (tmp_path / "runs" / "mine").iterdir()
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("form", ["jsonl", "json", "folder"])
@pytest.mark.parametrize(
    ("kind", "data"), [("chats", "InstructionData"), ("pairs", "InstructionData"), ("mbpp", "CodeTasks")]
)
def test_the_kind_of_data_is_seen_by_its_columns(tmp_path, base, kind, data, form):
    if form != "jsonl" and kind == "mbpp":
        pytest.skip("CodeTasks reads one file")
    file = written(tmp_path, kind)
    if form == "json":
        (tmp_path / "data.json").write_text(json.dumps([RECORDS[kind]] * 20, indent=1))
        file = "data.json"
    elif form == "folder":
        (tmp_path / "some").mkdir()
        file = str((tmp_path / file).rename(tmp_path / "some" / file).parent)
    assert main(["init", "finetune", "--model", base, "--data", file]) == 0
    assert yaml.safe_load((tmp_path / "finetune.yaml").read_text())["data"]["class_path"] == data
    assert main(["check", "finetune.yaml"]) == 0


def test_your_own_module_is_observed(tmp_path):
    (tmp_path / "project.py").write_text(MINE)
    assert main(["init", "observe", "--model", "project.Module", "--data", "project.Data", "--output", "o.yaml"]) == 0
    assert main(["check", "o.yaml"]) == 0
    assert main(["fit", "--config=o.yaml", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]) == 0
    (run,) = (tmp_path / "runs" / "o").iterdir()
    assert {"trace.jsonl", "summary.json", "config.yaml"} <= {file.name for file in run.iterdir()}


def test_grok_is_the_shipped_recipe_with_words(tmp_path):
    assert main(["init", "grok"]) == 0
    assert main(["check", "grok.yaml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grok", "--data", "x"], "takes no --data"),
        (["pretrain", "--model", "x"], "takes no --model"),
        (["observe", "--lora"], "adapters need pretrained weights"),
        (["finetune", "--data", "odd.jsonl"], "has columns ['body'], and none is `text`"),
        (["finetune", "--data", "broken.jsonl"], "the first record of broken.jsonl is not JSON"),
        (["finetune", "--data", "empty.jsonl"], "empty.jsonl holds no record"),
        (["grok", "--output", "odd.jsonl"], "exists already"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path, capsys, arguments, message):
    (tmp_path / "odd.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["init", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml"))


ANSWERED = [
    "--help", "--version", "list", "list --callbacks Grokfast", "fitt", "check --help", "init --help",
    "generate --help", "export --help", "analyze --help", "compare a b", "resume absent", "completion zsh",
]  # fmt: skip


def test_what_needs_no_lightning_imports_none():
    code = f"""
import contextlib, io, sys
from forge_lightning.cli.main import main
for words in {ANSWERED!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(words.split())
        except SystemExit:
            pass
    heavy = {{"torch", "lightning", "transformers", "numpy", "matplotlib"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0] for line in lines if line.startswith("  ")}
    assert named == {*COMMANDS, *TRAINER_COMMANDS, "resume"}
    assert max(map(len, lines)) <= 80
    assert main(["fitt"]) == 2
    assert "no such command. Close: fit." in capsys.readouterr().err
    assert set(GOALS) == {"finetune", "pretrain", "observe", "grok"}


def test_completion_completes():
    script = """
eval "$(python_forge completion bash)"
COMP_WORDS=(forge-fit ge) COMP_CWORD=1; _forge_fit; echo "${COMPREPLY[@]}"
COMP_WORDS=(forge-fit fit --config grokking) COMP_CWORD=3; _forge_fit; echo "${COMPREPLY[@]}"
COMP_WORDS=(forge-fit init o) COMP_CWORD=2; _forge_fit; echo "${COMPREPLY[@]}"
"""
    script = f'python_forge() {{ "{sys.executable}" -m forge_lightning "$@"; }}\n' + script
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["generate", "grokking_fast grokking_observed", "observe"], done.stderr


@pytest.mark.parametrize("name", ["2024", "null", "a: b", "yes"])
def test_names_stay_names(tmp_path, base, name):
    file = written(tmp_path, "text", f"{name}.jsonl")
    assert main(["init", "finetune", "--model", base, "--data", file, "--output", f"{name}.yaml"]) == 0
    config = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    assert config["trainer"]["logger"][0]["init_args"]["name"] == name
    assert config["data"]["init_args"]["path"] == file
    assert main(["check", f"{name}.yaml"]) == 0


def test_check_refuses_rows_longer_than_the_model(tmp_path, base, capsys):
    file = written(tmp_path, "text")
    assert main(["init", "finetune", "--model", base, "--data", file]) == 0
    assert main(["check", "finetune.yaml", "--data.block_size=65"]) == 2
    assert "have 65 tokens, but the model has only 64 positions" in capsys.readouterr().err


def test_a_table_of_an_editor_and_a_config_that_is_none(tmp_path):
    (tmp_path / "t.csv").write_text("text,b\n" + "words and words,1\n" * 30, encoding="utf-8-sig")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    assert main(["init", "finetune", "--model", "odd", "--data", "t.csv"]) == 0
    assert yaml.safe_load((tmp_path / "finetune.yaml").read_text())["data"]["class_path"] == "TextData"


def test_data_that_is_not_there_yet_is_noted(tmp_path, base, capsys):
    assert main(["init", "finetune", "--model", base, "--data", "later.jsonl"]) == 0
    assert "later.jsonl does not exist yet" in capsys.readouterr().err
    assert main(["init", "finetune", "--model", base, "--output", "b.yaml"]) == 0
    assert "path: data.txt  # change: a file, a folder" in (tmp_path / "b.yaml").read_text()


def test_resume_has_a_help(capsys):
    assert main(["resume", "--help"]) == 0
    assert "Go on with a run" in capsys.readouterr().out


def test_close_names_of_options_and_configs(tmp_path, base, capsys):
    assert (
        main(["init", "finetune", "--model", base, "--data", written(tmp_path, "text"), "--output", "mine.yaml"]) == 0
    )
    for words, close in (
        (["check", "mien.yaml"], "mine.yaml"),
        (["fit", "--confg", "mine.yaml"], "config"),
        (["check", "mine.yaml", "--model.optimiser.lr=1"], "optimizer"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert f"'{close}'" in capsys.readouterr().err, words


def test_chats_are_continued_as_chats(tmp_path, base, capsys):
    file = written(tmp_path, "chats")
    assert main(["init", "finetune", "--model", base, "--data", file]) == 0
    quick = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "finetune.yaml", *quick, "--trainer.val_check_interval=1"]) == 0
    run = "runs/finetune/version_0"
    capsys.readouterr()
    assert main(["generate", "--run", run, "--prompt", "hi", "--max_new_tokens=1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("<user>hi")
    assert "trained on chats" in shown.err
    assert main(["generate", "--run", run, "--prompt", "hi", "--max_new_tokens=1", "--raw"]) == 0
    assert capsys.readouterr().out.startswith("hi")
    assert main(["export", "--run", run, "--output", "out"]) == 0
    assert "apply_chat_template(turns" in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", "--run", run, "--output", "out2", "--adapter"]) == 2
    assert "trained no adapter" in capsys.readouterr().err
