"""The page of `tide inspect --html` in a headless browser: what is drawn, that it fits, that its sample
browser works by mouse and keyboard, and that a dataset's texts stay texts."""

import html
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Chromium, chromium
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.schema import Kind
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from student.tokenizer import load_tokenizer, tokenizer_hash
from tools.cli import app
from tools.inspecting.sample import all_batches, sample
from tools.inspecting.stats import by_t, positions_of
from tools.pages.report import Columns, column_chart, heatmap

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><!--"
NOISE, CODEC = NoiseConfig(views=3), SparseCodec(cap=12)
SHARED = [
    "Samples", "Timesteps", "Probability of the true token against t",
    "Probability of the most probable token against t", "Entropy against t", "Entries kept per position",
    "Mass outside the head", "Teacher's share λ_t of the interpolated target", "Bytes by column",
]  # fmt: skip
CROSS = [
    "Samples", "Timesteps", "Probability of the chunk against t", "Log-prob per teacher token against t",
    "Chunk lengths", "Chunk probabilities", "Teacher's share λ_t of the interpolated target",
    "Bytes by column",
]  # fmt: skip
NO_OVERFLOW = "document.documentElement.scrollWidth <= window.innerWidth"
DRAWN = "[...document.querySelectorAll('.plot')].every((p) => p.querySelector('.main-svg'))"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """304 words, every tenth of which would be markup if it could."""
    words = {(f"{HOSTILE}{i}" if i % 10 == 0 else f"word{i}"): i for i in range(304)}
    names = {i: word for word, i in words.items()}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token=names[1])),
        eos_token=names[302],
        pad_token=names[301],
        mask_token=names[303],
    ).save_pretrained(folder)
    return folder


def make(out: Path, tokenizer: Path, kind: Kind, *, compdemo: bool) -> Path:
    noise = replace(NOISE, unit="chunk" if kind == "cross" else "token", compdemo=compdemo)
    config = synthetic_config(noise, CODEC, shared_vocab_size=300 if kind == "shared" else None)
    config["student"] |= {"tokenizer_hash": tokenizer_hash(load_tokenizer(tokenizer)), "max_length": 40}
    config["teacher"] |= {"name": HOSTILE, "attention": HOSTILE}
    config["source"] |= {"spec": HOSTILE, "licence": "\u202e"}
    with DatasetWriter(out, kind, config) as writer:
        rows = list(synthetic_rows(0, 32, kind=kind, noise=noise, codec=CODEC, max_length=40))
        writer.write_part(0, 0, 32, rows, {"dropped": {HOSTILE: 1}})
        writer.finish()
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """Datasets and their pages by kind; the shared one has another without CompDemo beside it."""
    root = tmp_path_factory.mktemp("inspect")
    found = {}
    for kind in ("shared", "cross"):
        found[kind] = make(root / kind, tokenizer, kind, compdemo=True)  # type: ignore[arg-type]
    found["plain"] = make(root / "plain", tokenizer, "shared", compdemo=False)
    for kind, more in (("shared", ["--beside", str(found["plain"])]), ("cross", []), ("plain", [])):
        found[f"{kind}.html"] = root / "pages" / f"{kind}.html"
        command = [
            "inspect",
            str(found[kind]),
            "--html",
            str(found[f"{kind}.html"]),
            "--tokenizer",
            str(tokenizer),
        ]
        app([*command, *more], standalone_mode=False)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def pixels(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize(
    ("kind", "width", "dark"),
    [("shared", 400, True), ("shared", 1280, False), ("cross", 400, False), ("cross", 1280, True)],
)
def test_every_figure_is_drawn_and_the_page_fits(
    browser: Chromium, made: dict[str, Path], tmp_path: Path, kind: str, width: int, dark: bool
) -> None:
    browser.open(made[f"{kind}.html"], width=width, dark=dark)
    browser.wait(DRAWN)
    headings = browser.run("[...document.querySelectorAll('h2')].map((e) => e.textContent)")
    wanted = SHARED if kind == "shared" else CROSS
    assert [h for h in headings if h in wanted] == wanted
    assert browser.run("document.querySelectorAll('.plot .main-svg').length") >= len(wanted) - 1
    assert browser.run(NO_OVERFLOW), browser.run("document.documentElement.scrollWidth")
    inside = "[...document.querySelectorAll('section, .plot, .text, select')].every((e) => "
    assert browser.run(f"{inside}e.getBoundingClientRect().right <= {width})")
    dark_page = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark_page == dark
    size = pixels(browser.screenshot(tmp_path / "page.png"))
    assert size == (width, browser.run("document.documentElement.scrollHeight"))
    assert browser.complaints == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in browser.requests) == 1


def test_hostile_texts_stay_texts(browser: Chromium, made: dict[str, Path]) -> None:
    """Token texts, teacher's name, licence and reasons that are markup: shown letter by letter, never run."""
    browser.open(made["shared.html"], width=1280)
    browser.wait(DRAWN)
    assert browser.run("document.title") == "Logit dataset shared"
    assert browser.run("document.querySelectorAll('img').length") == 0
    shown = browser.run("document.body.innerText")
    assert shown.count(HOSTILE) >= 3  # teacher, attention, corpus
    assert HOSTILE in browser.run("document.querySelector('.text').textContent")
    options = browser.run("document.querySelector('.pick').textContent")
    assert "</script><img" in options
    markup = made["shared.html"].read_text(encoding="utf-8")
    assert HOSTILE not in markup
    assert "<img" not in markup.split("plotly.js")[0]
    assert browser.complaints == []


def embedded(page: Path) -> dict[str, Any]:
    markup = page.read_text(encoding="utf-8")
    return json.loads(markup.split('id="widget-data-0">')[1].split("</script>")[0])


def test_the_browser_shows_another_sample_and_view(browser: Chromium, made: dict[str, Path]) -> None:
    """What is on the page against the rows of the dataset."""
    dataset = LogitDataset(made["shared"])
    rows = {(r.sample_id, r.view): r for at in all_batches(dataset) for r in dataset.read(*at)}
    browser.open(made["shared.html"], width=1280)

    def about() -> tuple[str, int, list[int], list[str]]:
        text = browser.run("document.querySelector('.about').textContent")
        view = browser.run("document.querySelector('.views input:checked').parentElement.textContent")
        marked = browser.run("[...document.querySelectorAll('.text [data-mark]')].map((e) => +e.dataset.at)")
        marks = browser.run("[...document.querySelectorAll('.text [data-mark]')].map((e) => e.dataset.mark)")
        return text.split()[1].rstrip(","), int(view.split()[0]), marked, marks

    data = embedded(made["shared.html"])
    assert len(data["samples"]) == 24
    seen = set()
    for click in (None, ".on", ".on", ".back", ".views input:not(:checked)"):
        if click:
            browser.run(f"document.querySelector('#widget-0 {click}').click()")
        sample_id, view, marked, marks = about()
        row = rows[sample_id, view]
        assert marked == np.flatnonzero(row.masked).tolist()
        assert row.positions is not None
        halves = dict(
            zip(row.positions.positions.tolist(), np.where(row.positions.half_a, "A", "B").tolist())
        )
        assert marks == [halves.get(i, "–") for i in marked]
        seen.add((sample_id, view))
    assert len(seen) == 4
    pick = "document.querySelector('.pick')"
    browser.run(f"{pick}.value = 7; {pick}.dispatchEvent(new Event('change'))")
    assert about()[0] == data["samples"][7]["id"]


def test_the_browser_is_usable_by_keyboard(browser: Chromium, made: dict[str, Path]) -> None:
    """Arrow keys go from one masked token to the next, and the panel says what was stored of each."""
    browser.open(made["shared.html"], width=400)
    data = embedded(made["shared.html"])
    view = next(v for v in data["samples"][0]["views"] if len(v["asked"]) > 2)
    browser.run(
        f"document.querySelector('.views input[value=\"{data['samples'][0]['views'].index(view)}\"]').click()"
    )
    browser.run("document.querySelector('.text [tabindex=\"0\"]').focus()")
    focused = "+document.activeElement.dataset.at"
    masked = [i for i, s in enumerate(view["states"]) if s in ("A", "B", "masked", "silent")]
    assert browser.run(focused) == masked[0]
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        browser.press(key)
        assert browser.run(focused) == masked[place]
        said = browser.run("document.querySelector('.says').innerText")
        assert f"position {masked[place]}:" in said
        asked = view["asked"].get(str(masked[place]))
        if asked and asked["p"] is not None and asked["p"] >= 0.0005:
            assert f"{100 * asked['p']:.1f} %" in said
        if asked:
            tops = browser.run("[...document.querySelectorAll('.says .name')].map((e) => e.textContent)")
            texts = [data["texts"][str(token)] for token, _ in asked["top"]]
            assert [t.removesuffix(" ✓") for t in tops] == texts
    browser.run("document.querySelector('.cover input').click()")
    colour = "getComputedStyle(document.querySelector('.text [data-mark] .word')).color"
    assert browser.run(colour) == "rgba(0, 0, 0, 0)"


def test_chunks_are_explained(browser: Chromium, made: dict[str, Path]) -> None:
    browser.open(made["cross.html"], width=1280)
    data = embedded(made["cross.html"])
    k, v, chunk = next(
        (k, v, c)
        for k, s in enumerate(data["samples"])
        for v, view in enumerate(s["views"])
        for c in view["chunks"]
        if c[4]
    )
    pick = "document.querySelector('.pick')"
    browser.run(f"{pick}.value = {k}; {pick}.dispatchEvent(new Event('change'))")
    browser.run(f"document.querySelector('.views input[value=\"{v}\"]').click()")
    browser.run(f"document.querySelector('.text [data-at=\"{chunk[0]}\"]').click()")
    said = browser.run("document.querySelector('.says').innerText")
    assert f"{chunk[1]} student" in said
    assert f"{chunk[2]} teacher" in said
    assert f"{chunk[5]:.3f} nats" in said


def figures(page: Path) -> dict[str, Any]:
    """Heading -> traces, of the page's own data."""
    markup = page.read_text(encoding="utf-8")
    data = json.loads(markup.split('id="figures">')[1].split("</script>")[0])
    titles = [
        part.split("</h2>")[0]
        for part in markup.split("<h2>")[1:]
        if "<figure>" in part.split("</h2>")[1][:20]
    ]
    return {html.unescape(title): d["data"] for title, d in zip(titles, data)}


def test_the_lines_are_those_of_the_rows(made: dict[str, Path]) -> None:
    """Halves of the dataset with CompDemo and the whole of the one without, each at its own means; the page
    of the latter alone says that it is without."""
    drawn = figures(made["shared.html"])["Entropy against t"]
    lines = {t["name"]: t for t in drawn if t.get("showlegend", True)}
    assert list(lines) == ["with CompDemo, half A", "with CompDemo, half B", "without CompDemo"]
    for name, data in (("with CompDemo, half A", "shared"), ("without CompDemo", "plain")):
        dataset = LogitDataset(made[data])
        p = positions_of(dataset, sample(dataset, 1024, lambda *x: None).rows, lambda *x: None)
        at = p.half_a if data == "shared" else np.ones(len(p.t), bool)
        wanted = by_t("", p.t[at], p.entropy[at], p.sample[at])
        assert lines[name]["y"] == pytest.approx(list(wanted.y))
        assert lines[name]["x"] == pytest.approx(list(wanted.x))
    alone = made["plain.html"].read_text(encoding="utf-8")
    assert "This dataset was made without CompDemo" in alone
    assert "Nothing here is without CompDemo" in made["cross.html"].read_text(encoding="utf-8")
    kept = figures(made["shared.html"])["Entries kept per position"][0]
    assert sum(kept["y"]) == pytest.approx(1)


def test_the_schedule_is_the_chosen_one(made: dict[str, Path], tokenizer: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    how = ["--lambda-initial", "0.2", "--lambda-max", "0.6", "--lambda-decay", "linear", "--rows", "8"]
    app(["inspect", str(made["shared"]), "--html", str(page), *how], standalone_mode=False)
    (z,) = (t["z"] for t in figures(page)["Teacher's share λ_t of the interpolated target"])
    assert z[0][0] == pytest.approx(0.2)
    assert z[0][-1] == pytest.approx(0.6)
    assert z[20][20] == pytest.approx(0.4 * 0.5)  # halfway in both
    assert max(z[-1]) == pytest.approx(0)


def test_figure_kinds_hold_their_data() -> None:
    bars = column_chart(
        "t", [Columns(name="<b>", x=["1", "12+"], y=(0.25, float("nan")))], x_label="", y_label=""
    )
    assert bars.data[0]["y"] == [0.25, None]
    assert "<" not in bars.data[0]["name"]
    assert bars.layout["xaxis"]["type"] == "category"  # else "1" would be a number, and "12+" nowhere
    shown = heatmap("t", [0, 1], [0, 1], [[0, 0.5], [1, float("inf")]], x_label="", y_label="", z_label="")
    assert shown.data[0]["z"] == [[0.0, 0.5], [1.0, None]]
