"""The HTML report: what it must hold (the data given), and what it must not (loads, unescaped names)."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shards.errors import UsageError
from tools.pages.report import Bar, Column, Series, Table, bar_chart, interval, line_chart, write_report

HOSTILE = "</script><script>alert(1)</script><b>&"


class Page(HTMLParser):
    """Text outside scripts, scripts by id, and every attribute that could load something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self._in: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]
        if tag == "script":
            self.scripts.append("")
        if tag in ("script", "style"):
            self._in.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._in.pop()

    def handle_data(self, data):
        if self._in[-1:] == ["script"]:
            self.scripts[-1] += data
        elif not self._in:
            self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    table = Table(
        title="Arms",
        columns=(Column(label="arm", align="left"), Column(label="bits per byte"), Column(label="rows")),
        rows=(("kl", 2.34567, 12345), (HOSTILE, None, -3), ("nan", float("nan"), 0)),
        note="lower is better",
    )
    ts = (0.25, 0.75)
    lines = line_chart(
        "By timestep",
        [Series(name=HOSTILE, x=ts, y=(1.125, float("inf")), low=(1.0, 1.5), high=(1.25, 2.5))],
        x_label="t",
        y_label="bits per byte",
    )
    bars = bar_chart("Difference", [Bar(name="kl", value=-0.5, low=-0.75, high=-0.125)], x_label="bits")
    write_report(
        path,
        title="Run <1>",
        intro="first\n\nsecond",
        tables=[table],
        figures=[lines, bars],
        notes=[HOSTILE],
    )
    return Page(path.read_text(encoding="utf-8"))


def figures(page: Page) -> list[dict]:
    return json.loads(page.scripts[1])


def test_nothing_is_loaded(page: Page) -> None:
    """No element refers to another file, and the policy forbids what scripts might try."""
    assert page.loads == []
    assert "default-src 'none'" in page.policy
    assert "plotly.js" in page.scripts[0][:200]
    assert len(page.scripts) == 3  # plotly once, data, drawing


def test_numbers_arrive(page: Page) -> None:
    """Tables show rounded numbers, and dashes for what is missing; figures keep full precision."""
    for shown in ("2.3457", "12,345", "−3", "–", "lower is better", "Run <1>", "first", "second"):
        assert shown in page.text, shown
    band, line = figures(page)[0]["data"]
    assert line["y"] == [1.125, None]  # not finite: a gap, not a broken page
    assert band["y"] == [1.25, 2.5, 1.5, 1.0]
    (bar,) = figures(page)[1]["data"]
    assert bar["x"] == [-0.5]
    assert bar["error_x"]["array"] == [0.375]
    assert bar["error_x"]["arrayminus"] == [0.25]


def test_names_cannot_become_markup(page: Page) -> None:
    """A hostile name stays text: in the page, the JSON script, and Plotly, which reads some HTML itself."""
    assert page.text.count(HOSTILE) == 2
    assert "b" not in page.tags
    assert "<" not in figures(page)[0]["data"][1]["name"]
    assert "alert" not in page.scripts[2]


def test_rows_must_fit_their_columns() -> None:
    with pytest.raises(ValueError, match="1 columns, row of 2"):
        Table(title="x", columns=(Column(label="a"),), rows=((1, 2),))


def test_interval_uses_a_true_minus_sign() -> None:
    assert interval(-0.5, -0.75, 0.25, digits=2) == "−0.50 [−0.75, 0.25]"


def test_missing_plotly_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install 'tide\[report\]'"):
        write_report(tmp_path / "r.html", title="", intro="")
    assert list(tmp_path.iterdir()) == []
