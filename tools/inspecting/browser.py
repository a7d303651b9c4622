"""The page's sample browser: a few dozen samples with all that was said of their masked tokens.

Everything from the dataset travels as JSON and enters the page as text. A hovered, focused or tapped token is
explained below the text; the arrow keys go from one masked token to the next.
"""

from __future__ import annotations

from typing import Any

from shards.reader import LogitDataset
from shards.row import Row
from tools.inspecting.sample import At, Place, spread, twin
from tools.inspecting.targets import Teller
from tools.inspecting.text import TokenTexts
from tools.inspecting.view import View, view_of
from tools.inspecting.widget import MARKUP, SCRIPT, STYLE
from tools.pages.report import Widget

SAMPLES = 24
BATCHES = 4
"""Record batches of view 0 that samples are taken from; more where they hold too few rows."""
VIEWS = 4
"""Most views of a sample."""
READ_BYTES = 32 << 20
"""Compressed bytes after which no further record batch is read."""


def browsed(dataset: LogitDataset) -> list[list[Row]]:
    """Samples from all over the dataset, each with its first views.

    Raises: see `LogitDataset.read`.
    """
    shards = dataset.manifest.shards
    batches = [(s, b) for s, shard in enumerate(shards) for b, r in enumerate(shard.batches) if r.view == 0]
    views = min(VIEWS, dataset.manifest.noise.views)
    picked: list[At] = []
    rows = size = 0
    for i in spread(len(batches)):
        s, b = batches[i]
        if picked and (size > READ_BYTES or (len(picked) >= BATCHES and rows >= SAMPLES)):
            break
        picked.append(batches[i])
        rows += shards[s].batches[b].rows
        size += views * shards[s].batches[b].length
    wanted = dict.fromkeys(picked, 0)
    while sum(wanted.values()) < min(SAMPLES, rows):  # one more of each in turn, as far as it has them
        for s, b in picked:
            wanted[s, b] += wanted[s, b] < shards[s].batches[b].rows and sum(wanted.values()) < SAMPLES
    return [rows for at in sorted(picked) for rows in _samples(dataset, at, wanted[at], views)]


def _samples(dataset: LogitDataset, at: At, most: int, views: int) -> list[list[Row]]:
    """Samples of one record batch of view 0, and their other views."""
    opened = {at: dataset.read(*at)}
    order = spread(len(opened[at]))
    found = []
    for i in sorted(next(order) for _ in range(min(most, len(opened[at])))):
        rows = [opened[at][i]]
        for view in range(1, views):
            place = twin(dataset, Place(at, i), view)
            if place is None:
                continue
            if place.at not in opened:
                opened[place.at] = dataset.read(*place.at)
            row = opened[place.at][place.index]
            if row.sample_id == rows[0].sample_id:
                rows.append(row)
        found.append(rows)
    return found


def browser(
    dataset: LogitDataset, samples: list[list[Row]], texts: TokenTexts, teacher: TokenTexts | None = None
) -> Widget:
    """
    Args:
        samples: views of each. texts, teacher: by the two tokenizers.

    Raises: ShardError: see `Teller.at`.
    """
    teller, compdemo = Teller(dataset), dataset.manifest.noise.compdemo
    used: dict[int, str] = {}

    def text(token: int) -> int:
        if token not in used:
            used[token] = texts[token]
        return token

    def seen(row: Row) -> View:
        return view_of(row, teller, compdemo=compdemo, student=texts, teacher=teacher)

    data = [_sample([seen(row) for row in rows], text) for rows in samples]
    return Widget(
        title="Samples",
        markup=MARKUP,
        script=SCRIPT,
        style=STYLE,
        data={
            "samples": data,
            "texts": used,
            "kind": dataset.manifest.kind,
            "lower": dataset.manifest.codec.name == "sparse",
            "note": texts.why_not,
        },
    )


def _sample(views: list[View], text: Any) -> dict[str, Any]:
    row = views[0].row
    return {
        "id": row.sample_id,
        "split": row.split,
        "ids": [text(i) for i in row.input_ids.tolist()],
        "real": row.real_length,
        "views": [
            {
                "view": v.row.view,
                "t": round(v.row.t, 4),
                "states": v.states,
                "asked": {
                    str(a.position): {
                        "p": None if a.p is None else round(a.p, 5),
                        "rank": a.rank,
                        "h": round(a.entropy, 3),
                        "top": [[text(i), round(p, 5)] for i, p in a.top],
                    }
                    for a in v.asked
                },
                "chunks": [
                    [
                        c.start,
                        c.length,
                        c.teacher_length,
                        c.state,
                        c.active,
                        None if c.logp is None else round(c.logp, 4),
                        c.teacher_texts,
                    ]
                    for c in v.chunks
                ],
            }
            for v in views
        ],
    }
