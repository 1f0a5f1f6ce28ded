import io
import json
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from forge_lightning.callbacks import RunSummary, StageClassifier, Telemetry
from forge_lightning.cli.main import main
from forge_lightning.reports.watch import LiveRun, plot, view, watch
from tests.contract.matrix import fit
from tests.contract.modules import Plain


def row(step, loss, seconds, **more):
    return {"kind": "step", "step": step, "seconds": seconds, "metrics": {"forge/telemetry/loss": loss, **more}}


def validation(step, loss):
    return {"kind": "validation", "step": step, "metrics": {"val/loss": loss}}


def append(path, *rows, end="\n"):
    with open(path, "a") as file:
        file.write("\n".join(map(json.dumps, rows)) + end)


def shown(run, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(view(run, width))
    return console.file.getvalue()


def test_rows_are_read_as_they_come(tmp_path):
    trace = tmp_path / "trace.jsonl"
    run = LiveRun(tmp_path)
    run.poll()
    assert run.status == "no trace yet: a run with `Telemetry` writes one"
    append(trace, {"kind": "header", "version": 1, "step": 0, "total_steps": 100}, row(10, 2.0, 1.0))
    run.poll()
    assert (run.step, run.last("forge/telemetry/loss"), run.status) == (10, 2.0, "running")
    assert run.steps_per_second is None
    append(trace, row(20, 1.5, 3.0), end='\n{"kind": "step", "st')  # a row half written
    run.poll()
    assert (run.step, run.steps_per_second, run.seconds_left) == (20, 5.0, 16.0)
    with open(trace, "a") as file:
        file.write('ep": 30, "seconds": 5.0, "metrics": {"forge/telemetry/loss": 1.25, "forge/telemetry/lr": 0.001}}\n')
    run.poll()
    assert (run.step, run.last("forge/telemetry/loss")) == (30, 1.25)
    append(trace, {"kind": "event", "event": "stage", "step": 30, "before": "unknown", "after": "memorisation"})
    run.poll()
    text = shown(run)
    for part in ("30 of 100 (30 %)", "memorisation", "0 min 14 s", "5 steps", "1.25 (least 1.25)", "0.001"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 80
    trace.write_text("")
    append(trace, row(5, 3.0, 1.0))  # begun anew
    run.poll()
    assert (run.step, run.find("forge/telemetry/loss")) == (5, ([5], [3.0]))


def test_what_looks_wrong_is_said(tmp_path):
    trace, run = tmp_path / "trace.jsonl", LiveRun(tmp_path)
    append(trace, *(row(s, 1.0 / s, s) for s in range(1, 25)))
    append(trace, *(validation(s, loss) for s, loss in ((5, 2.0), (10, 1.0), (15, 1.1), (20, 1.2), (24, 1.3))))
    run.poll()
    assert run.warnings() == ["the validation loss was best at step 10, and rises since: over-fitting?"]
    append(trace, *(row(s, 3.0, s) for s in range(25, 31)))
    run.poll()
    assert "the training loss has risen from 0.0417 to 3" in run.warnings()
    append(trace, row(31, "nan", 31), row(32, "nan", 32, **{"forge/grokfast/skipped_steps": 2}))
    run.poll()
    assert run.warnings()[0] == "the training loss is not finite since step 31"
    assert run.warnings()[-1] == "2 steps with gradients that are not finite"


def test_a_curve_of_dots():
    lines = plot(range(11), range(11), 10, 3)
    assert [line[:9].strip() for line in lines] == ["10", "", "0"]
    assert {len(line) for line in lines} == {20}
    assert lines[-1][10] != "⠀" != lines[0][-1]  # from the lower left to the upper right
    assert lines[0][10] == "⠀" == lines[-1][-1]
    flat = plot([1, 2], [1.0, 1.0], 4, 2)
    assert "⠉" in flat[0]
    assert plot([1], [1.0], 10, 3) == plot([1, 2], [float("nan")] * 2, 10, 3) == []


def test_a_real_run_is_watched_until_it_ends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forge-fit"])
    callbacks = [StageClassifier(), RunSummary(monitor="val/loss", mode="min"), Telemetry()]
    fit(callbacks, Plain, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1, max_epochs=3)
    run = LiveRun(tmp_path)
    run.poll()
    assert run.is_over
    assert run.facts["total_steps"] == run.step == 24
    assert main(["watch", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "24 of 24 (100 %)" in out
    summary = tmp_path / "summary.json"
    kept = summary.read_text()
    summary.unlink()
    console, waits = Console(file=io.StringIO(), force_terminal=True, width=80), []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            summary.write_text(kept)

    watch(tmp_path, 0.5, once=False, console=console, sleep=sleep)
    assert waits == [0.5, 0.5]
    assert "finished" in console.file.getvalue()


@pytest.mark.parametrize("words", [["watch", "absent"], ["compare", "absent", "there"]])
def test_absent_runs_are_named(words, capsys):
    assert main(words) == 2
    assert "`forge-fit" in (err := capsys.readouterr().err)
    assert "absent`: no such file" in err


def test_runs_below_are_named(tmp_path, capsys):
    (tmp_path / "version_0").mkdir()
    append(tmp_path / "version_0" / "trace.jsonl", row(1, 1.0, 1.0))
    assert main(["watch", str(tmp_path)]) == 2
    assert "There are runs below it: " in capsys.readouterr().err
