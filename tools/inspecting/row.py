"""`tide inspect --row`: one view of one sample on the terminal.

State is told by marks as well as by colour, so that nothing is lost without it. A narrow terminal gets lines
that wrap where a wide one has tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from tools.inspecting.text import NEWLINE, TokenTexts, visible
from tools.inspecting.view import HALF_A, HALF_B, MASKED, PROMPT, SHOWN, SILENT, Asked, Chunk, View
from tools.tables import shown

WIDE = 90
"""Columns from which on there are tables."""
MARKS = {HALF_A: "A", HALF_B: "B", MASKED: "M", SILENT: "–"}
STYLES = {
    PROMPT: "dim",
    SHOWN: "",
    HALF_A: "bold cyan",
    HALF_B: "bold magenta",
    MASKED: "bold green",
    SILENT: "yellow",
}
MEANINGS = {
    PROMPT: "prompt, never masked",
    SHOWN: "shown",
    HALF_A: "masked, half A",
    HALF_B: "masked, half B",
    MASKED: "masked",
    SILENT: "masked, no target",
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as a terminal shows it."""

    view: View
    texts: TokenTexts
    lower: bool
    """The entropies are lower bounds."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        wide, view = options.max_width >= WIDE, self.view
        yield self._head()
        yield self._legend()
        yield Text()
        yield self._flow()
        yield Text()
        if not view.row.masked.any():
            yield Text("Nothing is masked in this view.")
        if view.asked:
            yield self._positions() if wide else self._position_lines()
        near = [c for c in view.chunks if view.row.maskable[c.start : c.start + c.length].any()]
        if near:
            yield self._chunks(near) if wide else self._chunk_lines(near)
        if prompt := len(view.chunks) - len(near):
            yield Text(f"{prompt} further chunks lie in the prompt alone.")

    def _head(self) -> Text:
        row = self.view.row
        head = Text()
        head.append(f"sample {visible(row.sample_id)}, view {row.view}, {row.split}", "bold")
        head.append(
            f"\nt = {row.t:.4f}; {row.real_length} tokens and {len(row.input_ids) - row.real_length} of "
            f"filling, {int(row.maskable.sum())} maskable, {int(row.masked.sum())} masked\n"
        )
        return head

    def _legend(self) -> Text:
        legend = Text()
        for state in STYLES:
            if state in self.view.states:
                mark = f"‹word›{MARKS[state]} " if state in MARKS else "word "
                legend.append(mark, STYLES[state])
                legend.append(f"{MEANINGS[state]}   ")
        return legend

    def _flow(self) -> Text:
        flow = Text()
        for token, state in zip(self.view.row.input_ids.tolist(), self.view.states):
            word = visible(self.texts[token])
            if self.texts.tokenizer is None:
                word += " "
            if state in MARKS:
                ending = "\n" if word.endswith(NEWLINE) else ""
                flow.append(f"‹{word}›{MARKS[state]}{ending}", STYLES[state])
            else:
                flow.append(word.replace(NEWLINE, f"{NEWLINE}\n"), STYLES[state])
        return flow

    def _positions(self) -> Table:
        grid = _grid("Masked positions")
        for label in ("at", "half" if HALF_A in self.view.states or HALF_B in self.view.states else ""):
            grid.add_column(label, justify="right" if label == "at" else "left")
        grid.add_column("true token", overflow="fold")
        for label in ("its p", "rank", "entropy ≥" if self.lower else "entropy"):
            grid.add_column(label, justify="right")
        grid.add_column("the teacher's top 5", overflow="fold")
        for a in self.view.asked:
            values = shown(a.p, 3), shown(a.rank, 0), shown(a.entropy, 2)
            true = Text(self._quoted(a.token), STYLES[a.state])
            grid.add_row(str(a.position), self._mark(a.state), true, *values, self._top(a))
        return grid

    def _position_lines(self) -> Text:
        out = Text().append("Masked positions\n", "italic")
        for a in self.view.asked:
            out.append(f"{a.position} ").append_text(self._mark(a.state)).append(" ")
            out.append(self._quoted(a.token), STYLES[a.state])
            bound = "≥ " if self.lower else ""
            out.append(f" p {shown(a.p, 3)}, rank {shown(a.rank, 0)}, entropy {bound}{a.entropy:.2f}\n    ")
            out.append_text(self._top(a)).append("\n")
        return out

    def _top(self, a: Asked) -> Text:
        top = Text()
        for token, p in a.top:
            top.append(f"{self._quoted(token)} ", STYLES[a.state] if token == a.token else "")
            top.append(f"{p:.2f}  ", "dim")
        return top

    def _chunks(self, chunks: list[Chunk]) -> Table:
        grid = _grid("Chunks: the same bytes in both tokenisations")
        grid.add_column("at", justify="right")
        grid.add_column("student's text", overflow="fold")
        known = any(c.teacher_texts for c in chunks)
        if known:
            grid.add_column("teacher's text", overflow="fold")
        for label in ("student tokens", "teacher tokens", "log-prob", "p"):
            grid.add_column(label, justify="right")
        grid.add_column("state", overflow="fold")
        for c in chunks:
            numbers = str(c.length), str(c.teacher_length), shown(c.logp, 3), shown(_p(c), 3)
            sides = [self._text(c), *([self._theirs(c)] if known else [])]
            grid.add_row(str(c.start), *sides, *numbers, self._state(c))
        return grid

    def _chunk_lines(self, chunks: list[Chunk]) -> Text:
        out = Text().append("Chunks: the same bytes in both tokenisations\n", "italic")
        for c in chunks:
            out.append(f"{c.start} ").append_text(self._text(c))
            out.append(f" {c.length} student, {c.teacher_length} teacher tokens")
            if c.teacher_texts:
                out.append(" ").append_text(self._theirs(c))
            out.append(", ")
            if c.logp is not None:
                out.append(f"log-prob {shown(c.logp, 3)}, p {shown(_p(c), 3)}, ")
            out.append_text(self._state(c)).append("\n")
        return out

    def _text(self, c: Chunk) -> Text:
        ids = self.view.row.input_ids[c.start : c.start + c.length].tolist()
        return Text(" ".join(map(self._quoted, ids)), STYLES[c.state])

    def _theirs(self, c: Chunk) -> Text:
        return Text(" ".join(f"“{visible(t)}”" for t in c.teacher_texts or ()), STYLES[c.state])

    def _state(self, c: Chunk) -> Text:
        active = "" if c.state == SHOWN else ", active" if c.active else ", not active"
        state = self._mark(c.state)
        return (state.append(" ") if state.plain else state).append(MEANINGS[c.state] + active)

    def _mark(self, state: str) -> Text:
        return Text(MARKS.get(state, ""), STYLES[state])

    def _quoted(self, token: int) -> str:
        return f"“{visible(self.texts[token])}”" if self.texts.tokenizer else self.texts[token]


def _grid(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)


def _p(chunk: Chunk) -> float | None:
    return None if chunk.logp is None else math.exp(chunk.logp)
