"""Pictures of what a model knows of itself, from what runs leave on disk."""

import json

import pytest
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.callbacks import Calibration, SelfModel, Telemetry, TemperatureCurriculum
from forge_lightning.reports import self_knowledge
from forge_lightning.reports.analysis import analyze
from forge_lightning.reports.trace import read_run
from tests.contract.modules import LossOnly
from tests.contract.rows import fit
from tests.reports.test_analysis import drawn, written


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    callbacks = [
        SelfModel(layers=["net.0", "net.2"], warmup_steps=4, watch_every_n_steps=4),
        TemperatureCurriculum(bins=[(2, 4), (0.5, 2)]),
        Calibration(),
        Telemetry(),
    ]
    options = {"max_epochs": 4, "log_every_n_steps": 1, "limit_val_batches": None}
    fit(callbacks, logger=CSVLogger(folder, name="", version=""), **options)
    return folder


def lines(axis):
    return {line.get_label(): line for line in axis.get_lines()}


def test_predicted_activations(run):
    figure = self_knowledge.self_model(read_run(run))
    assert {"explained variance", "directions", "Effective rank of what is predicted"} <= drawn(figure)
    above = lines(figure.axes[0])
    assert set(above) == {"net.0", "net.2", "net.0, copied", "net.2, copied"}
    series = read_run(run).series["forge/self_model/net.0/explained_variance"]
    assert above["net.0"].get_ydata().tolist() == series[1]
    assert set(lines(figure.axes[2])) == {"error", "weight in the loss"}
    cut = read_run(run)
    cut.series["forge/self_model/net.0/explained_variance"][1][0] = -83.0
    title = self_knowledge.self_model(cut).axes[0].get_title()
    assert title == "Predicted, beyond the best constant (cut: goes down to -83)"


def test_temperatures(run):
    figure = self_knowledge.temperature(read_run(run))
    assert {"τ", "nats", "ECE", "Temperature of the step"} <= drawn(figure)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0.5", "2", "4"]
    assert set(lines(figure.axes[2])) == {"τ 2 to 4", "τ 0.5 to 2"}
    assert len(lines(figure.axes[2])["τ 2 to 4"].get_xdata()) == 4


def test_reliability(run):
    figure = self_knowledge.reliability(read_run(run))
    assert {"confidence", "share right", "Reliability, validation data", "ECE"} <= drawn(figure)
    kept = json.loads((run / "calibration.json").read_text())["val"]["bins"]["as it is"]
    (line,) = (line for label, line in lines(figure.axes[0]).items() if label.startswith("as it is"))
    total, confidence, correct = kept["total"], kept["confidence"], kept["correct"]
    assert line.get_xdata() == pytest.approx([c / n for c, n in zip(confidence, total, strict=True) if n])
    assert line.get_ydata() == pytest.approx([k / n for k, n in zip(correct, total, strict=True) if n])
    assert sum(kept["total"]) == 64


def test_the_page_shows_them(run, tmp_path):
    analyze([run], tmp_path)
    numbers, text = written(tmp_path)
    for name in ("self_model", "temperature", "calibration"):
        assert (tmp_path / f"{name}_dark.png").read_bytes().startswith(b"\x89PNG")
    assert "On the dotted line confidence is accuracy" in text
    assert not (tmp_path / "others_light.png").exists()  # each has a picture of its own
    assert numbers["runs"][0]["calibration"]["val"]["metrics"]["ece"] >= 0


def test_callbacks_behind_telemetry_are_drawn_too(tmp_path):
    """An add-on file appends: what comes after `Telemetry` is in the logger's file alone."""
    callbacks = [Telemetry(), SelfModel(layers=["net.0"], warmup_steps=0)]
    fit(callbacks, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert "self_model" not in (tmp_path / "trace.jsonl").read_text()
    found = read_run(tmp_path)
    assert found.series["forge/self_model/loss"][0] == list(range(1, 9))
    assert self_knowledge.self_model(found) is not None


def test_sampling_temperatures(tmp_path):
    study = [
        {"temperature": t, "k": k, "pass_at_k": 0.1 * k, "standard_error": 0.05, "num_problems": 12}
        for t in (1.0, 0.2)
        for k in (1, 4)
    ]
    (tmp_path / "temperature_study.json").write_text(json.dumps(study))
    figure = self_knowledge.sampling(read_run(tmp_path))  # testing alone leaves no trace
    assert {"sampling temperature", "share of problems", "Programs that pass, 12 problems"} <= drawn(figure)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["pass@1", "pass@4"]


def test_what_was_not_recorded_is_not_drawn(tmp_path):
    fit([Telemetry()], LossOnly, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    (tmp_path / "calibration.json").write_text("{cut off")
    found = read_run(tmp_path)
    pictures = (
        self_knowledge.self_model,
        self_knowledge.temperature,
        self_knowledge.reliability,
        self_knowledge.sampling,
    )
    assert [draw(found) for draw in pictures] == [None] * 4
    assert "calibration.json cannot be read." in found.remarks
