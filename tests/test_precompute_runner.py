"""The whole of `tide precompute` on real folders: golden models and tokenizers, a small JSONL corpus,
both pipelines."""

import hashlib
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_precompute import OTHER, conversation, write_corpus, write_folders
from transformers import PreTrainedTokenizerFast

from precompute import runner
from precompute.config import PrecomputeConfig
from precompute.runner import Interrupted, precompute
from precompute.teachers.base import TransformersTeacher
from shards.codec import DenseCodec, SparseCodec
from shards.errors import ConfigMismatch, CorpusError, ModelError, TideError, UsageError
from shards.manifest import Manifest
from shards.noise import make_plan
from shards.reader import LogitDataset
from shards.row import DenseTarget, Row, SparseTarget
from tools.commands.precompute import losses


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    root = tmp_path_factory.mktemp("precompute")
    return write_folders(root, golden, student_tokenizer, teacher_tokenizer)


@pytest.fixture
def make(work: Path, tmp_path: Path) -> Callable[..., PrecomputeConfig]:
    def settings(teacher: str = "teacher_dense", **changes: Any) -> PrecomputeConfig:
        given = {
            "teacher": str(work / teacher),
            "student": str(work / "student"),
            "corpus": str(work / "corpus.jsonl"),
            "out": tmp_path / "out",
            "views": 2,
            "block_size": 4,
            "max_length": 64,
            "samples_per_part": 4,
            "device": "cpu",
            "holdout": 0.2,
        }
        return PrecomputeConfig(**{**given, **changes})

    return settings


def rows_of(out: Path) -> dict[tuple[str, int], Row]:
    """Every row, read back and checked (hashes, invariants, noise plan), by (sample, view)."""
    data = LogitDataset(out)
    shards = range(len(data.manifest.shards))
    for s in shards:
        data.check_shard(s)
    rows = [r for s in shards for b in range(len(data.manifest.shards[s].batches)) for r in data.read(s, b)]
    assert len({(r.sample_id, r.view) for r in rows}) == len(rows)
    return {(r.sample_id, r.view): r for r in rows}


def distribution(row: Row) -> np.ndarray:
    assert row.positions is not None
    assert isinstance(row.positions.target, DenseTarget)
    return row.positions.target.logp


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.arrow"))}


@pytest.mark.parametrize(
    "codec", [SparseCodec(cap=16), SparseCodec(cap=3, temperatures=(1.0,)), DenseCodec()]
)
def test_shared(make: Any, codec: Any) -> None:
    """Every masked token has a target (one template: all aligned), in both splits, finite, counts that
    agree."""
    config = make(codec=codec)
    manifest = precompute(config)
    assert manifest.kind == "shared"
    rows = rows_of(config.out)
    assert len(rows) == manifest.totals["rows"] == 11 * 2
    assert {r.split for r in rows.values()} == {"train", "heldout"}
    for row in rows.values():
        assert row.positions is not None
        np.testing.assert_array_equal(row.positions.positions, np.flatnonzero(row.masked))
        assert np.isfinite(row.positions.gold_logp).all()
        if isinstance(codec, SparseCodec):
            assert isinstance(row.positions.target, SparseTarget)
            assert row.positions.target.counts.max(initial=1) <= codec.cap
        else:
            assert isinstance(row.positions.target, DenseTarget)
    assert any(r.positions is not None and r.positions.half_a.any() for r in rows.values())
    assert manifest.report["corpus_rows"] == 11
    assert manifest.report["dropped"] == manifest.report["unaligned_tokens"] == {}


def test_two_templates_align_contents(make: Any) -> None:
    """With another template the end-of-turn and the filling have no counterpart; contents all do."""
    config = make("teacher_other", holdout=0.0)
    manifest = precompute(config)
    assert manifest.kind == "shared"
    assert manifest.report["content_tokens"] > sum(manifest.report["unaligned_tokens"].values())
    assert 0 < manifest.totals["distilled"] < manifest.totals["masked"]
    rows_of(config.out)


def test_cross(make: Any) -> None:
    config = make("teacher_moe")
    manifest = precompute(config)
    assert manifest.kind == "cross"
    rows = rows_of(config.out)
    assert len(rows) == 22
    for row in rows.values():
        assert row.chunks is not None
        assert len(row.chunks.logp) == row.chunks.active.sum()
        assert (np.isfinite(row.chunks.logp) & (row.chunks.logp < 0)).all()
    active = sum(int(r.chunks.active.sum()) for r in rows.values() if r.chunks is not None)
    assert manifest.report["active_chunks"] == manifest.totals["active_chunks"] == active > 0
    assert 0 <= manifest.report["chunks_above_half"] <= active
    assert manifest.config["teacher"]["attention"] == "bidirectional"


@pytest.mark.parametrize("teacher", ["teacher_dense", "teacher_other", "teacher_moe"])
@pytest.mark.parametrize("attention", ["staircase", "bidirectional", "block-causal"])
def test_packing_changes_nothing(make: Any, tmp_path: Path, teacher: str, attention: str) -> None:
    """Many samples and views to a row against rows so short that samples are split: equal to float
    tolerance."""
    targets = []
    for name, row_tokens in (("long", 4096), ("short", 130)):
        config = make(
            teacher,
            out=tmp_path / name,
            row_tokens=row_tokens,
            codec=DenseCodec(),
            teacher_attention=attention,
            limit=5,
        )
        manifest = precompute(config)
        targets.append((rows_of(config.out), manifest.report["teacher_tokens"]))
    (long, tokens), (short, tokens_split) = targets
    assert long.keys() == short.keys()
    assert tokens_split > tokens if attention == "staircase" else tokens_split == tokens
    for key, row in long.items():
        theirs = short[key]
        if row.chunks is not None and theirs.chunks is not None:
            np.testing.assert_allclose(row.chunks.logp, theirs.chunks.logp, atol=5e-5)
        else:
            np.testing.assert_allclose(distribution(row), distribution(theirs), atol=5e-5)


def test_without_compdemo(make: Any) -> None:
    """No halves, and more is hidden at once, so that log-probs differ from those with CompDemo."""
    config = make(compdemo=False, codec=DenseCodec())
    precompute(config)
    rows = rows_of(config.out)
    assert not any(r.positions is not None and r.positions.half_a.any() for r in rows.values())


def test_plan_is_the_one_of_the_seed(make: Any) -> None:
    config = make(seed=7, timesteps="iid")
    manifest = precompute(config)
    for row in rows_of(config.out).values():
        plan = make_plan(manifest.noise, row.sample_id, row.view, row.maskable)
        assert plan.t == np.float32(row.t)
        np.testing.assert_array_equal(plan.masked, row.masked)


class Faulty:
    """A teacher that fails at its n-th row: raises, is interrupted, or says NaN."""

    def __init__(self, teacher: TransformersTeacher, at: int, fault: BaseException | None) -> None:
        self.inner, self.left, self.fault = teacher, at, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, *args: Any) -> torch.Tensor:
        self.left -= 1
        hidden = self.inner.hidden(*args)
        if self.left:
            return hidden
        if self.fault is not None:
            raise self.fault
        hidden[3] = torch.nan
        return hidden


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException | None], None]:
    """Make the next teachers fail at their n-th row (with None: say NaN there)."""
    load = runner.load_teacher

    def set_up(at: int, fault: BaseException | None) -> None:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            return Faulty(load(*args, **kwargs), at, fault)

        monkeypatch.setattr(runner, "load_teacher", faulty)

    return set_up


@pytest.mark.parametrize("teacher", ["teacher_dense", "teacher_moe"])
def test_a_crash_loses_one_part_and_the_same_command_goes_on(
    make: Any, tmp_path: Path, fail: Any, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Resumed equals uninterrupted, byte for byte."""
    whole = precompute(make(teacher, out=tmp_path / "whole"))
    config = make(teacher)
    with monkeypatch.context():
        fail(2, RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            precompute(config)
        assert len(list((config.out / "parts").iterdir())) == 1
        assert not (config.out / "manifest.json").exists()
    monkeypatch.undo()
    calls: list[int] = []
    resumed = precompute(config, lambda done, total, message: calls.append(done))
    assert min(c for c in calls if c) >= 4  # the first part was not made again
    assert digests(config.out) == digests(tmp_path / "whole")
    assert (resumed.identity, resumed.totals) == (whole.identity, whole.totals)
    assert resumed.report == whole.report


@pytest.mark.slow
def test_killed_process(make: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle of the third part, the second perhaps not yet on disk; then the same call."""
    config = make(out=tmp_path / "killed", row_tokens=200)  # several rows to a part
    script = f"""
import os, signal, torch
from pathlib import PosixPath
from precompute.config import PrecomputeConfig
from precompute.runner import precompute
from shards.codec import SparseCodec
torch.set_num_threads(1)
precompute({config!r}, lambda done, *rest: done > 8 and os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (config.out / "parts" / "part-00000.json").exists()
    assert not (config.out / "parts" / "part-00002.json").exists()
    precompute(config)
    precompute(make(out=tmp_path / "whole", row_tokens=200))
    assert digests(config.out) == digests(tmp_path / "whole")


def test_interrupted_says_what_is_done(make: Any, fail: Any) -> None:
    fail(3, KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"finished parts in .*out: 0, 1; the same command goes on") as e:
        precompute(make())
    assert e.value.exit_code == 130


@pytest.mark.parametrize(
    ("teacher", "codec"),
    [("teacher_dense", SparseCodec()), ("teacher_dense", DenseCodec()), ("teacher_moe", SparseCodec())],
    ids=["sparse", "dense", "chunks"],
)
def test_not_finite_names_sample_and_view(
    make: Any, fail: Any, tmp_path: Path, teacher: str, codec: Any
) -> None:
    """The fourth answer of the first packed row is NaN: its sample and view are named, nothing is
    published."""
    settings = {"codec": codec, "holdout": 0.0}
    precompute(make(teacher, out=tmp_path / "good", **settings))
    first_sample = next(iter(LogitDataset(tmp_path / "good").samples("train"))).sample_id
    rows = rows_of(tmp_path / "good")
    asked = 0
    for view in (0, 1):
        row = rows[first_sample, view]
        if row.positions is not None:
            asked += len(row.positions.positions)
        elif row.chunks is not None:
            asked += int(row.chunks.teacher_length[row.chunks.active].sum())
        if asked > 3:
            break
    fail(1, None)
    config = make(teacher, **settings)
    with pytest.raises(ModelError, match=rf"sample {first_sample} view {view}: .* not finite"):
        precompute(config)
    assert not (config.out / "manifest.json").exists()
    assert not list(config.out.glob("*.arrow"))


def test_workers_share_the_parts(make: Any) -> None:
    """Worker 1 of 2 makes the odd parts; worker 0 then the even ones, in the same folder; nothing is made
    twice."""
    config = make(part="1/2")
    manifest = precompute(config)
    assert [s.part for s in manifest.shards] == [1]
    both = precompute(replace(config, part="0/2"))
    assert [s.part for s in both.shards] == [0, 1, 2]
    assert both.totals["rows"] == 22


def test_worker_without_parts(make: Any) -> None:
    with pytest.raises(UsageError, match="part 5/9: the corpus has no part for this worker"):
        precompute(make(part="5/9"))


def test_grows_with_the_limit(make: Any) -> None:
    """The last, short part is made again with more rows; whole ones are kept."""
    first = precompute(make(limit=6))
    assert [(s.first, s.last) for s in first.shards] == [(0, 4), (4, 6)]
    grown = precompute(make())
    assert [(s.first, s.last) for s in grown.shards] == [(0, 4), (4, 8), (8, 11)]
    assert first.shards[0] == grown.shards[0]
    assert Manifest.load(make().out).totals["rows"] == 22


def test_other_settings_are_refused(make: Any) -> None:
    precompute(make(limit=2))
    with pytest.raises(ConfigMismatch, match=r"noise\.seed: 0 -> 1"):
        precompute(make(limit=2, seed=1))


def test_unusable_rows_are_counted(make: Any, tmp_path: Path) -> None:
    """Unusable rows of the file and unusable conversations alike, by reason."""
    no_answer = {"messages": [{"role": "user", "content": "hello"}]}
    rows = [conversation(0), no_answer, conversation(1), {"txt": "?"}, no_answer]
    corpus = write_corpus(tmp_path / "holes.jsonl", rows + [conversation(i) for i in range(2, 6)])
    manifest = precompute(make(corpus=str(corpus)))
    assert manifest.totals["rows"] == 12
    assert manifest.report["corpus_rows"] == 9
    assert Counter(manifest.report["dropped"]).total() == 3
    assert max(manifest.report["dropped"].values()) == 2
    assert manifest.report["skipped_at"] == {"found fields txt": ["holes.jsonl:4"]}
    said = losses(manifest.report)
    assert said[0].startswith("3 of 9 corpus rows give no sample: 2 no assistant message")
    assert "1 found fields txt (first at holes.jsonl:4)" in said[0]


@pytest.mark.parametrize("teacher", ["teacher_other", "teacher_moe"])
def test_too_many_unaligned_tokens_stop_the_run(make: Any, teacher: str) -> None:
    """Of the target tokens, those of samples that are lost whole included; the leading reason is named, and
    all reasons are in the report and the summary of a run that was told to go on."""
    config = make(teacher, max_teacher_length=24)
    reason = r"\d+ because: teacher truncated; .* raise --max-dropped \(0\.02\)$"
    with pytest.raises(
        CorpusError, match=rf"target tokens in the first 4 rows have no .*, {reason}"
    ) as error:
        precompute(config)
    assert "\n" not in str(error.value)
    manifest = precompute(replace(config, max_dropped=1.0))
    report = manifest.report
    lost, content = report["unaligned_tokens"], report["content_tokens"]
    assert lost["teacher truncated"] > 0.1 * content
    assert max(lost, key=lost.get) == "teacher truncated"
    whole = report["corpus_rows"] - manifest.totals["rows"] // 2
    assert report["dropped"] == ({"nothing aligned": whole} if whole else {})
    assert (whole > 0) == (manifest.kind == "shared"), "a prompt's chunks keep a cross sample"
    said = losses(report)
    assert f"{sum(lost.values()):,} of {content:,} target tokens" in said[-1]
    assert f"{lost['teacher truncated']:,} teacher truncated" in said[-1]
    kept = precompute(make(teacher, out=config.out.with_name("kept"), max_teacher_length=None)).report
    assert kept["content_tokens"] == content, "what is asked of the teacher does not depend on its length"
    assert sum(kept["unaligned_tokens"].values()) <= 0.02 * content


def test_remarks_on_samples_are_reported(make: Any, work: Path, tmp_path: Path) -> None:
    """A template whose generation prompt is no prefix of the turn: nothing breaks, but it is said."""
    student = shutil.copytree(work / "student", tmp_path / "student")
    (student / "chat_template.jinja").write_text(OTHER.replace("'# assistant: '", "'# assistant, go: '"))
    manifest = precompute(make(student=str(student), teacher=str(work / "teacher_other"), max_dropped=1.0))
    assert manifest.report["notes"] == {"generation prompt is not a prefix of the text": 11}
    assert losses(manifest.report)[-1].startswith("remarks on samples: 11 generation prompt")


def test_a_mixture_of_corpora(make: Any, tmp_path: Path) -> None:
    """The manifest names it without folders; parts are cut from the mixture as from any corpus."""
    for name, first in (("a", 0), ("b", 6)):
        (tmp_path / name).mkdir()
        write_corpus(tmp_path / name / "rows.jsonl", [conversation(first + i) for i in range(6)])
    spec = f"2*{tmp_path / 'a' / 'rows.jsonl'}+{tmp_path / 'b'}"
    manifest = precompute(make(corpus=spec, limit=8))
    assert manifest.config["source"]["spec"] == "2*rows.jsonl+b"
    grown = precompute(make(corpus=spec))
    assert grown.shards[:2] == manifest.shards[:2]
    assert grown.totals["rows"] == 24
    assert grown.identity == manifest.identity


def test_nothing_usable_stops_whatever_the_limit(make: Any, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "none.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(CorpusError, match=r"none of the first 1 rows gives a sample, 1 because: .*assistant"):
        precompute(make(corpus=str(corpus), max_dropped=1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"teacher": "nowhere/at/all"}, "no such model folder"),
        ({"student": "/nowhere"}, "/nowhere"),
        ({"kind": "shared", "teacher": "teacher_moe"}, "kind shared"),
        ({"shared_vocab_size": 305}, "shared-vocab-size must be at most 295"),
        ({"row_tokens": 8}, r"--row-tokens allows 8"),
        ({"dtype": "float31"}, "dtype must be one of float32, bfloat16, got 'float31'"),
        ({"kind": "both"}, "kind must be one of auto, shared, cross"),
        ({"teacher_attention": "all"}, "teacher-attention must be one of staircase"),
        ({"part": "2/2"}, "part must be i/n"),
        ({"views": 0}, "views must be at least 1"),
        ({"max_dropped": 2.0}, "max-dropped must lie between 0 and 1"),
    ],
)
def test_one_line_errors(make: Any, work: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("teacher") == "teacher_moe":
        changes = changes | {"teacher": str(work / "teacher_moe")}
    with pytest.raises(TideError, match=message) as e:
        precompute(replace(make(), **changes))
    assert "\n" not in str(e.value)


def test_empty_corpus(make: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"empty\.jsonl: no rows") as e:
        precompute(make(corpus=str(tmp_path / "empty.jsonl")))
    assert "\n" not in str(e.value)


def test_shared_vocabulary_can_be_cut(make: Any) -> None:
    """True tokens beyond the cut have no gold log-prob; distributions hold no id beyond it."""
    config = make(shared_vocab_size=280)
    precompute(config)
    for row in rows_of(config.out).values():
        assert row.positions is not None
        assert isinstance(row.positions.target, SparseTarget)
        assert row.positions.target.ids.max(initial=0) < 280
        beyond = row.input_ids[row.positions.positions] >= 280
        np.testing.assert_array_equal(np.isnan(row.positions.gold_logp), beyond)
