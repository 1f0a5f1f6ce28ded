"""Pictures of replay, from what runs leave on disk."""

import pytest
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.callbacks import Telemetry
from forge_lightning.reports import dream
from forge_lightning.reports.analysis import analyze
from forge_lightning.reports.trace import read_run
from tests.contract.modules import LossOnly
from tests.contract.rows import fit
from tests.dream.build import dream_replay
from tests.reports.test_analysis import drawn, written
from tests.reports.test_self_knowledge import lines


def recorded(folder, **options):
    replay = dream_replay(every_n_steps=4, num_steps=2, probe_size=8, **options)
    logger = CSVLogger(folder, name="", version="")
    fit([replay, Telemetry()], LossOnly, logger=logger, max_epochs=3, log_every_n_steps=1)
    return read_run(folder)


def test_sleeps(tmp_path):
    run = recorded(tmp_path, mode="cycle")
    figure = dream.dream(run)
    assert {"rows", "share", "Stored", "Loss of stored rows, before and after each sleep"} <= drawn(figure)
    stored, shares, sleep, probe = figure.axes
    assert lines(stored)["all"].get_ydata().tolist() == run.series["forge/dream/stored"][1]
    assert lines(sleep)["before"].get_ydata() == pytest.approx(run.series["forge/dream/loss_before"][1])
    assert len(lines(sleep)["after"].get_ydata()) == 6
    assert set(lines(probe)) == {"loss", "above its lowest"}
    assert set(lines(shares)) == {"replayed, of all compute"}


def test_mixed_batches(tmp_path):
    figure = dream.dream(recorded(tmp_path, mode="mix"))
    assert "Loss of replayed rows" in drawn(figure)
    assert len(lines(figure.axes[2])["replayed rows"].get_ydata()) > 10
    run = read_run(tmp_path)
    for key in ("probe_loss", "forgetting"):
        del run.series[f"forge/dream/{key}"]
    figure = dream.dream(run)
    assert [[text.get_text() for text in axis.texts] for axis in figure.axes] == [[], [], [], ["not measured"]]


def test_the_page_shows_it(tmp_path):
    recorded(tmp_path / "run", mode="cycle")
    analyze([tmp_path / "run"], tmp_path / "page")
    _, text = written(tmp_path / "page")
    assert (tmp_path / "page/dream_dark.png").read_bytes().startswith(b"\x89PNG")
    assert "what sleeping and forgetting did" in text
    assert not (tmp_path / "page/others_light.png").exists()


def test_a_run_without_replay_has_no_picture(tmp_path):
    fit([Telemetry()], LossOnly, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert dream.dream(read_run(tmp_path)) is None
