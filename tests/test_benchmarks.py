"""Pages say what their rows say, and every benchmark still runs on the code as it is."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import (
    claims,
    edge,
    environment,
    filter_cost,
    filter_matrix,
    first_picture,
    grokking,
    parameters,
    phases,
    replay,
    self_knowledge,
    soak,
)

FOLDER = Path(environment.FOLDER)


def body(text):
    """A page without where and when it was made."""
    return re.sub(r"^(Date|Versions): .*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("module", [claims, edge, filter_matrix, parameters, replay, self_knowledge], ids=str)
def test_page_is_that_of_its_rows(module, tmp_path, monkeypatch):
    page = module.OUT
    monkeypatch.setattr(module, "OUT", tmp_path / page.name)
    module.report()
    assert body((tmp_path / page.name).read_text()) == body(page.read_text())


def test_page_of_grokking():
    rows = [json.loads(line) for line in (FOLDER / "grokking.jsonl").read_text().splitlines()]
    results = {name: [row for row in rows if row["configuration"] == name] for name in grokking.CONFIGURATIONS}
    text = grokking.report(results, "python -m benchmarks.grokking")
    assert body((FOLDER / "grokking.md").read_text()).startswith(body(text))


def test_page_of_phases():
    assert body(phases.report()) == body((FOLDER / "phases.md").read_text())


def test_every_benchmark_has_a_page_or_says_why_not():
    without = {"claims": "CLAIMS.md", "first_picture": "a picture", "environment": "no figures", "__init__": ""}
    for path in FOLDER.glob("*.py"):
        importlib.import_module(f"benchmarks.{path.stem}")
        assert path.stem in without or path.with_suffix(".md").exists(), path


def test_claims_run_every_part_behind_them():
    named = {part[0] for part in claims.PARTS}
    assert {"grokking", "filter_matrix", "edge", "self_knowledge", "parameters", "replay", "first_picture"} <= named


def test_first_picture():
    (axis,) = first_picture.draw().axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert sorted(len(line.get_xdata()) for line in dots) == [0, 5, 5, 5]


# Every part, as small as it goes: that its calls fit the code.
small = pytest.mark.filterwarnings("ignore")


@small
def test_grokking_runs():
    found = grokking.run(0, grokking.CONFIGURATIONS["recipe_ema"], 20)
    assert found["iterations"] == 20
    assert found["first"] is None


@small
def test_filter_matrix_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(filter_matrix, "ROWS", tmp_path / "rows.jsonl")
    data, batch_size, *_ = filter_matrix.TASKS["sparse_parity"]
    monkeypatch.setitem(filter_matrix.TASKS, "sparse_parity", (data, batch_size, 8, 8))
    for optimizer in filter_matrix.GRIDS:
        filter_matrix.measure("sparse_parity", optimizer, 0, "EMA by cosine", 0)
        filter_matrix.measure("sparse_parity", optimizer, 0, "EMA by cosine", 0)  # there already
    assert [row["iterations"] for row in filter_matrix.rows()] == [8, 8]


@small
@pytest.mark.parametrize("method", edge.METHODS)
def test_edge_trains(method, monkeypatch):
    monkeypatch.setattr(edge, "TRAIN_STEPS", 12)
    monkeypatch.setattr(edge, "EVERY", 6)
    assert len(edge.train(method, 1e-3, 10, 0)["validations"]) == 2


@small
@pytest.mark.parametrize("name", edge.CONTROLLERS)
def test_edge_simulates(name, monkeypatch):
    monkeypatch.setattr(edge, "STEPS", 460)
    share, _, _ = edge.hold(edge.CONTROLLERS[name], "plain", 0, 8)
    assert 0 <= share <= 1


@small
def test_replay_runs(monkeypatch):
    monkeypatch.setattr(replay, "STEPS", 40)
    for method in ("no replay", "uniform, logits kept", "sleeps, priority"):
        assert len(replay.study("hard", method, 1e-3, 0)["success"]) == 12
    assert 0 <= replay.digits("first in, first out", 0)["accuracy"] < 0.5


@small
def test_text_trains(tmp_path, monkeypatch, mbpp_path):
    monkeypatch.setattr(self_knowledge, "STEPS", 4)
    monkeypatch.setattr(self_knowledge, "EVERY", 2)
    name = next(name for name, options in self_knowledge.VARIANTS.items() if len(options) == 2)
    rows = self_knowledge.train_text(name, self_knowledge.VARIANTS[name], self_knowledge.PLAIN, 0)
    assert [row["variant"] for row in rows] == [name, f"{name}, averaged weights"]
    monkeypatch.setattr(parameters, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(parameters, "STEPS", 2)
    parameters.measure(48, 1e-3, ("next_latent", 0.3), 0)
    assert parameters.rows()[0]["nll"] > 0


@small
def test_soak_runs():
    rows = soak.soak(20, 5)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert soak.grown([dict.fromkeys(soak.WHAT, 1.0) | {"step": n, "files": 1.0 + (n > 7)} for n in range(1, 11)]) == [
        soak.WHAT["files"]
    ]


@small
def test_costs_run(monkeypatch):
    assert filter_cost.measure([(4, 4)], 1, 1, [2])
    assert len(filter_cost.callback_cost(6)) == 4
