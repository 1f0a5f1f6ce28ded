"""Every fenced block of the README and of `docs` runs, and so do the notebooks."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

from forge_lightning import callbacks, cards
from tests import processes

ROOT = Path(__file__).parents[1]


def blocks(path):
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks(ROOT / "README.md")
PAGES = {path.stem: blocks(path) for path in sorted(ROOT.glob("docs/*.md"))}
CONTINUED = "write_a_callback"
"""Page whose Python blocks continue one another."""
PAGES[CONTINUED] = [("python", "\n".join(block for _, block in PAGES[CONTINUED] if "from tests" not in block))]
WALKS = ("geometry", "edge", "self_model")
"""Pages whose commands are to be typed one after another, like the README's."""
IN_PAGES = [
    (name, language, block)
    for name, found in PAGES.items()
    for language, block in found
    if (name, language) not in {(walk, "bash") for walk in WALKS}
]
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
SHORT += ["--trainer.log_every_n_steps=1"]


NODES = "trainer: {accelerator: gpu, num_nodes: 2, devices: 8, strategy: ddp}\n"
"""The add-on of `several_gpus.md`."""

IN_TURN = """
import json, sys
from forge_lightning.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert not code, f"{words} ends with {code}"
"""
"""Runs commands of ``forge-fit`` one after another in one process: its start takes longer than most of them."""


BLOCKS_IN_TURN = """
import json, sys
for page, block in json.loads(sys.argv[1]):
    try:
        exec(compile(block, page, "exec"), {"__name__": "__main__"})
    except BaseException as error:
        raise AssertionError(f"a block of {page} fails") from error
"""
"""Runs blocks of Python one after another, each in a namespace of its own."""


def of(kind):
    return [block for language, block in BLOCKS if language == kind]


def run(command, **kwargs):
    result = processes.run(command, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def test_every_block_is_of_a_kind_that_is_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Where the commands run one after another, as a reader would type them: later ones read what earlier ones left."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mine.yaml").write_text(of("yaml")[0])
    return folder


def test_commands(shell):
    data = shell / "mbpp.jsonl"
    lines = []
    for task_id in [*range(511, 517), *range(601, 613)]:
        record = {"task_id": task_id, "text": "Write a function.", "code": f"def f(x):\r\n  return x + {task_id}"}
        lines.append(json.dumps(record | {"test_list": [f"assert f(0) == {task_id}"], "test_setup_code": ""}))
    data.write_text("\n".join(lines))
    environment = os.environ | {"FORGE_MBPP": str(data), "HF_HUB_OFFLINE": "1"}
    seen, commands = set(), []
    walks = [block for page in WALKS for language, block in PAGES[page] if language == "bash"]
    for line in "\n".join(of("bash") + walks).splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        seen.add(words[0])
        if words[0] == "make":
            run(["make", "--dry-run", *words[1:]], cwd=ROOT)
        elif words[0] == "pip":
            for word in words:
                assert not word.endswith(".txt") or (ROOT / word).exists()
                for extra in re.findall(r"\[(.*)\]", word):
                    assert f"{extra} = [" in (ROOT / "pyproject.toml").read_text()
        elif words[0] == "export":
            assert words[1].startswith("FORGE_")
        else:
            assert words[0] == "forge-fit", line
            short = SHORT if words[1] == "fit" else []
            commands.append([*words[1:], *short])
    run([sys.executable, "-W", "ignore", "-c", IN_TURN, json.dumps(commands)], cwd=shell, env=environment)
    assert seen == {"make", "pip", "export", "forge-fit"}


@pytest.mark.parametrize("part", [0, 1])
def test_python_blocks_run(part, tmp_path):
    """In two processes, of which each imports the package once."""
    readme = [("README", language, block) for language, block in BLOCKS]
    python = [(page, block) for page, language, block in [*readme, *IN_PAGES] if language == "python"]
    run([sys.executable, "-W", "ignore", "-c", BLOCKS_IN_TURN, json.dumps(python[part::2])], cwd=tmp_path)


def test_yaml_and_commands_are_valid(tmp_path):
    commands = []
    for number, block in enumerate(of("yaml")):
        path = tmp_path / f"config_{number}.yaml"
        path.write_text(block)
        assert yaml.safe_load(block)
        commands.append(["check", str(path)])
    for number, (page, language, block) in enumerate(IN_PAGES):
        if language == "yaml":  # an add-on
            path = tmp_path / f"{page}_{number}.yaml"
            path.write_text(block)
            commands.append(["check", "grokking_observed.yaml", "--config", str(path)])
        elif language == "bash":
            words = shlex.split(block, comments=True)
            at = words.index("fit")
            assert words[at - 1] in ("forge-fit", "forge_lightning.cli")
            (tmp_path / "nodes.yaml").write_text(NODES)
            commands.append(["check", *words[at + 2 :]])
    assert len(commands) > 5
    run([sys.executable, "-W", "ignore", "-c", IN_TURN, json.dumps(commands)], cwd=tmp_path)


def test_the_callbacks_table_is_that_of_the_docstrings():
    """To mend it: ``python -m forge_lightning.cards README.md``."""
    (written,) = re.findall(
        r"<!-- callbacks -->\n(.*?)<!-- /callbacks -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert written == cards.table()


def test_every_callback_has_a_card():
    public = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Callback)}
    assert public == set(cards.ORDER)
    page = (ROOT / "docs" / "callbacks.md").read_text()
    assert re.findall(r"autoclass:: (\w+)", page) == list(cards.ORDER)
    for name in cards.ORDER:
        found = cards.card(name)
        assert tuple(found.fields) == cards.FIELDS, name
        assert all(found.fields.values()), name
    with pytest.raises(KeyError, match="no callback 'Grokslow'"):
        cards.card("Grokslow")


@pytest.mark.parametrize(
    ("name", "long", "short", "leaves"),
    [
        ("grokfast", "steps = 1000", "steps = 40", "learning_curves.png"),
        ("01_grokking", "steps = 2400", "steps = 48", "grokking.png"),
        ("02_edge", "steps = 1500", "steps = 40", "edge.png"),
        ("03_self_model_and_temperature", "steps = 400", "steps = 40", "self_model.png"),
        ("04_dream", "steps = 800", "steps = 40", "dream.png"),
        ("05_fine_tuning", "steps = 400", "steps = 20", "fine_tuning.png"),
        ("06_your_module", "steps = 300", "steps = 40", "your_module.png"),
    ],
)
def test_notebook(tmp_path, name, long, short, leaves):
    cells = json.loads((ROOT / f"notebooks/{name}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any(long in source for source in code)
    code = [source.replace(long, short) for source in code if "IPython" not in source]
    run([sys.executable, "-W", "ignore", "-c", "\n".join(code)], cwd=tmp_path)
    assert (tmp_path / leaves).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_with_what_they_show(path):
    """To mend it: ``make notebooks``."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells), "a cell was changed and not run"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text" in output or "text/plain" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len(path.read_text()) < 1_500_000


def test_the_file_map_names_what_exists():
    page = (ROOT / "docs" / "architecture.md").read_text()
    (files,) = re.findall(r"<!-- files -->\n(.*?)<!-- /files -->", page, re.DOTALL)
    named = set(re.findall(r"^\|[^|]*\| `([^`]+)`", files, re.MULTILINE))
    assert named
    assert not {name for name in named if not (ROOT / name).exists()}
    code = {str(p.relative_to(ROOT)) for p in ROOT.glob("forge_lightning/**/*.py") if p.name != "__init__.py"}
    assert not code - named
