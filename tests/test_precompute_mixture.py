"""Mixtures: the language of `--corpus`, the order of rows by weight, filters, and one identity over all."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.corpus import Corpus, open_corpus
from precompute.mixture import Filter, Term, interleave, parse_mixture
from precompute.prepare import sample_id_of
from precompute.sample import Message
from shards.errors import CorpusError, UsageError


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def texts(corpus: Corpus) -> list[str]:
    return [c.messages[-1].content for c in corpus]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three files of one name, of 60, 30 and 5 rows."""
    sizes = {"a": 60, "b": 30, "c": 5}
    return tuple(  # type: ignore[return-value]
        write(tmp_path / k / "rows.jsonl", [{"text": f"{k}{i}"} for i in range(n)]) for k, n in sizes.items()
    )


def test_the_papers_mixture() -> None:
    paper = (
        "allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk+"
        "OpenCoder-LLM/opc-sft-stage1[lang:python]+OpenCoder-LLM/opc-sft-stage2[lang:python]"
    )
    python = (Filter("lang", ("python",)),)
    assert parse_mixture(paper) == [
        Term("allenai/tulu-3-sft-mixture"),
        Term("HuggingFaceTB/smoltalk"),
        Term("OpenCoder-LLM/opc-sft-stage1", filters=python),
        Term("OpenCoder-LLM/opc-sft-stage2", filters=python),
    ]


def test_every_part_of_a_term() -> None:
    spec = "0.5*org/name:all#test[lang:c++|C, kind:chat] + builtin:stdlib[group:json] + 2*x"
    terms = parse_mixture(spec)
    assert terms == [
        Term("org/name", 0.5, "all", "test", (Filter("lang", ("c++", "C")), Filter("kind", ("chat",)))),
        Term("builtin:stdlib", filters=(Filter("group", ("json",)),)),
        Term("x", 2.0),
    ]
    written = "+".join(t.written(t.name) for t in terms)
    assert written == "0.5*org/name:all#test[lang:c++|C,kind:chat]+builtin:stdlib[group:json]+2*x"
    assert parse_mixture(written) == terms


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    """Whatever characters they have: in whole, as a term, and behind a weight."""
    odd = write(tmp_path / "c++ [old]" / "2*a:b#c.jsonl", [{"text": "odd"}])
    plain = write(tmp_path / "x.jsonl", [{"text": "plain"}])
    assert parse_mixture(str(odd)) == [Term(str(odd))]
    hashed = write(tmp_path / "1*a:b#c.jsonl", [{"text": "hashed"}])
    assert parse_mixture(f"3*{hashed}+{plain}") == [Term(str(hashed), 3.0), Term(str(plain))]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("a++b", "empty term"),
        ("", "empty term"),
        ("0*a+b", "positive, got 0"),
        ("a[lang]", "'lang'"),
        ("a[lang:]", "'lang:'"),
        ("a[:x]", "':x'"),
        ("a[lang:x", "'a[lang:x'"),
        ("a[]", "'a[]'"),
        ("a#s:c", "'a#s:c'"),
        ("-1*a", "-1"),
    ],
)
def test_what_cannot_be_read_is_named(spec: str, words: str) -> None:
    if spec == "-1*a":  # no weight: a strange name, which then does not exist
        with pytest.raises(CorpusError, match=r"-1\*a"):
            open_corpus(spec)
        return
    with pytest.raises(UsageError) as error:
        parse_mixture(spec)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
)
def test_interleaving(lengths: list[int], weights: list[float]) -> None:
    """Every item once, each stream in its own order; and as long as none has ended, no stream is ever an item
    and a half away from its share."""
    weights = weights[: len(lengths)]
    given_out = list(interleave([iter([(s, i) for i in range(n)]) for s, n in enumerate(lengths)], weights))
    assert sorted(given_out) == [(s, i) for s, n in enumerate(lengths) for i in range(n)]
    for s in range(len(lengths)):
        assert all(a < b for a, b in pairwise(i for stream, i in given_out if stream == s))
    taken = [0] * len(lengths)
    for n, (stream, _) in enumerate(given_out):
        if any(k == length for k, length in zip(taken, lengths)):
            break
        assert all(abs(k - n * w / sum(weights)) < 1.5 for k, w in zip(taken, weights))
        taken[stream] += 1


def test_weights_decide_the_first_rows_and_lose_none(files: tuple[Path, Path, Path]) -> None:
    a, b, c = files
    spec = f"2*{a}+{b}+0.5*{c}"
    whole = texts(open_corpus(spec))
    assert len(whole) == len(set(whole)) == 95
    assert Counter(t[0] for t in whole[:35]) == {"a": 20, "b": 10, "c": 5}
    assert Counter(t[0] for t in whole[:7]) == {"a": 4, "b": 2, "c": 1}
    for limit in (1, 7, 50, 95, 200):
        assert texts(open_corpus(spec, limit=limit)) == whole[:limit]
    assert Counter(t[0] for t in texts(open_corpus(f"{a}+{b}"))[:40]) == {"a": 20, "b": 20}


def test_one_identity(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Equal wherever the files lie and whatever the limit; another for other content, weights, filters or
    order. Samples of equal files in different places are told apart."""
    a, b, c = map(str, files)
    mixed = open_corpus(f"{a}+{b}")
    assert mixed.fingerprint == open_corpus(f"{a}+{b}", limit=3).fingerprint
    others = (a, f"{a}+{c}", f"2*{a}+{b}", f"{b}+{a}", f"{a}[text:a1]+{b}", f"{a}[text:a2]+{b}")
    assert len({mixed.fingerprint, *(open_corpus(s).fingerprint for s in others)}) == len(others) + 1
    assert mixed.name == "rows.jsonl+rows.jsonl"
    same = write(tmp_path / "d" / "rows.jsonl", [{"text": "a0"}, {"text": "b1"}])
    ids = [sample_id_of(x) for x in open_corpus(f"{a}+{same}")]
    assert len(set(ids)) == len(ids)
    with pytest.raises(UsageError, match="same rows as another term"):
        list(open_corpus(f"{a}+2*{a}"))


def test_filters(tmp_path: Path) -> None:
    """By field, letter case apart, numbers and booleans as JSON writes them; all must pass. What a filter
    leaves out is not an unusable row."""
    rows: list[dict[str, object]] = [
        {"prompt": "1", "completion": "x", "lang": "Python", "score": 4, "good": True},
        {"prompt": "2", "completion": "x", "lang": "c", "score": 4, "good": False},
        {"prompt": "3", "completion": "x", "lang": "python", "score": 5, "good": True},
        {"prompt": "4", "lang": "python"},
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def found(filters: str) -> str:
        return "".join(c.messages[0].content for c in open_corpus(f"{path}[{filters}]"))

    assert found("lang:python") == "13"
    assert found("lang:python|c,score:4") == "12"
    assert found("good:true") == "13"
    corpus = open_corpus(f"{path}[lang:c]")
    assert list(corpus)
    assert corpus.skipped.total() == 1
    with pytest.raises(CorpusError, match=r"no row passes the filter; the first has fields completion, good"):
        found("language:python")


def test_language_without_a_field_is_looked_for_in_the_answer(tmp_path: Path) -> None:
    """OpenCoder's data has no column `lang`: the paper's loader looks for the word in the answer."""
    rows: list[dict[str, object]] = [
        {"instruction": "sort in python", "output": "```python\nsorted(x)\n```"},
        {"instruction": "sort in python", "output": "I cannot."},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "use python"}]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = [c.messages[-1] for c in open_corpus(f"{path}[lang:python]")]
    assert found == [Message("assistant", "```python\nsorted(x)\n```"), Message("assistant", "use python")]


def test_filter_columns_of_parquet(tmp_path: Path) -> None:
    """A column that no shape needs is read for its filter."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "kind": ["x", "y"], "more": [1, 2]}), tmp_path / "a.parquet")
    assert texts(open_corpus(f"{tmp_path / 'a.parquet'}[kind:y]")) == ["b"]


def test_skips_of_all_terms_are_counted(tmp_path: Path) -> None:
    for k in "ab":
        write(tmp_path / k / "rows.jsonl", [{"text": f"{k}0"}, {"text": 1}, {"text": f"{k}1"}])
    corpus = open_corpus(f"{tmp_path / 'a'}+{tmp_path / 'b'}")
    assert texts(corpus) == ["a0", "b0", "a1", "b1"]
    assert corpus.skipped == {"field text must be text, found int": 2}
    assert corpus.licence is None
    stdlib = open_corpus(f"builtin:stdlib[group:json]+{tmp_path / 'a'}", limit=4)
    assert stdlib.licence == "builtin:stdlib: PSF-2.0; a: unknown"
    assert {c.group for c in stdlib} == {"json", None}
