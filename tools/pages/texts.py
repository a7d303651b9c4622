"""Texts that students wrote during training, prompt by prompt, as a section of a page; all of it escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tools.pages.report import Widget

SHOWN = 6
"""Steps of a prompt that are shown, evenly spread, the first and the last among them."""
STYLE = """
.texts details { border-top: 1px solid var(--rule); padding: 12px 0; }
.texts summary { cursor: pointer; min-height: 32px; font-weight: 600; overflow-wrap: anywhere; }
.texts pre {
  font: .8125rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  margin: 0; padding: 8px 10px; border-radius: 6px; background: var(--stripe);
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
}
.texts h3 { font-size: .875rem; margin: 14px 0 4px; color: var(--quiet); font-weight: 600; }
.texts .beside {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 16px;
}
.texts .empty { color: var(--quiet); font-style: italic; }
"""

Written = Sequence[Mapping[str, Any]]
"""Lines of a run's samples.jsonl."""


def texts_widget(runs: Sequence[tuple[str, Written]]) -> Widget | None:
    """The texts of the first run, and beside them those that the others wrote for the same prompts; None
    where there are none.

    Args:
        runs: name and lines of each.
    """
    by_prompt = [_by_prompt(lines) for _, lines in runs]
    if not by_prompt[0]:
        return None
    parts = []
    for k, (sample, lines) in enumerate(by_prompt[0].items()):
        others = [prompts.get(sample, {}) for prompts in by_prompt[1:]]
        columns = [(name, texts) for (name, _), texts in zip(runs, [lines, *others]) if texts]
        parts.append(_prompt(columns, open_=k == 0))
    about = (
        "What the student wrote for held-out prompts, greedily, before the first step and as training went "
        "on. Beside each prompt: what its sample says there, cut where a completion would be."
    )
    markup = f"<div class=texts><p class=note>{html.escape(about)}</p>{''.join(parts)}</div>"
    return Widget(title="Samples as they improved", markup=markup, script="", style=STYLE, data=None)


def _by_prompt(lines: Written) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Sample id -> step -> line."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(str(line["sample_id"]), {})[int(line["step"])] = line
    return found


def _prompt(columns: Sequence[tuple[str, Mapping[int, Mapping[str, Any]]]], *, open_: bool) -> str:
    """One prompt: itself, the sample's own text, and a row of texts for each step shown."""
    lines = columns[0][1]
    one = next(iter(lines.values()))
    steps = evenly(sorted(lines), SHOWN)
    rows = "".join(
        _beside([(f"step {s:,}, {name}", _at(texts, s)) for name, texts in columns]) for s in steps
    )
    prompt = str(one["prompt"]).strip()
    begin = " ".join(prompt.split())
    title = html.escape(begin if len(begin) <= 90 else f"{begin[:89]}…")
    given = _beside([("prompt", prompt), ("the sample's own text", str(one["answer"]))])
    return f"<details{' open' if open_ else ''}><summary>{title}</summary>{given}{rows}</details>"


def _at(texts: Mapping[int, Mapping[str, Any]], step: int) -> str | None:
    """The text of a step; of the last one before it, where that run wrote at other steps."""
    before = [s for s in texts if s <= step]
    return str(texts[max(before)]["text"]) if before else None


def _beside(cells: Sequence[tuple[str, str | None]]) -> str:
    return f"<div class=beside>{''.join(map(_cell, cells))}</div>"


def _cell(cell: tuple[str, str | None]) -> str:
    label, text = cell
    if text is None or not text.strip():
        shown = f"<pre class=empty>{'nothing' if text is not None else 'not written at this step'}</pre>"
    else:
        shown = f"<pre>{html.escape(text.strip(chr(10)))}</pre>"
    return f"<div><h3>{html.escape(label)}</h3>{shown}</div>"


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
