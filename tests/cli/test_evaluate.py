"""`forge-fit evaluate`, `generate` and `export` on a small run."""

import json
import sys

import pytest
import yaml

from forge_lightning.cli.evaluate import rows
from forge_lightning.cli.main import main
from forge_lightning.models.model_card import model_card, run_files

pytestmark = pytest.mark.filterwarnings("ignore")
TASK = """
task: which_letter
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
CONFIG = """
seed_everything: 0
model:
  class_path: ForgeModule
  init_args:
    config: {model_type: llama, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, hidden_size: 32,
      intermediate_size: 64, max_position_embeddings: 128}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data: {class_path: TextData, init_args: {path: text.txt, block_size: 32, batch_size: 8}}
trainer:
  max_steps: 60
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ., name: run, version: ''}}
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {filename: last}}
    - {class_path: RunSummary, init_args: {monitor: val/loss, mode: min}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that has learned to go on with "b" behind "a"."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_text("ab" * 1500)
    (folder / "mine.yaml").write_text(CONFIG)
    (folder / "task.yaml").write_text(TASK)
    questions = [{"question": "ab" * 4 + "a", "choices": ["b", "x"]}, {"question": "ba" * 4, "choices": ["a", "b"]}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["forge-fit"])
        assert main(["fit", "--config", "mine.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def there(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["forge-fit"])


def test_a_task_of_ones_own_on_a_run(run, capsys):
    pytest.importorskip("lm_eval")
    assert main(["evaluate", "--run", "run", "--tasks", "task.yaml", "--device", "cpu"]) == 0
    found = json.loads((run / "run/evaluation.json").read_text())["which_letter"]
    assert found["acc"] == 0.5  # the first right, the second asks for what never comes
    out = capsys.readouterr().out
    assert "which_letter" in out
    assert "0.5" in out
    assert main(["evaluate", "--run", "run", "--tasks", "no_such_task"]) == 2
    assert "lm-eval has no task 'no_such_task'" in capsys.readouterr().err
    assert main(["evaluate", "--run", "run", "--tasks", "mine.yaml"]) == 2
    assert "describes no task of lm-eval" in capsys.readouterr().err


def test_an_exported_model_is_evaluated_as_its_run(run):
    pytest.importorskip("lm_eval")
    assert main(["export", "--run", "run", "--output", "exported"]) == 0
    words = ["evaluate", "--model", "exported", "--tasks", "task.yaml", "--device", "cpu", "--output", "there/e.json"]
    assert main(words) == 0
    assert json.loads((run / "there/e.json").read_text())["which_letter"]["acc"] == 0.5


def test_results_as_rows():
    results = {
        "a": {"acc": 0.25, "acc_stderr": 0.125, "exact_match,flexible": 1.0, "exact_match_stderr,flexible": "N/A"}
    }
    assert rows(results) == [("a", "acc", "0.25", "0.12"), ("a", "exact_match,flexible", "1", "–")]


def test_several_prompts_and_a_file_of_them(run, capsys):
    (run / "prompts.txt").write_text("abab\n\nb\\na\n")
    options = ["--max_new_tokens=4", "--run", "run"]
    assert main(["generate", "--prompt", "ab", "--prompts", "prompts.txt", *options]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["ababab", "", "abababab"]
    assert main(["generate", "--prompts", "prompts.txt", "--jsonl", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["abab", "b\na"]
    assert lines[0]["completion"] == "abab"
    (run / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    assert main(["generate", "--prompts", "prompts.jsonl", "--temperature=1", "--top_p=0.1", *options]) == 0
    assert capsys.readouterr().out == "ababab\n"  # the likeliest alone
    assert main(["generate", "--prompt", "a", "--top_p=2", *options]) == 2
    assert "`top_p=2.0` must be in (0, 1]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", *options])
    assert "give a --prompt" in capsys.readouterr().err


def test_on_a_terminal_text_comes_as_it_is_made(run, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["generate", "--run", "run", "--prompt", "ab", "--prompt", "ab", "--max_new_tokens=6", "--temperature=1"]
    assert main(words) == 0
    live = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert main(words) == 0
    assert live.split() == capsys.readouterr().out.split()


def test_the_model_card(run):
    config, summary = run_files(run / "run")
    card = model_card("mine", 1234, config, summary)
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["forge-lightning"]}
    assert "1,234 weights, trained from random weights" in card
    assert f"| `val/loss` | {summary['metrics']['val/loss']:.4g} |" in card
    assert "path: text.txt" in card
    assert "null" not in card
    config["model"]["init_args"] |= {"pretrained": "org/base", "peft": {"r": 4}}
    card = model_card("mine", 1234, config, None, adapter=True)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    assert "library_name: peft" in card
    assert "Results" not in card
    assert run_files(run / "absent") == (None, None)
    assert "## Training" not in model_card("mine", 1, None, {"metrics": None})
