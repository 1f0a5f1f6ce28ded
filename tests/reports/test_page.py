"""The page in a real browser: quiet, self-contained, light and dark, on a phone, by keyboard."""

import base64
import gzip
import json
import os
import re
from pathlib import Path

import pytest

from forge_lightning.reports.analysis import analyze
from forge_lightning.reports.page import Pictures, slug, table, words
from tests.browser import opened

RECORDED = Path(__file__).parents[1] / "recorded_runs"
CONFIG = (
    "seed_everything: 0\nmodel:\n  class_path: forge_lightning.models.AlgorithmicModule\n  init_args:\n    lr: 0.001\n"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = []
    for index, name in enumerate(("grok_add_0", "random_0")):
        run = folder / "runs" / name / "version_0"
        run.mkdir(parents=True)
        with gzip.open(RECORDED / f"{name}.jsonl.gz") as file:
            (run / "trace.jsonl").write_bytes(file.read())
        (run / "config.yaml").write_text(CONFIG.replace("0.001", f"0.00{index + 1}"))
        runs.append(run)
    return analyze(runs, folder / "out")


@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(page, tmp_path, width, dark):
    with opened(tmp_path) as browser:
        browser.show_as(width, dark)
        browser.open(page)
        assert browser.said() == []
        assert browser.fetched() == []
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")
        assert (
            browser.evaluate("document.documentElement.scrollWidth") <= width
        )  # pictures and tables scroll by themselves
        shown = browser.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt.length])")
        assert len(shown) >= 5
        assert all(
            natural > 500 and width_ >= (600 if width > 600 else 700) and alt > 40 for natural, width_, alt in shown
        )
        sources = browser.evaluate("[...document.images].map(i => i.currentSrc)")
        light = browser.evaluate("[...document.images].map(i => i.src)")
        assert all((one != other) == dark for one, other in zip(sources, light, strict=True))
        if os.environ.get("FORGE_SCREENSHOTS"):
            taken = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            name = f"page_{width}_{'dark' if dark else 'light'}.png"
            (Path(os.environ["FORGE_SCREENSHOTS"]) / name).write_bytes(base64.b64decode(taken))


def test_the_page_by_keyboard(page, tmp_path):
    with opened(tmp_path) as browser:
        browser.show_as(390)
        browser.open(page)
        wanted = browser.evaluate("document.querySelectorAll('.scroll, summary').length")
        reached = set()
        for _ in range(wanted):
            browser.press("Tab")
            reached.add(
                browser.evaluate("[...document.querySelectorAll('.scroll, summary')].indexOf(document.activeElement)")
            )
        assert reached == set(range(wanted))
        browser.evaluate("document.querySelector('summary').focus()")
        browser.press("Enter")
        assert browser.evaluate("document.querySelector('details').open")


def test_losses_come_first_and_settings_that_differ_are_named(page):
    text = page.read_text()
    assert text.index("best validation loss") < text.index("success")
    assert "<td>model.init_args.lr</td><td class=n>0.001</td><td class=n>0.002</td>" in text
    assert "<title>grok_add_0/version_0 and random_0/version_0</title>" in text
    numbers = json.loads((page.parent / "analysis.json").read_text())
    assert numbers["comparison"]["differences"] == {"model.init_args.lr": [0.001, 0.002]}
    group = numbers["comparison"]["groups"]["grok_add_0"]
    steps, values = (numbers["runs"][0]["series"]["val/loss"][key] for key in ("steps", "values"))
    assert group["best_validation_loss"] == min(values)
    assert group["best_steps"] == [steps[values.index(min(values))]]


def test_pictures_say_what_they_show(page):
    text = page.read_text()
    assert re.search(r'alt="[^"]*Success: training from ', text)
    assert "validation from 0." in text


def test_pictures_of_an_earlier_report_go(page, tmp_path):
    runs = sorted((page.parents[1] / "runs").glob("*/version_0"))
    analyze(runs, tmp_path)
    assert (tmp_path / "random_0-version_0_overview_light.png").exists()
    (tmp_path / "mine.png").write_text("kept")
    analyze(runs[:1], tmp_path)
    kept = {file.name for file in tmp_path.iterdir()}
    assert {"mine.png", "overview_light.png", "report.html", "analysis.json"} <= kept
    assert not [name for name in kept if name.startswith(("random_0", "comparison", "grok_add_0"))]
    (tmp_path / "analysis.json").write_text('{"files": ["../runs/x_light.png", 3, "report.html"]}')
    assert Pictures(tmp_path, ["../x_light.png", "report.html", "a_light.png"])._before == ["a_light.png"]


def test_words_and_tables():
    assert words("use `a<b>` & c") == "use <code>a&lt;b&gt;</code> &amp; c"
    shown = table([["a", "1,200"], ["b", "–"]], ["name", "steps"])
    assert "<td>a</td><td class=n>1,200</td>" in shown
    assert slug("runs/a: lr=0.1 and 2") == "runs-a-lr=0.1-and-2"
