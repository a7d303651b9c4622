"""The page of a training run, made by real runs: what it says, what a browser shows of it, and that texts
which students wrote stay text."""

import json
import os
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, chromium
from commands import Tide, refused
from small_runs import CONFIG, TIDAL, write_dataset, write_student
from test_tools_report import HOSTILE, Page, figures
from transformers import PreTrainedTokenizerFast

from shards.errors import UsageError
from student.objective import parse_objective
from student.trainer import train
from tools.pages.run import write_page
from tools.pages.texts import evenly, texts_widget
from tools.pages.training_run import read_run, state_of

WATCHED = replace(
    CONFIG, log_every=1, eval_every=2, eval_samples=4, sample_every=2, samples=2, sample_tokens=12
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, student_tokenizer: PreTrainedTokenizerFast) -> Path:
    """`tidal` and `ce`, six steps each, and `going`: a copy of the first as it was after step 4, a line of
    each record half written."""
    root = tmp_path_factory.mktemp("runs")
    data, student = write_dataset(root / "data", student_tokenizer), root / "student"
    write_student(student, student_tokenizer)
    train(data, student, root / "tidal", WATCHED, TIDAL)
    train(data, student, root / "ce", WATCHED, parse_objective("ce"))
    (root / "going").mkdir()
    shutil.copy(root / "tidal" / "train_config.json", root / "going")
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (root / "tidal" / name).read_text(encoding="utf-8").split("\n")
        kept = [line for line in lines if line and json.loads(line)["step"] <= 4]
        (root / "going" / name).write_text("\n".join([*kept, lines[-2][:25]]), encoding="utf-8")
    return root


def series(page: Page, titles: list[str]) -> dict[str, list[dict[str, Any]]]:
    return dict(zip(titles, (f["data"] for f in figures(page)), strict=True))


TITLES = [
    "Held-out likelihood",
    "Held-out likelihood by timestep",
    "Loss",
    "Added term: tidal",
    "Added term: reverse-calm",
    "λ over training",
    "Learning rate",
    "Gradient norm",
    "Throughput",
    "Waiting for data",
]


def test_the_page_holds_what_the_runs_recorded(tide: Tide, runs: Path, tmp_path: Path) -> None:
    """Every line of every figure against the runs' own files; the baseline's dashed, in the same colour."""
    out = tmp_path / "new" / "page.html"
    done = tide("report", runs / "tidal", "--baseline", runs / "ce", "--out", out, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    records = {
        name: [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("tidal", "ce")
    }
    trained = {name: [r for r in lines if "loss" in r] for name, lines in records.items()}
    judged = {name: [r for r in lines if "by_t" in r] for name, lines in records.items()}
    assert said["bits_per_byte"] == judged["tidal"][-1]["heldout_bits_per_byte"]
    assert (said["step"], said["steps"], said["finished"]) == (6, 6, True)
    assert (said["evaluations"], said["texts"], said["objective"]) == (3, 8, "tidal+reverse-calm:0.5")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.loads == []
    shown = [text for text in page.text if text in TITLES]
    assert shown == TITLES
    by_title = series(page, TITLES)
    for title, key in (("Held-out likelihood", "heldout_bits_per_byte"), ("Learning rate", "learning_rate")):
        source = judged if title.startswith("Held") else trained
        for line, name in zip(by_title[title], ("tidal", "ce"), strict=True):
            assert line["name"] == name
            assert line["x"] == [r["step"] for r in source[name]]
            assert line["y"] == [r[key] for r in source[name]]
    for line, t in zip(by_title["Held-out likelihood by timestep"], [*judged["ce"][0]["by_t"]] * 2):
        name = "ce" if line["line"]["dash"] == "dash" else "tidal"
        assert line["y"] == [r["by_t"][t] for r in judged[name]]
        assert line["name"] == (f"t = {t}, ce" if name == "ce" else f"t = {t}")
    total, entropy, *baseline = by_title["Loss"]
    assert total["y"] == [r["loss"] for r in trained["tidal"]]
    assert entropy["y"] == [r["ce"] for r in trained["tidal"]]
    assert [line["line"]["color"] for line in baseline] == [total["line"]["color"], entropy["line"]["color"]]
    assert all(line["line"]["dash"] == "dash" and not line["showlegend"] for line in baseline)
    (term,) = by_title["Added term: reverse-calm"]  # the baseline has none
    assert term["y"] == [r["reverse-calm"] for r in trained["tidal"]]
    assert by_title["λ over training"][0]["y"] == [r["lambda"] for r in trained["tidal"]]
    assert by_title["Waiting for data"][1]["y"] == [r["data_wait"] for r in trained["ce"]]
    assert all(0 <= r["data_wait"] <= 1 for r in trained["ce"])
    text = " ".join(page.text)
    for words in ("tidal: finished, 6 steps", "objective.terms", "tidal:1+reverse-calm:0.5", "step 4, ce"):
        assert words in text


def test_a_run_that_is_not_finished(tide: Tide, runs: Path) -> None:
    """As far as it got, half-written lines left out; the page says that, and how old it is."""
    done = tide("report", runs / "going", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["finished"], said["step"], said["texts"]) == (False, 4, 6)
    page = Page((runs / "going" / "report.html").read_text(encoding="utf-8"))
    assert "not finished: step 4 of 6; still going, or interrupted" in " ".join(page.text)
    written = datetime(2030, 1, 1, tzinfo=UTC)
    os.utime(runs / "going" / "metrics.jsonl", (written.timestamp(), written.timestamp()))
    run = read_run(runs / "going")
    for later, words in ((5, "5 s old"), (600, "10 min old"), (7300, "2 h old"), (-5, "0 s old")):
        assert words in state_of(run, written + timedelta(seconds=later))
    begun = replace(run, records=(), updated=None)
    assert "no record yet of its 6 steps" in state_of(begun, written)


def test_what_is_missing_is_named(runs: Path, tmp_path: Path) -> None:
    """No evaluations, no texts, no records at all: fewer figures, and what would have made them."""
    shutil.copy(runs / "tidal" / "train_config.json", tmp_path)
    page = Page(write_page(tmp_path / "r.html", read_run(tmp_path)).read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert "--eval-every" in text
    assert "--sample-every" in text
    assert figures(page) == []


def test_texts_stay_text(runs: Path, tmp_path: Path) -> None:
    """A student, or a corpus, that writes markup: everywhere as it stands, nothing of it an element."""
    shutil.copytree(runs / "tidal", tmp_path / "run")
    line = {"step": 0, "sample_id": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "text": HOSTILE}
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_page(tmp_path / "r.html", read_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) == 4  # title, prompt, the sample's own text, the student's
    assert "b" not in page.tags
    assert not any("alert" in script for script in page.scripts[1:])


def test_prompts_are_matched_by_their_sample(runs: Path) -> None:
    """Another run's text stands beside the same prompt, that of the last step before where it has none of its
    own; a prompt of one run alone stands alone."""

    def line(sample: str, step: int, text: str) -> dict[str, Any]:
        return {"sample_id": sample, "step": step, "prompt": f"ask {sample}", "answer": "a", "text": text}

    ours = [line("x", 0, "ours 0"), line("x", 10, "ours 10"), line("y", 0, "only ours")]
    theirs = [line("x", 0, "theirs 0"), line("x", 7, "theirs 7"), line("z", 0, "only theirs")]
    widget = texts_widget([("ours", ours), ("theirs", theirs)])
    assert widget is not None
    page = Page(widget.markup)
    order = [t for t in page.text if t.startswith(("ours ", "theirs ", "only"))]
    assert order == ["ours 0", "theirs 0", "ours 10", "theirs 7", "only ours"]
    assert texts_widget([("ours", []), ("theirs", theirs)]) is None
    assert evenly([*range(0, 100, 10)], 4) == [0, 30, 60, 90]


def test_what_is_no_run(tide: Tide, runs: Path, tmp_path: Path) -> None:
    refused(tide("report", tmp_path / "none"), 2, tmp_path / "none", "tide train --out")
    refused(tide("report", runs / "ce", "--baseline", runs / "data"), 2, runs / "data", "train_config.json")
    refused(tide("report", runs / "ce", "--out", tmp_path), 2, "--out", "is a folder")
    (tmp_path / "train_config.json").write_text('{"config": {"steps": 3}, "objective": {"terms": [1]}}')
    with pytest.raises(UsageError, match="no training run"):
        read_run(tmp_path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(browser: Chromium, runs: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Every figure is drawn with its lines, inside the window, which never scrolls sideways; on a phone the
    baseline's texts stand below. Nothing is fetched, no script complains."""
    page = write_page(tmp_path / "r.html", read_run(runs / "tidal"), read_run(runs / "ce"))
    browser.open(page, width=width, dark=dark)
    browser.wait(f"document.querySelectorAll('.plot .main-svg').length >= {len(TITLES)}")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    drawn = browser.run(
        "[...document.querySelectorAll('.plot')]"
        ".map(plot => plot.querySelectorAll('.scatterlayer .js-line').length)"
    )
    assert drawn == [2, 10, 4, 1, 1, 1, 2, 2, 2, 2]
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == dark
    boxes = browser.run(
        "[...document.querySelectorAll('details[open] .beside:nth-of-type(2) > div')]"
        ".map(d => { const b = d.getBoundingClientRect(); return [b.left, b.top, b.right]; })"
    )
    (left, top, _), (beside, below, right) = boxes
    assert (beside > left and below == top) == (width == 1280)
    assert right <= width
    picture = browser.screenshot(tmp_path / "page.png")
    assert len(picture) > 30_000
