"""Corpora: row shapes, skipped rows, errors in one line, fingerprints, and the standard library."""

import ast
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from precompute.corpus import PLACES, Corpus, open_corpus
from precompute.sample import Message
from shards.errors import CorpusError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [
    {"messages": CHAT, "group": "g"},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": "add", "input": "", "output": "3"},
    {"prompt": "p", "completion": "c"},
    {"text": "once"},
]
MESSAGES = [
    (Message("user", "q"), Message("assistant", "a")),
    (Message("user", "add\n\n1 2"), Message("assistant", "3")),
    (Message("user", "add"), Message("assistant", "3")),
    (Message("user", "p"), Message("assistant", "c")),
    (Message("text", "once"),),
]


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def one_line(error: pytest.ExceptionInfo[CorpusError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def messages(corpus: Corpus) -> list[tuple[Message, ...]]:
    return [c.messages for c in corpus]


def test_every_row_shape_from_every_kind_of_file(tmp_path: Path) -> None:
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(jsonl(ROWS))
    zipped = tmp_path / "b.jsonl.zst"
    zipped.write_bytes(
        zstandard.compress(jsonl(ROWS[:2])) + zstandard.compress(jsonl(ROWS[2:]))
    )  # two frames
    parquet = tmp_path / "c.parquet"
    pq.write_table(
        pa.Table.from_pylist([{**dict.fromkeys(r for row in ROWS for r in row), **r} for r in ROWS]), parquet
    )
    for path in (plain, zipped, parquet):
        corpus = open_corpus(str(path))
        found = list(corpus)
        assert [c.messages for c in found] == MESSAGES, path.name
        assert [c.index for c in found] == list(range(5))
        assert [c.group for c in found] == ["g", None, None, None, None]
        assert {c.source for c in found} == {path.name}
        assert not corpus.skipped
    folder = open_corpus(str(tmp_path))
    assert messages(folder) == MESSAGES * 3
    assert sorted({c.source for c in folder}) == ["a.jsonl", "b.jsonl.zst", "c.parquet"]


def test_bad_rows_are_skipped_and_counted_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        jsonl(ROWS[:1]),
        b"{broken\n",
        b"\n",
        b'{"question": "q", "reply": "a"}\n',
        b"[1]\n",
        b'{"text": "\xff"}\n',
        b'{"messages": [{"role": "user", "content": null}]}\n',
        b'{"messages": []}\n',
        b'{"prompt": "p"}\n',
        jsonl(ROWS[3:4]),
    ]
    path.write_bytes(b"".join(lines))
    corpus = open_corpus(str(path))
    found = list(corpus)
    assert [c.messages for c in found] == [MESSAGES[0], MESSAGES[3]]
    assert [c.index for c in found] == [0, 9]
    assert corpus.skipped.total() == 7
    assert corpus.skipped_at["found fields question, reply"] == ["a.jsonl:4"]
    assert corpus.skipped_at["not JSON"] == ["a.jsonl:2"]
    assert corpus.skipped_at["not UTF-8"] == ["a.jsonl:6"]
    assert sum(map(len, corpus.skipped_at.values())) == 7
    assert list(corpus) == found, "a second pass starts afresh"
    assert corpus.skipped.total() == 7


def test_limit_streams_and_keeps_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS * 10) + b"{never read\n")
    short = open_corpus(str(path), limit=3)
    assert messages(short) == MESSAGES[:3]
    assert not short.skipped
    assert short.fingerprint == open_corpus(str(path)).fingerprint
    before = short.fingerprint
    path.write_bytes(jsonl(ROWS[:4]))
    assert open_corpus(str(path)).fingerprint != before
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert open_corpus(str(moved)).fingerprint == open_corpus(str(path)).fingerprint
    assert list(open_corpus(str(moved))) == list(open_corpus(str(path))), "ids do not depend on the folder"


def test_wrong_field_everywhere_names_file_line_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + jsonl([{"question": "q", "answer": "a"}] * 3))
    with pytest.raises(CorpusError) as error:
        list(open_corpus(str(path)))
    text = one_line(error)
    for part in (f"{path}:2", "answer, question", "none of 3 rows", "messages | instruction + output"):
        assert part in text
    table = tmp_path / "b.parquet"
    pq.write_table(pa.table({"question": ["q"]}), table)
    with pytest.raises(CorpusError, match=r"b\.parquet:row 1: found fields question"):
        list(open_corpus(str(table)))


def test_every_file_must_have_a_usable_row(tmp_path: Path) -> None:
    """One good file does not hide another that holds something else; an empty one is no harm."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert messages(open_corpus(str(tmp_path))) == MESSAGES
    (tmp_path / "c.jsonl").write_bytes(jsonl([{"question": "q"}] * 2))
    with pytest.raises(CorpusError) as error:
        list(open_corpus(str(tmp_path)))
    assert f"{tmp_path / 'c.jsonl'}:1: found fields question; none of 2 rows" in one_line(error)


def test_places_of_skipped_rows_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": 1}] * 1000 + ROWS))
    corpus = open_corpus(str(tmp_path / "a.jsonl"))
    assert messages(corpus) == MESSAGES
    assert corpus.skipped == {"field text must be text, found int": 1000}
    assert [len(places) for places in corpus.skipped_at.values()] == [PLACES]


def test_missing_empty_unknown_and_damaged(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "void").mkdir()
    whole = zstandard.compress(jsonl(ROWS * 500), level=1)
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"not zstd at all")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for name, part in {
        "missing.jsonl": "no such file",
        "empty.jsonl": "no rows in it",
        "notes.txt": "unknown kind of file",
        "void": "no files in this folder",
        "bad.jsonl.zst": "damaged",
        "bad.parquet": "damaged",
        "cut.jsonl.zst": "damaged",
    }.items():
        with pytest.raises(CorpusError) as error:
            list(open_corpus(str(tmp_path / name)))
        assert part in one_line(error), name
        assert name in one_line(error)
    with pytest.raises(CorpusError, match="there is builtin:stdlib"):
        open_corpus("builtin:nothing")


def test_datasets_library(tmp_path: Path) -> None:
    """A folder in a format of its own goes through `datasets`, offline; an unknown id is one line, not a
    traceback."""
    (tmp_path / "rows.csv").write_text("prompt,completion\np,c\nq,d\n")
    corpus = open_corpus(str(tmp_path))
    assert messages(corpus) == [(Message("user", x), Message("assistant", y)) for x, y in ("pc", "qd")]
    assert messages(open_corpus(str(tmp_path), limit=1)) == messages(corpus)[:1]
    assert corpus.fingerprint == open_corpus(str(tmp_path)).fingerprint
    with pytest.raises(CorpusError) as error:
        open_corpus("nobody/no-such-data-set")
    assert "neither a file or folder here" in one_line(error)


CONFIGS = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: one.csv}
  - {split: extra, path: extra.csv}
- config_name: NAME
  data_files: two.csv
---
"""


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder in the form of a hub repository: two configurations, one with two splits."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i, name in enumerate(("one", "extra", "two")):
        (folder / f"{name}.csv").write_text(f"prompt,completion,lang\np{i},c{i},py\nq{i},d{i},c\n")
    (folder / "README.md").write_text(CONFIGS)
    return folder


def prompts(spec: object) -> list[str]:
    return [c.messages[0].content for c in open_corpus(str(spec))]


def test_configurations_and_splits(data_set: Path) -> None:
    """By name; without one: the default, else `all`, else all of them in turn, each a source of its own."""
    assert prompts(f"{data_set}:one") == ["p0", "q0"]
    assert prompts(f"{data_set}:one#extra") == ["p1", "q1"]
    assert prompts(f"{data_set}:NAME#train") == ["p2", "q2"]
    assert prompts(data_set) == ["p0", "q0", "p2", "q2"]
    assert {c.source for c in open_corpus(str(data_set))} == {"set:one", "set:NAME"}
    for name in ("all", "default"):
        (data_set / "README.md").write_text(CONFIGS.replace("NAME", name))
        assert prompts(data_set) == ["p2", "q2"]
    prints = {open_corpus(f"{data_set}{x}").fingerprint for x in ("", ":one", ":one#extra", ":default")}
    assert len(prints) == 3, "the default configuration is the same as itself by name"
    assert list(open_corpus(str(data_set))) == list(open_corpus(f"{data_set}:default"))
    assert {c.source for c in open_corpus(f"{data_set}:one#extra")} == {"set:one#extra"}
    for spec, part in {
        f"{data_set}:three": "three",
        f"{data_set}:one#test": "no split 'test'; choose one, as in set#train",
        "builtin:stdlib#test": "has no configurations or splits",
    }.items():
        with pytest.raises(CorpusError) as error:
            open_corpus(spec)
        assert part in one_line(error)


def test_a_split_of_a_folder_of_plain_files(tmp_path: Path) -> None:
    """The library's reading of file names; without a split, all files are read."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(
            jsonl([{"messages": [{"role": "user", "content": split}, *CHAT[1:]]}, {"text": split}])
        )
    assert prompts(f"{tmp_path}#test") == ["test"] * 2
    assert prompts(tmp_path) == ["test"] * 2 + ["train"] * 2
    assert messages(open_corpus(f"{tmp_path}#test")) == messages(open_corpus(str(tmp_path)))[:2]


def test_standard_library() -> None:
    """Thousands of functions with a docstring, none from tests, each parsing again into what it was."""
    corpus = open_corpus("builtin:stdlib")
    found = list(corpus)
    assert len(found) > 3000
    assert len({c.messages for c in found}) == len(found)
    assert len({c.group for c in found}) > 50
    assert not {"test", "idlelib", "lib2to3", "turtledemo", "site-packages"} & {c.group for c in found}
    assert corpus.licence == "PSF-2.0"
    assert corpus.fingerprint == open_corpus("builtin:stdlib", limit=5).fingerprint
    dumps = next(c for c in found if c.group == "json" and c.messages[0].content.startswith("def dumps("))
    assert dumps.messages[1].content.startswith("# cached encoder\nif (not skipkeys")
    parsed = 0
    for c in found[::100]:
        stub, body = (m.content for m in c.messages)
        assert ast.get_docstring(ast.parse(stub).body[0])  # type: ignore[arg-type]
        try:
            ast.parse("async def f():\n" + "\n".join(f"    {line}" for line in body.splitlines()))
            parsed += 1
        except SyntaxError:
            pass  # a string of several lines with less indentation than the body
    assert parsed > 0.9 * len(found[::100])
