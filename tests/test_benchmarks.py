"""Pages say what their rows say, and every benchmark still runs on the code as it is."""

import importlib
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import (
    claims,
    compression,
    edge,
    edge_code,
    environment,
    filter_cost,
    filter_matrix,
    first_picture,
    grokking,
    overhead,
    parameters,
    recipe,
    replay,
    scale,
    self_knowledge,
    soak,
    stages,
)

FOLDER = Path(environment.FOLDER)


def body(text):
    """A page without where and when it was made."""
    return re.sub(r"^(Date|Versions): .*$", "", text, flags=re.MULTILINE)


OF_ROWS = [claims, compression, edge, edge_code, filter_matrix, overhead, parameters, replay, scale, self_knowledge]


@pytest.mark.parametrize("module", OF_ROWS, ids=lambda module: module.__name__)
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


def test_page_of_stages():
    assert body(stages.report()) == body((FOLDER / "stages.md").read_text())


def test_every_benchmark_has_a_page_or_says_why_not():
    without = {"claims": "CLAIMS.md", "first_picture": "a picture", "environment": "no figures", "__init__": ""}
    without["gpu"] = "needs a GPU"
    for path in FOLDER.glob("*.py"):
        importlib.import_module(f"benchmarks.{path.stem}")
        assert path.stem in without or path.with_suffix(".md").exists(), path


def test_claims_run_every_part_behind_them():
    parts = set(claims.PARTS)
    assert {("grokking",), ("grokking", "--cost"), ("grokking", "--shipped"), ("first_picture",)} <= parts
    steps = {
        **dict.fromkeys(("filter_matrix", "edge_code", "parameters"), ("tune", "run", "report")),
        "edge": ("train", "report"),
        "self_knowledge": ("tune", "text", "tuned", "report"),
        "replay": ("digits", "tune", "study", "report"),
    }
    for name, each in steps.items():
        assert {(name, step) for step in each} <= parts
        assert [part[1] for part in claims.PARTS if part[0] == name][-1] == "report"
    assert set(claims.ROWS) == {"grokking", "grokking_fast", *steps}


def median_of(name):
    return statistics.median_low(claims.iterations(name))


def test_the_search_goes_on_where_it_was(tmp_path, monkeypatch):
    rows = recipe.rows_of("muon")[:12]
    monkeypatch.setattr(recipe, "PATH", tmp_path / "recipe.jsonl")
    (tmp_path / "recipe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(recipe.Muon, "limit", 10)
    recipe.search("muon", generations=1, draws=2, best=1)
    found = recipe.rows_of("muon")
    assert found[:12] == rows
    assert 2 <= len(found) - 12 <= 6
    assert all(row["iterations"] == 10 for row in found[12:])
    assert recipe.rows_of("adamw") == []


def test_what_is_shipped_is_what_was_measured():
    config = yaml.safe_load((FOLDER.parent / "configs" / "grokking_fast.yaml").read_text())
    model = config["model"]["init_args"]
    (averaging,) = (c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == "EMAWeightAveraging")
    assert model["optimizer"]["init_args"] == grokking.RECIPE["options"]
    assert {key: model[key] for key in grokking.RECIPE["initial"]} == grokking.RECIPE["initial"]
    assert model["lr_scheduler"]["init_args"]["total_iters"] == grokking.RECIPE["warmup"]
    assert averaging == {"decay": grokking.RECIPE["averaging"]}
    measured = [row for row in recipe.rows_of("muon") if recipe.Muon(**row["settings"]) == recipe.SHIPPED]
    assert len(measured) >= 12
    assert min(row["seed"] for row in recipe.rows_of("muon")) >= 100


def test_first_picture():
    (axis,) = first_picture.draw().axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert sorted(len(line.get_xdata()) for line in dots) == [0, 5, 5, 5]
    written = [text.get_text() for text in axis.texts]
    assert written[:3] == [f"{median_of(name):,}" for name in ("recipe", "adamw_tuned", "ema")]


def test_readme_says_what_the_rows_say():
    readme = " ".join((FOLDER.parent / "README.md").read_text().split())
    recipe, tuned, ema = (median_of(name) for name in ("recipe", "adamw_tuned", "ema"))
    assert f"after {recipe} iterations on the task of the" in readme
    assert f"The paper's baseline takes {grokking.PAPER:,}, AdamW with two tuned settings {tuned}." in readme
    assert f"| {tuned} → {recipe} iterations |" in readme
    assert f"{recipe} for the shipped recipe, {tuned} for tuned AdamW, {ema:,} for Grokfast" in readme
    assert f"in {recipe} iterations; tuned AdamW {tuned}, Grokfast as published {ema:,}" in readme
    page = (FOLDER.parent / "docs" / "grokfast.md").read_text()
    for name in claims.NAMES:
        values = claims.iterations(name)
        if statistics.median_low(values) < math.inf:
            each = ", ".join("–" if math.isinf(value) else f"{value:.0f}" for value in values)
            assert f"({each})" in page or name in ("adamw_tuned_averaged",), name


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
@pytest.mark.parametrize("method", edge_code.METHODS)
def test_edge_on_programs_trains(method, monkeypatch):
    monkeypatch.setattr(edge_code, "STEPS", 4)
    monkeypatch.setattr(edge_code, "EVERY", 2)
    monkeypatch.setattr(edge_code, "EACH", 2)
    passed = edge_code.train(method, 1e-3, 10, 0)["passed"]
    assert [len(levels) for levels in passed] == [edge_code.LEVELS] * 2


@small
def test_overhead_runs():
    shape = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 16}
    size = overhead.Size("", shape, batch=4, tokens=8, steps=4, turns=1)
    between = overhead.between(size)
    step, inside = overhead.inside(size)
    assert {*between, *inside} >= {"EdgeController", "Grokfast", "Telemetry", "DreamReplay", "SelfModel"}
    assert all(value > 0 for value in between.values())
    assert step > 0


@small
def test_scale_counts_bytes():
    kept = torch.zeros(1000, dtype=torch.float64)
    shown = kept[:10]  # of the same memory
    found = scale.live_storages()
    assert found[kept.data_ptr()] == kept.nbytes
    assert list(found).count(shown.data_ptr()) == 1
    before = scale.live_bytes()
    assert before >= kept.nbytes
    larger = [torch.zeros(1 << 20) for _ in range(4)]  # garbage of tests before may go at the same time
    assert abs(scale.live_bytes() - before - sum(each.nbytes for each in larger)) < 1 << 20


@small
@pytest.mark.parametrize("name", edge.CONTROLLERS)
def test_edge_simulates(name, monkeypatch):
    monkeypatch.setattr(edge, "STEPS", 460)
    share, _, _ = edge.hold(edge.CONTROLLERS[name], "plain", 0, 8)
    assert 0 <= share <= 1


@small
def test_replay_runs(monkeypatch):
    monkeypatch.setattr(replay, "STEPS", 12)
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
