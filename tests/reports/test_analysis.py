import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from forge_lightning.callbacks import GeometryProbe, Grokfast, RunSummary, StageClassifier, Telemetry
from forge_lightning.reports import comparison, figures
from forge_lightning.reports.analysis import analyze, analyze_checkpoint, default_output, numbers_of, show
from forge_lightning.reports.learning_curves import logarithmic, plot_learning_curves, read_metrics
from forge_lightning.reports.trace import differences, group_names, join_resumed, read_run, stage_spans
from tests.contract.modules import Plain
from tests.contract.rows import fit

RECORDED = Path(__file__).parents[1] / "recorded_runs"


def recorded(folder, name):
    folder.mkdir(parents=True)
    with gzip.open(RECORDED / f"{name}.jsonl.gz") as file:
        (folder / "trace.jsonl").write_bytes(file.read())
    return folder


def written(output):
    return json.loads((output / "analysis.json").read_text()), (output / "report.html").read_text()


def test_a_run_that_groks(tmp_path):
    run = recorded(tmp_path / "grok" / "version_0", "grok_add_0")
    page = analyze([run], tmp_path / "out")
    numbers, text = written(tmp_path / "out")
    (found,) = numbers["runs"]
    assert [stage["stage"] for stage in found["stages"]] == [
        "unknown", "memorisation", "onset", "generalisation", "consolidation",
    ]  # fmt: skip
    assert found["stages_found_afterwards"]
    assert found["steps_to"]["0.5"] == 1248
    assert found["transitions"][0]["direction"] == "down"
    assert page.name == "report.html"
    assert "memorisation → onset" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)  # nothing from elsewhere
    for name in ("overview", "dimensions", "optimizer"):
        for mode in ("light", "dark"):
            assert (tmp_path / "out" / f"{name}_{mode}.png").read_bytes().startswith(b"\x89PNG")


def drawn(figure):
    """Labels of axes and lines."""
    axes = [axis for axis in figure.axes if axis.get_visible()]
    titles = {axis.get_title(side) for axis in axes for side in ("left", "center")}
    return titles | {axis.get_xlabel() for axis in axes} | {axis.get_ylabel() for axis in axes}


def test_axes_are_labelled_and_show_what_was_recorded(tmp_path):
    run = read_run(recorded(tmp_path / "run", "grok_add_0"))
    figure = figures.overview(run)
    assert {"optimizer step", "share right", "loss (nats)", "dimension (Levina–Bickel)"} <= drawn(figure)
    stages, _, success, dimension = figure.axes
    assert [t.get_text() for t in stages.texts][:3] == ["unknown", "memorisation", "onset"]
    validation = next(line for line in success.get_lines() if line.get_label() == "validation")
    assert list(validation.get_ydata()) == run.series["val/accuracy"][1]
    (line, *_) = dimension.get_lines()
    assert list(line.get_ydata()) == run.series["forge/geometry/model.layers.0/levina_bickel"][1]
    assert figures.step_time(run) is None  # recorded without times
    assert figures.others(run) is None


def test_light_and_dark_have_readable_colours():
    def luminance(color):
        import matplotlib as mpl

        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(color))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    import matplotlib as mpl

    for dark in (False, True):
        with figures.theme(dark):
            paper = luminance(mpl.rcParams["figure.facecolor"])
            lines = [luminance(figures.tone(color)) for color in figures.COLORS[:4]]
            text = luminance(mpl.rcParams["text.color"])
        contrast = [(max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) for ink in [text, *lines]]
        assert contrast[0] > 7
        assert min(contrast[1:]) > (2 if not dark else 3), contrast


@pytest.fixture
def fitted(tmp_path):
    """A fit with every callback, its run directory, and its checkpoint."""
    folder = tmp_path / "mine" / "version_0"
    probe = GeometryProbe(
        every_n_steps=6, num_points=8, estimators=("two_nn", "participation_ratio"), max_overhead=None
    )
    callbacks = [
        probe, Grokfast(alpha=0.9, schedule="constant"), StageClassifier(), RunSummary(monitor="val/loss"), Telemetry(),
        ModelCheckpoint(folder / "checkpoints", filename="last"),
    ]  # fmt: skip
    logger = CSVLogger(tmp_path, name="mine", version="version_0")
    options = {"log_every_n_steps": 2, "max_epochs": 3, "enable_checkpointing": True}
    fit(callbacks, Plain, logger=logger, **options)
    return folder


def test_a_short_run_with_everything(fitted):
    analyze([fitted], fitted / "analysis")
    numbers, text = written(fitted / "analysis")
    (found,) = numbers["runs"]
    assert found["status"] == "finished"
    assert found["last_step"] == 24
    assert "No change of stage" in text
    assert found["median_step_seconds"]["step"] > 0
    for name in ("overview", "dimensions", "optimizer", "step_time"):
        assert (fitted / "analysis" / f"{name}_light.png").exists()
    assert "λ" in drawn(figures.optimizer(read_run(fitted)))
    assert "milliseconds a step" in drawn(figures.step_time(read_run(fitted)))


def of_rows(folder, rows):
    """A run with these records."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "header", "version": 1, "step": 0}, *rows]
    (folder / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_run(folder)


def test_validation_has_one_colour_whether_or_not_training_is_known(tmp_path):
    rows = [{"kind": "validation", "step": s, "metrics": {"val/accuracy": s / 9, "val/loss": 1.0}} for s in range(1, 9)]
    rows += [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1 / s}} for s in range(1, 9)]
    loss, success = figures.overview(of_rows(tmp_path, rows)).axes[1:]
    (of_success,) = (line.get_color() for line in success.get_lines())
    colors = {line.get_label(): line.get_color() for line in loss.get_lines()}
    assert of_success == colors["validation"] != colors["training"]


def test_a_fall_of_validation_success_is_told(tmp_path):
    values = [0.1, 0.5, 0.99, 0.99, 0.2, 0.8]
    rows = [{"kind": "validation", "step": s, "metrics": {"val/accuracy": v}} for s, v in enumerate(values)]
    of_rows(tmp_path / "run", rows)
    analyze([tmp_path / "run"], tmp_path / "out")
    numbers, text = written(tmp_path / "out")
    assert "fell from 0.99 at step 3 to 0.2 at step 4, and ends at 0.8" in text
    assert numbers["runs"][0]["best"] == {"value": 0.99, "step": 2}
    assert numbers["runs"][0]["steps"] == 5
    (tmp_path / "run" / "summary.json").write_text('{"status": "interrupted", "steps": 9}')
    assert numbers_of(read_run(tmp_path / "run"))["steps"] == 9  # more than were logged
    percent = [row | {"metrics": {"val/accuracy": 80 + row["metrics"]["val/accuracy"]}} for row in rows]
    assert not any("fell" in remark for remark in of_rows(tmp_path / "run", percent).remarks)
    steady = [row for row in rows if row["step"] != 4]
    assert not any("fell" in remark for remark in of_rows(tmp_path / "run", steady).remarks)


def test_what_an_axis_does_not_show_is_said(tmp_path):
    parts = ("data", "forward_backward", "optimizer", "callbacks", "other")
    rows = [
        {"kind": "step", "step": s, "metrics": {f"forge/telemetry/{part}_seconds": 0.01 for part in parts}}
        for s in range(1, 41)
    ]
    figure = figures.step_time(of_rows(tmp_path, rows))
    assert "medians)" in figure.axes[0].get_title()
    rows[20]["metrics"]["forge/telemetry/data_seconds"] = 3.0
    figure = figures.step_time(of_rows(tmp_path, rows))
    assert re.search(r"1 of 40 records go up to 3\.\d+ s", figure.axes[0].get_title())
    axis = Figure().subplots()
    axis.plot([-5, 9])
    axis.set_ylim(0, 1)
    assert figures.cut_off(axis, [-5, 9, float("nan")], "it, ") == " (it, cut: goes up to 9 and down to -5)"
    assert figures.cut_off(axis, [0.5]) == ""


def test_a_stage_that_begins_at_the_last_step_is_that_at_the_end(tmp_path):
    change = {"kind": "event", "event": "stage", "before": "unknown", "after": "generalisation", "reason": "it does"}
    rows = [{"kind": "validation", "step": s, "metrics": {"val/loss": 1.0}} for s in (4, 8)]
    run = of_rows(tmp_path / "one" / "run", [*rows, {**change, "step": 8, "evidence": {}}])
    assert stage_spans(run) == [("unknown", 0, 8), ("generalisation", 8, 8)]
    assert figures.overview(run).axes[0].get_title() == "one/run"
    assert analyze([str(run.path)], tmp_path / "out").exists()
    assert "<td>stage at the end</td><td>generalisation</td>" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_runs_is_told_from_a_run(tmp_path):
    run = of_rows(tmp_path / "group" / "version_0", [{"kind": "step", "step": 1, "metrics": {"a": 1.0}}])
    with pytest.raises(ValueError, match=f"There are runs below it: {re.escape(str(run.path))}$"):
        read_run(tmp_path / "group")


def test_a_constant_is_not_magnified(tmp_path):
    rows = [{"kind": "step", "step": s, "metrics": {"forge/grokfast/lamb": 0.5}} for s in range(9)]
    (axis,) = figures.optimizer(of_rows(tmp_path, rows)).axes
    assert axis.get_ylim() == (0.0, 1.0)


def test_metrics_of_other_names_are_found(tmp_path):
    metrics = {"loss/val": 1.0, "acc/val": 0.5}
    rows = [{"kind": "validation", "step": step, "metrics": metrics} for step in range(1, 5)]
    run = of_rows(tmp_path / "one", rows)
    assert run.other_names == {"val/loss": "loss/val", "val/accuracy": "acc/val"}
    assert not any("No validation" in remark for remark in run.remarks)
    assert [axis.get_title() for axis in figures.overview(run).axes[1:]] == ["Loss", "Success"]
    metrics["second_loss/val"] = 2.0
    assert "val/loss" not in of_rows(tmp_path / "two", rows).other_names  # which of the two?


@pytest.mark.parametrize(("exact", "title"), [(0.0, "Success, by tokens: no sequence was right"), (0.1, "Success")])
def test_success_is_by_tokens_where_no_sequence_is_right(tmp_path, exact, title):
    values = {"val/exact_match": exact, "val/token_accuracy": 0.25}
    rows = [{"kind": "validation", "step": step, "metrics": values} for step in range(1, 5)]
    success = figures.overview(of_rows(tmp_path, rows)).axes[1]
    assert success.get_title().startswith(title)
    assert list(success.get_lines()[0].get_ydata()) == 4 * [exact or 0.25]


def test_rates_and_counts_of_other_callbacks_do_not_share_an_axis(tmp_path):
    metrics = {"forge/code_evaluation/pass_at_1": 0.5, "forge/code_evaluation/num_problems": 1.0}
    axes = figures.others(of_rows(tmp_path, [{"kind": "step", "step": s, "metrics": metrics} for s in (1, 2, 3)])).axes
    assert [[line.get_label() for line in axis.get_lines()] for axis in axes] == [["pass_at_1"], ["num_problems"]]
    assert [axis.get_title() for axis in axes] == ["code evaluation: pass at 1", "code evaluation: num problems"]


def test_legends_of_a_comparison_cover_no_panel(tmp_path):
    rows = [{"kind": "validation", "step": s, "metrics": {"val/accuracy": s / 9, "val/loss": 1.0}} for s in range(1, 9)]
    runs = [of_rows(tmp_path / group / version, rows) for group in ("one", "two") for version in ("0", "1")]
    del runs[3].series["val/loss"]
    figure = comparison.comparison(runs)
    assert all(axis.get_legend() is None for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one (2 runs)", "two (2 runs)"]
    assert [axis.get_title() for axis in figure.axes] == ["Validation loss\ntwo: 1 of 2", "Validation success"]


def test_panels_of_learning_curves_have_steps_in_one_scale(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: shown.append(figure))
    for last in (300, 5000):  # of a fine-tuning, and of a run whose beginning would not be seen
        metrics = {"train/loss": (list(range(last)), [2.0] * last), "val/loss": ([90, last], [2.0, 1.0])}
        plot_learning_curves(metrics | {"val/accuracy": ([90, last], [0.1, 0.2])}, tmp_path / "curves.png")
    assert [axis.get_xscale() for axis in shown[0].axes] == ["linear", "linear"]
    assert [axis.get_xscale() for axis in shown[1].axes] == ["log", "log"]
    assert {axis.get_xlabel() for axis in shown[1].axes} == {"optimizer step, logarithmic"}
    colors = {line.get_label(): line.get_color() for axis in shown[0].axes for line in axis.get_lines()}
    assert colors == {"train": figures.ORANGE, "val": figures.BLUE}


def test_values_of_other_callbacks_get_a_panel(tmp_path):
    rows = [{"kind": "header", "version": 1, "step": 0}]
    rows += [{"kind": "step", "step": s, "metrics": {"forge/mine/something": s / 9}} for s in range(1, 9)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "mine: something" in drawn(figures.others(read_run(tmp_path)))


@pytest.mark.parametrize("name", ["", "mine/"])
def test_success_and_difficulty_of_the_edge_are_drawn_with_their_band(tmp_path, name):
    values = {"success_rate": 0.6, "expected_success": 0.65, "in_band": 0.9, "target_low": 0.55, "target_high": 0.75}
    values |= {"difficulty": 3.0, "difficulty_p10": 1.0, "difficulty_p90": 5.0, "skill": 4.0}
    metrics = {f"forge/edge/{name}{key}": value for key, value in values.items()}
    rows = [{"kind": "step", "step": step, "metrics": metrics} for step in (1, 2, 3)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    above, below = figures.edge(read_run(tmp_path)).axes
    assert "90 % of the steps in the band" in above.get_title()
    labels = [text.get_text() for axis in (above, below) for text in axis.get_legend().get_texts()]
    assert labels == ["band", "success", "expected", "middle 80 %", "mean drawn", "skill (half succeed)"]
    assert below.get_ylim()[0] < 1 < 5 < below.get_ylim()[1]
    assert below.get_title() == "Difficulty drawn"
    metrics[f"forge/edge/{name}skill"] = 40.0
    rows = [{"kind": "step", "step": step, "metrics": metrics} for step in (1, 2, 3)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    below = figures.edge(read_run(tmp_path)).axes[1]
    assert below.get_title() == "Difficulty drawn (skill, cut: goes up to 40)"
    assert below.get_lines()[-1].get_ydata().tolist() == 3 * [40.0]


def test_a_killed_run_reports_what_there_is(fitted):
    (fitted / "summary.json").unlink()
    trace = fitted / "trace.jsonl"
    trace.write_text(trace.read_text()[: len(trace.read_text()) * 2 // 3])
    analyze([fitted], fitted / "analysis")
    _, text = written(fitted / "analysis")
    assert "the run was killed after step" in text
    assert "1 lines of the trace are cut off or broken" in text


def test_without_geometry_or_trace_it_says_what_is_missing(tmp_path):
    fit([RunSummary(monitor="val/loss")], Plain, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2)
    analyze([tmp_path], tmp_path / "analysis")
    _, text = written(tmp_path / "analysis")
    for missing in ("There is no trace, only metrics.csv", "No dimensions: add <code>GeometryProbe</code>"):
        assert missing in text
    assert (tmp_path / "analysis" / "overview_light.png").exists()


def test_stages_are_found_in_metrics_alone(tmp_path):
    """As another project would leave them."""
    run = read_run(recorded(tmp_path / "with_trace", "grok_add_1"))
    lines = ["step,train/loss,train/accuracy,val/loss,val/accuracy"]
    for name, column in (
        ("forge/telemetry/loss", 1),
        ("forge/telemetry/success", 2),
        ("val/loss", 3),
        ("val/accuracy", 4),
    ):
        for step, value in zip(*run.series[name], strict=True):
            cells = [str(step - 1), "", "", "", ""]
            cells[column] = str(value)
            lines.append(",".join(cells))
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, ""]))
    stages = [name for name, *_ in stage_spans(read_run(tmp_path))]
    assert stages == ["unknown", "memorisation", "onset", "generalisation", "consolidation"]


def test_names_of_other_projects_are_known(tmp_path):
    with gzip.open(RECORDED / "grok_add_1.jsonl.gz", "rt") as file:
        text = file.read().replace("val/loss", "val_loss").replace("val/accuracy", "val_acc")
    (tmp_path / "trace.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert [name for name, *_ in stage_spans(run)][-1] == "consolidation"
    labels = {line.get_label() for axis in figures.overview(run).axes for line in axis.get_lines()}
    assert "validation" in labels


def test_a_trace_of_another_version_is_read_as_far_as_it_goes(tmp_path):
    rows = [{"kind": "header", "version": 99}, {"kind": "new", "step": 1}, {"kind": "step", "step": "x", "metrics": {}}]
    rows += [{"kind": "step", "step": 2, "metrics": {"forge/telemetry/loss": 1.0, "odd": [1]}}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(tmp_path)
    assert run.series["forge/telemetry/loss"] == ([2], [1.0])
    assert any("of version 99, this package reads 1" in remark for remark in run.remarks)
    analyze([tmp_path], tmp_path / "analysis")


def test_a_run_that_goes_on_from_another_says_so(tmp_path):
    rows = [{"kind": "step", "step": 5, "metrics": {"forge/telemetry/loss": 1.0}}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.yaml").write_text("seed_everything: 0\nckpt_path: null\n")
    assert not any("goes on" in remark for remark in read_run(tmp_path).remarks)
    (tmp_path / "config.yaml").write_text("seed_everything: 0\nckpt_path: runs/a/version_0/checkpoints/last.ckpt\n")
    assert any("goes on from runs/a/version_0/checkpoints/last.ckpt" in r for r in read_run(tmp_path).remarks)


def part_of_a_run(folder, first, last, checkpoint=None):
    folder.mkdir(parents=True)
    steps = range(first, last + 1)
    rows = [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1 / s}} for s in steps]
    rows += [{"kind": "validation", "step": s, "metrics": {"val/accuracy": s / 10}} for s in steps]
    rows += [{"kind": "event", "event": "stage", "step": last, "before": "unknown", "after": "onset", "evidence": {}}]
    (folder / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "config.yaml").write_text(f"ckpt_path: {checkpoint or 'null'}\ntrainer: [class_path: RunSummary]\n")
    return folder


def test_a_killed_run_and_its_resume_are_compared_as_one(tmp_path, monkeypatch):
    first = part_of_a_run(tmp_path / "runs" / "a" / "version_0", 1, 6)
    second = part_of_a_run(tmp_path / "runs" / "a" / "version_1", 5, 8, "runs/a/version_0/checkpoints/last.ckpt")
    third = part_of_a_run(tmp_path / "runs" / "a" / "version_2", 9, 9, f"'{second}/checkpoints/last.ckpt'")
    other = part_of_a_run(tmp_path / "runs" / "b" / "version_0", 1, 9, "runs/elsewhere/version_0/last.ckpt")
    monkeypatch.chdir(tmp_path)
    analyze([other, third, first, second], tmp_path / "analysis")
    numbers, text = written(tmp_path / "analysis")
    groups = numbers["comparison"]["groups"]
    assert {name: len(group["runs"]) for name, group in groups.items()} == {"a": 1, "b": 1}
    assert groups["a"]["steps_to"]["0.5"] == [5]
    assert groups["a"]["last_validation_success"] == 0.9
    assert numbers["comparison"]["series"]["Validation success"]["a"]["steps"] == list(range(1, 10))
    joined = next(run for run in join_resumed([read_run(p) for p in (first, second, third)]))
    assert [change["step"] for change in joined.stages] == [8, 9]  # the first part's end was trained again
    assert "A run that was resumed is one with its beginning" in text
    assert [run["status"] for run in numbers["runs"]].count("killed after step 6, or still under way") == 1


def test_a_resumed_trace_holds_its_beginning(tmp_path):
    """As `Telemetry` writes it; what other callbacks logged is in metrics.csv, from the resume on."""
    first = part_of_a_run(tmp_path / "a" / "version_0", 1, 6)
    second = part_of_a_run(tmp_path / "a" / "version_1", 1, 8, first / "checkpoints" / "last.ckpt")
    for folder, steps in ((first, range(6)), (second, range(5, 8))):
        lines = ["step,forge/other/value", *(f"{step},{step + 0.5}" for step in steps)]
        (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    (run,) = join_resumed([read_run(first), read_run(second)])
    assert run.series["val/accuracy"][0] == list(range(1, 9))
    assert run.series["forge/other/value"] == (list(range(1, 9)), [step + 0.5 for step in range(8)])
    assert [change["step"] for change in run.stages] == [8]


def test_what_is_no_resume_is_compared_apart(tmp_path, monkeypatch):
    def counts(*paths):
        return sorted(run.last_step - min(run.series["val/accuracy"][0]) + 1 for run in join_resumed(paths))

    runs = tmp_path / "runs"
    first = read_run(part_of_a_run(runs / "a" / "version_0", 1, 6))
    checkpoint = runs / "a" / "version_0" / "checkpoints" / "last.ckpt"
    again = read_run(part_of_a_run(runs / "a" / "version_1", 5, 8, checkpoint))
    further = read_run(part_of_a_run(runs / "a" / "version_2", 5, 9, checkpoint))
    tested = read_run(part_of_a_run(runs / "a" / "version_3", 1, 1, checkpoint))
    elsewhere = read_run(part_of_a_run(runs / "b" / "version_1", 5, 9, checkpoint))
    assert counts(first, again) == [8]
    assert counts(first, first, again) == [8]
    assert counts(again, further, first) == [4, 9]  # the one that went furthest
    assert counts(first, tested) == [1, 6]
    assert counts(first, elsewhere) == [5, 6]
    (first.path / "summary.json").write_text('{"status": "finished"}')
    assert counts(read_run(first.path), again) == [4, 6]  # a branch of a run that has an end of its own
    longer = read_run(part_of_a_run(runs / "a" / "version_4", 7, 9, checkpoint))
    assert counts(read_run(first.path), longer) == [9]
    monkeypatch.chdir(first.path)  # a relative name means nothing here
    other = read_run(part_of_a_run(runs / "a" / "version_5", 5, 9, "runs/c/version_0/checkpoints/last.ckpt"))
    assert counts(first, other) == [5, 6]


def test_a_resume_without_a_validation_of_its_own_keeps_what_there_is(tmp_path):
    first = part_of_a_run(tmp_path / "a" / "version_0", 6, 6)
    second = part_of_a_run(tmp_path / "a" / "version_1", 7, 8, first / "checkpoints" / "last.ckpt")
    (second / "trace.jsonl").write_text('{"kind": "step", "step": 7, "metrics": {"forge/telemetry/loss": 1.0}}')
    analyze([first, second], tmp_path / "analysis")
    numbers, _ = written(tmp_path / "analysis")
    assert numbers["comparison"]["groups"]["a"]["last_validation_success"] == 0.6


def test_a_summary_that_cannot_be_read_is_no_kill(tmp_path):
    folder = part_of_a_run(tmp_path / "a" / "version_0", 1, 6)
    assert read_run(folder).status == "killed after step 6, or still under way"
    (folder / "summary.json").write_text("{")
    assert read_run(folder).status is None


def test_stages_have_names_as_far_as_there_is_room(tmp_path):
    stages = [("unknown", "memorisation", 4), ("memorisation", "generalisation", 8), ("generalisation", "onset", 9)]
    rows = [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1.0}} for s in (1, 100)]
    rows += [
        {"kind": "event", "event": "stage", "step": 10 * s, "before": a, "after": b, "evidence": {}}
        for a, b, s in stages
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [text.get_text() for text in figures.overview(read_run(tmp_path)).axes[0].texts]
    assert names == ["unknown", "memorisation", "gen.", "onset"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 40, ["1", "2", "5", "10", "20"]),
        (20, 9e6, ["1,000", "1,000,000"]),
        (0.002, 50000, ["0.01", "1", "100", "10,000"]),
    ],
)
def test_logarithmic_axes_have_few_and_plain_numbers(low, high, expected):
    axis = Figure().subplots()
    axis.plot([low, high], [1, 2])
    logarithmic(axis, "x")
    axis.figure.canvas.draw()
    shown = [text.get_text() for text in axis.get_xticklabels(which="both")]
    assert set(expected) <= set(shown)
    assert sum(map(bool, shown)) <= 9
    assert not any("^" in text for text in shown)


def test_events_of_another_form_are_passed_over(tmp_path):
    stage = {"kind": "event", "event": "stage", "step": 2, "before": "unknown", "after": "onset", "evidence": [1]}
    rows = [{"kind": "step", "step": 2, "metrics": {"forge/telemetry/loss": 1.0}}, stage]
    rows += [stage | {"step": None}, stage | {"after": None}, stage | {"step": 3, "evidence": {"gap": "?"}}]
    rows += [{"kind": "event", "event": "geometry", "step": 3, "layer": "a", "before": "much"}, {"kind": "event"}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    analyze([tmp_path], tmp_path / "analysis")
    numbers, text = written(tmp_path / "analysis")
    assert "3 events of the trace are of a form that is not known" in text
    assert [change["step"] for change in numbers["runs"][0]["stage_changes"]] == [2, 3]


def test_instances_with_names_are_reported(tmp_path):
    callbacks = [Grokfast(name="x", alpha=0.9, schedule="constant"), StageClassifier(), Telemetry(name="y")]
    fit(callbacks, Plain, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1, max_epochs=2)
    run = read_run(tmp_path)
    titles = {axis.get_title() for axis in figures.optimizer(run).axes}
    assert {
        "Amplification",
        "Gradient and slow gradient",
        "Gradient norm, before and after filter and clipping",
    } <= titles
    assert figures.step_time(run) is not None
    assert not any("no trace" in remark for remark in run.remarks)


def test_a_run_whose_validation_loss_is_not_known_is_not_said_to_diverge(tmp_path):
    lines = ["step,train_loss,train_acc,val_acc"]
    for step in range(0, 400, 10):
        lines += [f"{step},{max(0.01, 3 - step / 60)},{min(1.0, step / 100)},", f"{step},,,{min(0.98, step / 300)}"]
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, ""]))
    stages = [name for name, *_ in stage_spans(read_run(tmp_path))]
    assert "divergence" not in stages
    assert stages[-1] == "consolidation"


@pytest.mark.parametrize(
    "metrics",
    [
        {"forge/telemetry/lr": 0.1},
        {"forge/telemetry/lr": 0.0, "forge/telemetry/loss": "inf", "forge/telemetry/success": "nan"},
        {"forge/geometry/a.b/two_nn": "nan", "forge/geometry/a.b/two_nn_se": "nan", "forge/geometry/a.b/num_points": 3},
        {"forge/geometry/second/a.b/skdim:MLE": 3.0, "forge/telemetry/coarse/loss": 2.0},
        {f"forge/geometry/mine/{n}/{q}": 2.0 for n in range(12) for q in ("two_nn", "num_points")}
        | {"forge/geometry/mine/overhead": 0.1, "forge/telemetry/lr": "nan"},
        {"forge/telemetry/data_seconds": 0.0, "forge/telemetry/tokens_per_second": 0.0},
    ],
)
@pytest.mark.parametrize("steps", [(0,), (1, 2)])
def test_odd_values_are_drawn_without_a_warning(tmp_path, metrics, steps):
    rows = [{"kind": "step", "step": step, "metrics": metrics} for step in steps]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert analyze([tmp_path], tmp_path / "analysis").exists()


def test_several_runs_are_compared_by_group(tmp_path):
    paths = [recorded(tmp_path / "grok" / f"version_{i}", f"grok_add_{i}") for i in range(3)]
    paths.append(recorded(tmp_path / "control" / "version_0", "random_0"))
    analyze(paths, tmp_path / "out")
    numbers, text = written(tmp_path / "out")
    assert [run["group"] for run in numbers["runs"]] == ["grok"] * 3 + ["control"]
    assert "1,368 (1,248, 1,416, 1,368)" in text
    assert "not reached (–)" in text
    assert (tmp_path / "out" / "comparison_dark.png").exists()
    group = numbers["comparison"]["groups"]["grok"]
    assert group["steps_to"]["0.5"] == [1248, 1416, 1368]
    band = numbers["comparison"]["series"]["Validation success"]["grok"]
    assert band["runs"] == 3
    assert len(band["steps"]) == len(band["median"]) > 50
    assert all(a <= b <= c for a, b, c in zip(band["least"], band["median"], band["largest"], strict=True))


def test_directories_of_one_name_are_groups_of_their_own(tmp_path):
    paths = [
        recorded(tmp_path / side / "run" / "version_0", name) for side, name in (("a", "grok_add_0"), ("b", "random_0"))
    ]
    analyze(paths, tmp_path / "out")
    numbers, text = written(tmp_path / "out")
    assert list(numbers["comparison"]["groups"]) == ["a/run", "b/run"]
    assert "<td>a/run</td><td class=n>1</td>" in text
    assert "<td>1,248 (1,248)</td>" in text


def test_series_that_do_not_meet_are_not_made_to():
    grid, middle, low, _ = comparison.band([([0, 10], [1.0, 1.0]), ([20, 30], [3.0, 3.0])])
    assert grid.tolist() == [0, 10, 20, 30]
    assert middle.tolist() == low.tolist() == [1, 1, 3, 3]


def test_the_band_is_median_and_extremes_over_common_steps():
    grid, middle, low, high = comparison.band(
        [([0, 10, 20], [0.0, 1.0, 2.0]), ([0, 20], [0.0, 4.0]), ([0, 30], [0.0, 9.0])]
    )
    assert grid.tolist() == [0, 10, 20]
    assert middle.tolist() == [0, 2, 4]
    assert (low.tolist(), high.tolist()) == ([0, 1, 2], [0, 3, 6])


def test_a_checkpoint_alone(fitted):
    (path,) = (fitted / "checkpoints").glob("last*.ckpt")
    analyze_checkpoint(path, fitted / "analysis")
    numbers, text = written(fitted / "analysis")
    assert numbers["step"] == 24
    weight = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"]
    first = numbers["weights"][0]
    assert first["name"] == "net.0.weight"
    assert first["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert first["largest"] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
    assert 1 <= first["effective_rank"] <= first["full_rank"] == 8
    assert "StageClassifier" in text


def test_what_is_no_run_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither a trace.jsonl nor a metrics.csv"):
        analyze([tmp_path], tmp_path / "out")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no checkpoint of Lightning"):
        analyze_checkpoint(tmp_path / "other.pt", tmp_path / "out")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.pt cannot be read as a checkpoint"):
        analyze_checkpoint(tmp_path / "cut.pt", tmp_path / "out")


def test_weights_are_named_where_there_is_room():
    rows = [{"name": f"layer.{i}", "effective_rank": i + 1.0, "full_rank": 50} for i in range(50)]
    axis = figures.weights(rows[:9]).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [row["name"] for row in rows[:9]]
    assert [bar.get_width() for bar in axis.patches] == [2.0 * (i + 1) for i in range(9)]
    axis = figures.weights(rows).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("matrix", "effective rank, % of full")


CONFIG = """seed_everything: {seed}
model:
  class_path: ForgeModule
  init_args:
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: {lr}}}}}
trainer:
  logger:
  - init_args: {{version: v{seed}}}
ckpt_path: null
"""


def small_run(folder, lr, seed):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(lr=lr, seed=seed))
    rows = [f"{step},{1 / (step + 1)}" for step in range(5)]
    (folder / "metrics.csv").write_text("\n".join(["step,val/loss", *rows, ""]))
    return read_run(folder)


def test_runs_of_other_settings_are_groups_named_by_what_differs(tmp_path):
    runs = [small_run(tmp_path / "mine" / f"version_{i}", lr, i) for i, lr in enumerate((0.1, 0.1, 0.01))]
    assert group_names(runs) == ["mine: lr=0.1", "mine: lr=0.1", "mine: lr=0.01"]
    assert group_names(runs[:2]) == ["mine", "mine"]
    page = analyze([run.path for run in runs], tmp_path / "out").read_text()
    assert "mine: lr=0.01" in page


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_a_metrics_file_cut_off_anywhere_is_read_as_far_as_it_goes(tmp_path, cut):
    whole = "step,epoch,val/loss,note\r\n0,0,0.25,warm\r\n1,0,0.125,True\r\n2,0,0.0625,\r\n"
    path = tmp_path / "metrics.csv"
    path.write_text(whole)
    assert read_metrics(path) == {"val/loss": ([0, 1, 2], [0.25, 0.125, 0.0625])}
    path.write_text(whole[: len(whole) - cut])
    complete = whole[: len(whole) - cut].count("\n") - 1
    if complete < 0:
        with pytest.raises(ValueError, match="has no column 'step'"):
            read_metrics(path)
    else:
        assert read_metrics(path).get("val/loss", ([], []))[1] == [0.25, 0.125, 0.0625][:complete]


def test_a_trace_shows_the_training_accuracy_that_the_module_logged(tmp_path):
    lines = [{"kind": "header", "version": 1, "step": 0}]
    lines += [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1 / s}} for s in (1, 2)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "metrics.csv").write_text("step,train_acc\n0,0.5\n1,0.75\n")
    run = read_run(tmp_path)
    assert run.series["train_acc"] == run.series["forge/telemetry/success"] == ([1, 2], [0.5, 0.75])
    assert run.series["forge/telemetry/loss"] == ([1, 2], [1.0, 0.5])


def test_long_series_are_thinned_in_the_json(tmp_path):
    (tmp_path / "run").mkdir()
    rows = [f"{step},{step / 2}" for step in range(5001)]
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(["step,val/loss", *rows, ""]))
    analyze([tmp_path / "run"], tmp_path / "out")
    series = json.loads((tmp_path / "out" / "analysis.json").read_text())["runs"][0]["series"]["val/loss"]
    assert len(series["steps"]) <= 2001
    assert (series["every"], series["steps"][:2], series["steps"][-1]) == (3, [1, 4], 5001)


ODD = """
model: {class_path: mine.Module, init_args: {config: conf/x.yaml, since: 2024-01-01, optimizer: 3}}
data: {class_path: mine.Data, init_args: {path: [a, b], sources: [a, b]}}
"""
ITSELF = "model: &m\n  class_path: mine.Module\n  init_args: {other: *m}\n"


@pytest.mark.parametrize("config", [ODD, ITSELF, "[1, 2]", "just text", ": :"])
@pytest.mark.parametrize(
    "summary", [{"seconds": 3, "steps": None, "status": 1}, {"seconds": {"wall": "x"}}, {"metrics": None}]
)
def test_anybodys_files_make_a_page(tmp_path, config, summary):
    rows = [{"kind": "validation", "step": s, "metrics": {"val/loss": 1.0 / s}} for s in range(1, 6)]
    for name, text in (("one", config), ("two", config.replace("2024", "2025"))):
        of_rows(tmp_path / name / "run", rows)
        (tmp_path / name / "run" / "config.yaml").write_text(text)
        (tmp_path / name / "run" / "summary.json").write_text(json.dumps(summary))
        (tmp_path / name / "run" / "calibration.json").write_text('{"val": [1]}')
    paths = [tmp_path / name / "run" for name in ("one", "two")]
    analyze(paths, tmp_path / "out")
    numbers, _ = written(tmp_path / "out")
    if config == ODD:
        assert numbers["comparison"]["differences"] == {"model.init_args.since": ["2024-01-01", "2025-01-01"]}
    assert numbers["runs"][0]["outcome"]["best_validation_loss"] == {"value": 0.2, "step": 5}


def test_a_loss_that_is_no_number_at_the_end_is_said(tmp_path):
    rows = [{"kind": "validation", "step": s, "metrics": {"val/loss": 1.0 if s < 3 else "nan"}} for s in range(1, 6)]
    of_rows(tmp_path / "run", rows)
    analyze([tmp_path / "run"], tmp_path / "out")
    text = written(tmp_path / "out")[1]
    assert "<td>best validation loss</td><td>1 nats at step 1</td>" in text
    assert "<td>last validation loss</td><td>not finite</td>" in text


def test_perplexity_is_that_of_the_best_loss(tmp_path):
    metrics = [(1, 2.0), (2, 0.5), (2, 1.0)]
    rows = [
        {"kind": "validation", "step": s, "metrics": {"val/loss": loss, "val/perplexity": math.exp(loss)}}
        for s, loss in metrics
    ]
    of_rows(tmp_path / "run", rows)
    analyze([tmp_path / "run"], tmp_path / "out")
    outcome = written(tmp_path / "out")[0]["runs"][0]["outcome"]
    assert outcome["best_validation_loss"] == {"value": 0.5, "step": 2}
    assert outcome["perplexity"] == pytest.approx(math.exp(0.5))


def test_names_are_text_in_a_notebook(tmp_path):
    run = of_rows(
        tmp_path / "<b>x" / "run",
        [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1.0}} for s in (1, 2)],
    )
    shown = show(run).data
    assert "<b>x" not in shown
    assert "&lt;b&gt;x/run" in shown


def test_runs_of_like_names_keep_their_own_pictures(tmp_path):
    rows = [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1.0 / s}} for s in range(1, 4)]
    for name in ("a b", "a-b"):
        of_rows(tmp_path / name / "run", rows)
    analyze([tmp_path / name / "run" for name in ("a b", "a-b")], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*overview_light.png"))) == 2


def test_a_resume_tells_of_its_own_facts(tmp_path):
    rows = [{"kind": "header", "version": 1, "step": 0, "precision": "32-true", "total_steps": 4}]
    rows += [{"kind": "step", "step": 2, "metrics": {"forge/telemetry/loss": 1.0}}]
    rows += [{"kind": "header", "version": 1, "step": 4, "precision": "bf16-mixed", "total_steps": 8}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_run(tmp_path).facts == {"precision": "bf16-mixed", "total_steps": 8}


def test_settings_that_differ_are_named_by_weight_and_what_is_not_set_is_none(tmp_path):
    config = "trainer: {{max_steps: {}, limit_val_batches: {}, min_steps: {}}}\n"
    config += "model: {{init_args: {{optimizer: {{lr: {}}}, peft: {}}}}}\n"
    for name, values in (("a", (1, 1, 1, 0.1, "null")), ("b", (2, 2, 2, 0.2, "{r: 4}"))):
        part_of_a_run(tmp_path / "g" / name, 1, 3)
        (tmp_path / "g" / name / "config.yaml").write_text(config.format(*values))
    runs = [read_run(tmp_path / "g" / name) for name in "ab"]
    names = group_names(runs)
    assert names[0].startswith("g: lr=0.1, ")
    assert "peft" not in differences(runs)
    assert differences(runs)["model.init_args.peft.r"] == [None, 4]


def test_a_comparison_of_other_runs_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [[part_of_a_run(tmp_path / side / "runs" / name, 1, 3) for name in "ab"] for side in ("x", "y")]
    for pair in pairs:
        analyze(pair, default_output(pair))
    assert sorted(path.name for path in (tmp_path / "comparisons").iterdir()) == [
        "runs-a_vs_runs-b",
        "runs-a_vs_runs-b_2",
    ]
    assert default_output(pairs[0]).name == "runs-a_vs_runs-b"
    assert default_output(pairs[1]).name == "runs-a_vs_runs-b_2"


def test_a_classifier_without_a_validation_is_not_called_missing(tmp_path):
    of_rows(tmp_path, [{"kind": "step", "step": s, "metrics": {"forge/telemetry/loss": 1.0}} for s in (1, 2)])
    (tmp_path / "config.yaml").write_text("trainer: {callbacks: [{class_path: StageClassifier}]}\n")
    assert "No stages: `StageClassifier` names them after a validation, and none has run." in read_run(tmp_path).remarks


def test_checkpoints_of_other_forms(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(3, 3)}, "callbacks": {"Mine": {"events": None}}}, tmp_path / "a.ckpt")
    assert analyze_checkpoint(tmp_path / "a.ckpt", tmp_path / "a").exists()
    torch.save({"state_dict": [1, 2]}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="holds no `state_dict`"):
        analyze_checkpoint(tmp_path / "b.ckpt", tmp_path / "b")
