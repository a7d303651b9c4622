"""`tide inspect`: its numbers against those counted from the rows, its bounds against whole distributions,
what it reads of a remote dataset, and what it says to bad input."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import Tide, refused
from http_servers import FolderHandler, serving
from small_runs import CODEC, NOISE, write_dataset
from transformers import PreTrainedTokenizerFast

from precompute.fidelity import GROUPS
from precompute.fidelity import column_bytes as recompressed
from precompute.prepare import PrepareConfig, Preparer
from precompute.sample import ChunkSpans, Conversation, Message, Sample
from shards.codec import Codec, DenseCodec, SparseCodec
from shards.encoding import encode
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import ChunkTargets, Row
from shards.schema import Kind
from shards.synthetic import synthetic_config, synthetic_rows
from shards.verify import OPTIONS
from shards.writer import DatasetWriter
from tools.inspecting.pairs import teacher_pieces
from tools.inspecting.sample import all_batches, sample, spread
from tools.inspecting.stats import Z, mean_interval, paired, positions_of
from tools.inspecting.targets import Teller
from tools.inspecting.text import TokenTexts, visible

GOLDEN = Path(__file__).parent / "golden_shards"
TEACHER = {
    "name": "org/teacher", "architecture": "wedlm", "attention": "staircase", "dtype": "bfloat16",
    "weights_hash": "0123456789abcdef" * 4, "tokenizer_hash": "fedcba9876543210" * 4, "mask_token_id": 303,
}  # fmt: skip
REPORT = {
    "corpus_rows": 40, "dropped": {"prompt too long": 4}, "content_tokens": 1000,
    "unaligned_tokens": {"merged with template": 3},
}  # fmt: skip
FIDELITY = {"asked": 2, "kl_mean": 0.0123, "bytes_per_masked_position": {"all": 17.5}}


def quiet(done: float, total: float | None) -> None:
    pass


def make(
    out: Path, *, kind: Kind = "shared", codec: Codec = CODEC, noise: NoiseConfig = NOISE, parts: int = 1
) -> Path:
    """A synthetic dataset of 16 samples a part, with all that a real manifest has."""
    noise = replace(noise, unit="chunk" if kind == "cross" else "token")
    config = synthetic_config(noise, codec, shared_vocab_size=300 if kind == "shared" else None)
    config["teacher"] |= TEACHER
    config["source"] |= {"licence": "CC-BY-4.0"}
    with DatasetWriter(out, kind, config) as writer:
        for p in range(parts):
            rows = synthetic_rows(16 * p, 16 * p + 16, kind=kind, noise=noise, codec=codec, max_length=40)
            writer.write_part(p, 16 * p, 16 * p + 16, list(rows), REPORT)
        writer.finish(fidelity=FIDELITY)
    return out


def all_rows(data: Path) -> list[Row]:
    dataset = LogitDataset(data)
    return [row for at in all_batches(dataset) for row in dataset.read(*at)]


# What the summary says


def test_summary_counts_what_the_rows_hold(tide: Tide, tmp_path: Path) -> None:
    """Small enough to be read whole, so that every number can be counted again from the rows."""
    data = make(tmp_path / "d")
    result = tide("inspect", data, "--json")
    assert result.code == 0, result.err
    found, rows = json.loads(result.out), all_rows(data)
    masked = sum(int(r.masked.sum()) for r in rows)
    size = sum(f.stat().st_size for f in data.glob("*.arrow"))
    assert found["sampled_rows"] == len(rows) == found["totals"]["rows"] == 32
    assert found["bytes_per_masked_position"] == pytest.approx(size / masked)
    assert found["t_histogram"]["rows"] == np.histogram([r.t for r in rows], 10, (0, 1))[0].tolist()
    gold = np.concatenate([r.positions.gold_logp[r.positions.half_a] for r in rows if r.positions])
    gold = np.exp(gold[np.isfinite(gold)].astype(float))
    assert found["true_token"]["a"]["n"] == len(gold)
    assert found["true_token"]["a"]["probability"] == pytest.approx(gold.mean())
    assert found["true_token"]["a"]["above_half"] == pytest.approx((gold > 0.5).mean())
    assert found["dropped"] == {"prompt too long": 4}
    assert found["fidelity"] == FIDELITY
    for words in (
        "org/teacher", "staircase", "bfloat16", "0123456789abcdef", "fedcba9876543210", "a" * 16, "12 train",
        "2, stratified", "at most 12 entries", "CC-BY-4.0", "synthetic", "prompt too long", "10.00%",
        "merged with template", "0.30%", "0.0123", "What follows is of all 32 rows", f"{masked:,}",
    ):  # fmt: skip
        assert words in result.err, words


def test_chunks_are_summarised_by_half(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "d", kind="cross")
    found = json.loads(tide("inspect", data, "--json").out)
    logp = np.concatenate(
        [r.chunks.logp[~r.chunks.half_a[r.chunks.active]] for r in all_rows(data) if r.chunks]
    )
    assert found["true_token"]["b"]["log_probability"] == pytest.approx(logp.mean())


@pytest.mark.parametrize("name", ["cross", "dense", "exact", "sketch", "sparse"])
def test_every_codec_is_summarised(tide: Tide, name: str) -> None:
    """The golden datasets, whose manifests lack what is not needed; exact's head file is not even there."""
    result = tide("inspect", GOLDEN / name, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["kind"] == ("cross" if name == "cross" else "shared")


def test_columns_take_the_bytes_they_take_alone(tmp_path: Path) -> None:
    """Sizes read from a record batch's metadata against each column compressed on its own: equal but for the
    padding of its buffers, at most four of at most 63 bytes."""
    data = LogitDataset(make(tmp_path / "d"))
    batch = encode(data.read(0, 0), "shared", CODEC, "", vocab_size=304, shared_vocab_size=300)
    alone = recompressed(batch)
    ours: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for name, size in data.column_bytes(0, 0).items():
        group = next((what for prefix, what in GROUPS.items() if name.startswith(prefix)), "scalars")
        ours[group] += size
        number[group] += 1
    assert ours.keys() == alone.keys()
    for group, size in ours.items():
        assert 0 <= alone[group] - size <= 4 * 63 * number[group], group


# Which rows are looked at


def test_the_sample_is_spread_nested_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.build.MAX_BATCH_ROWS", 4)
    data = LogitDataset(make(tmp_path / "d", parts=4))  # 4 shards of 8 record batches of 4 rows
    keys = [{(r.sample_id, r.view) for r in sample(data, n, quiet).rows} for n in (8, 32, 64, 1000)]
    assert [len(k) for k in keys] == [8, 32, 64, 128]
    assert keys[0] < keys[1] < keys[2] < keys[3]
    shards = {at[0] for at in all_batches(data) for r in data.read(*at) if (r.sample_id, r.view) in keys[1]}
    assert shards == {0, 1, 2, 3}
    again = sample(data, 32, quiet)
    assert {(r.sample_id, r.view) for r in again.rows} == keys[1]
    assert not again.everything
    assert sample(data, 128, quiet).everything
    monkeypatch.setattr("tools.inspecting.sample.SAMPLE_BYTES", 1)
    assert len(sample(data, 1000, quiet).rows) == 4


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
def test_spread_is_a_permutation(n: int) -> None:
    assert sorted(spread(n)) == list(range(n))


def test_a_remote_dataset_is_not_downloaded(
    tide: Tide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over http: the manifest and the record batches of the sample, and no byte of the shards besides; the
    same summary as of the folder."""
    monkeypatch.setattr("shards.build.MAX_BATCH_ROWS", 4)
    monkeypatch.setenv("TIDE_CACHE", str(tmp_path / "cache"))
    data = make(tmp_path / "d", parts=4)
    served: Counter[str] = Counter()

    class Counting(FolderHandler):
        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            if self.command == "GET":
                served[self.path.rsplit(".", 1)[-1]] += len(body)
            super().answer(status, body, **headers)

    with serving(Counting, root=data) as url:
        remote = tide("inspect", url, "--rows", 16, "--json")
    assert remote.code == 0, remote.err
    found, local = json.loads(remote.out), json.loads(tide("inspect", data, "--rows", 16, "--json").out)
    assert served["arrow"] == found["sampled_bytes"] < 0.2 * found["totals"]["bytes"]
    changed = ("data",)
    assert {k: v for k, v in found.items() if k not in changed} == {
        k: v for k, v in local.items() if k not in changed
    }


# Whole distributions


def test_entropy_bounds_hold_the_true_entropy(tmp_path: Path) -> None:
    """The same synthetic logits through both codecs, written and read: dense targets give the entropy and the
    top, sparse ones must bound and find them within the rounding of their codes (1/16 nat each)."""
    sparse, dense = (
        LogitDataset(make(tmp_path / codec.name, codec=codec))
        for codec in (SparseCodec(cap=24), DenseCodec())
    )
    tellers = Teller(sparse), Teller(dense)
    seen = 0
    for ours, whole in zip(sparse.read(0, 0), dense.read(0, 0)):
        assert ours.positions is not None
        assert whole.positions is not None
        a, b = tellers[0].at(ours.positions), tellers[1].at(whole.positions)
        logp = whole.positions.target.logp.astype(float)
        entropy = -(np.exp(logp) * logp).sum(1)
        np.testing.assert_allclose(b.entropy, entropy, atol=1e-5)
        assert (a.entropy <= entropy + 0.13).all()
        assert (a.entropy_most >= entropy - 0.13).all()
        assert (a.entropy_most - a.entropy > 0.01).any()  # there is a tail to be unsure of
        np.testing.assert_array_equal(a.ids[:, 0], b.ids[:, 0])
        np.testing.assert_array_equal(b.ids, np.argsort(-logp, 1, kind="stable")[:, :5])
        np.testing.assert_allclose(a.p[:, 0], b.p[:, 0], rtol=0.14)
        assert a.tail is not None
        kept = np.arange(300) < a.kept[:, None]
        for temperature, share in a.tail.items():
            tempered = np.exp(-np.sort(-logp, 1) / temperature)
            true = np.where(kept, 0, tempered).sum(1) / tempered.sum(1)
            np.testing.assert_allclose(share, true, rtol=0.14, atol=1e-6)
        seen += len(entropy)
    assert seen > 100


def test_exact_targets_say_what_dense_ones_say(tide: Tide, model: Path, tmp_path: Path) -> None:
    """One teacher scored twice: distributions made from hidden states and head, against those stored."""
    corpus = tmp_path / "c.jsonl"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and {i + 1} follow."} for i in range(4)]
    corpus.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = []
    for codec in ("exact", "dense"):
        made = tide(
            "precompute", "--teacher", model, "--student", model, "--corpus", corpus,
            "--out", tmp_path / codec, "--codec", codec, "--block-size", 8, "--student-max-length", 64,
            "--views", 1, "--kind", "shared",
        )  # fmt: skip
        assert made.code == 0, made.err
        shown = tide("inspect", tmp_path / codec, "--row", 1, "--json")
        assert shown.code == 0, shown.err
        found.append(json.loads(shown.out))
        assert found[-1]["tokens"] is not None  # the options beside the dataset name the tokenizer
    exact, dense = (f["row"]["positions"] for f in found)
    assert exact
    for a, b in zip(exact, dense):
        assert (a["position"], a["state"], a["rank"]) == (b["position"], b["state"], b["rank"])
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-4)
        assert [t for t, _ in a["top"]] == [t for t, _ in b["top"]]


def test_intervals_take_samples_as_units() -> None:
    """Samples of equal size: the standard error of their means. One sample alone: no interval."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 7)) + rng.normal(size=(20, 1))
    mean, low, high = mean_interval(values.ravel(), np.repeat(np.arange(20), 7))
    error = values.mean(1).std(ddof=1) / np.sqrt(20)
    assert (mean, high - mean, mean - low) == pytest.approx((values.mean(), Z * error, Z * error))
    assert np.isnan(mean_interval(values[0], np.zeros(7))[1:]).all()
    with_gap = np.append(values.ravel(), np.nan)
    assert mean_interval(with_gap, np.append(np.repeat(np.arange(20), 7), 20))[0] == pytest.approx(mean)


def test_pairs_are_of_the_same_positions(tmp_path: Path) -> None:
    """Two readings of one dataset in different order, one shifted: the difference is the shift everywhere."""
    data = LogitDataset(make(tmp_path / "d"))
    rows = sample(data, 32, quiet).rows
    one, two = positions_of(data, rows, quiet), positions_of(data, rows[::-1], quiet)
    found = paired(one.top, one.key, two.top + 0.25, two.key)
    assert found is not None
    n, mine, theirs, difference = found
    assert n == len(one.t) == sum(int(r.positions is not None and len(r.positions.positions)) for r in rows)
    assert mine[0] == pytest.approx(theirs[0] - 0.25)
    assert difference == pytest.approx((-0.25, -0.25, -0.25))
    assert paired(one.top, one.key, two.top, [("other", 0, 0)] * n) is None


# One sample


def test_one_sample_by_number_id_or_beginning(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "d", parts=2)
    wanted = next(r for r in all_rows(data) if r.sample_id == "s000017" and r.view == 1)
    number = next(i for i, r in enumerate(all_rows(data)) if r.sample_id == "s000017" and r.view == 1)
    assert wanted.positions is not None
    shown = [
        json.loads(tide("inspect", data, "--json", "--row", *how).out)["row"]
        for how in ((number,), ("s000017", "--view", 1))
    ]
    assert shown[0] == shown[1]
    row = shown[0]
    assert row["input_ids"] == wanted.input_ids.tolist()
    assert [p["position"] for p in row["positions"]] == wanted.positions.positions.tolist()
    halves = ["A" if a else "B" for a in wanted.positions.half_a]
    assert [p["state"] for p in row["positions"]] == halves
    silent = wanted.masked.copy()
    silent[wanted.positions.positions] = False
    assert [s == "silent" for s in row["states"]] == silent.tolist()
    assert [s == "prompt" for s in row["states"]] == (~wanted.maskable).tolist()
    for p, logp in zip(row["positions"], wanted.positions.gold_logp):
        assert p["p"] == (None if np.isnan(logp) else pytest.approx(float(np.exp(logp))))
    other = json.loads(tide("inspect", data, "--json", "--row", number, "--view", 0).out)["row"]
    assert (other["sample_id"], other["view"]) == ("s000017", 0)
    begun = json.loads(tide("inspect", GOLDEN / "cross", "--json", "--row", "sam").out)["row"]
    assert begun["sample_id"] == "sample-0"


def test_chunks_of_one_sample(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "d", kind="cross")
    wanted = all_rows(data)[5]
    assert wanted.chunks is not None
    row = json.loads(tide("inspect", data, "--json", "--row", 5).out)["row"]
    assert [c["teacher_length"] for c in row["chunks"]] == wanted.chunks.teacher_length.tolist()
    active = [c["logp"] for c in row["chunks"] if c["active"]]
    assert active == pytest.approx(wanted.chunks.logp.tolist())
    assert [c["state"] != "shown" for c in row["chunks"]] == wanted.chunks.masked.tolist()


def test_texts_come_from_the_named_tokenizer(
    tide: Tide, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: Any
) -> None:
    """Given, or named by the options beside the dataset; another shows ids and says why, or is refused."""
    data = write_dataset(tmp_path / "d", student_tokenizer, samples=4)
    student_tokenizer.save_pretrained(tmp_path / "right")
    teacher_tokenizer.save_pretrained(tmp_path / "wrong")
    words = [student_tokenizer.decode([i]) for i in all_rows(data)[0].input_ids.tolist()]
    ids = tide("inspect", data, "--row", 0)
    assert "--tokenizer DIR|ID" in ids.out
    assert f"#{all_rows(data)[0].input_ids[0]} " in ids.out
    given = json.loads(tide("inspect", data, "--row", 0, "--json", "--tokenizer", tmp_path / "right").out)
    plain = [(a, b) for a, b in zip(given["tokens"], words) if b and "�" not in b]
    assert len(plain) > 5
    assert all(a == b for a, b in plain)
    refused(tide("inspect", data, "--row", 0, "--tokenizer", tmp_path / "wrong"), 2, "wrong", "hash")
    (data / OPTIONS).write_text(yaml.safe_dump({"student": str(tmp_path / "right")}))
    assert json.loads(tide("inspect", data, "--row", 0, "--json").out)["tokens"] == given["tokens"]
    (data / OPTIONS).write_text(yaml.safe_dump({"student": str(tmp_path / "wrong")}))
    assert "token ids are shown: tokenizer" in " ".join(tide("inspect", data, "--row", 0).out.split())


@pytest.mark.parametrize("width", ["44", "160"])
@pytest.mark.parametrize("kind", ["shared", "cross"])
def test_state_is_told_without_colour(
    tide: Tide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str, kind: Kind
) -> None:
    """Every masked token is marked in the text, and nothing reaches beyond a narrow terminal."""
    data = make(tmp_path / "d", kind=kind)
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    row = next(i for i, r in enumerate(all_rows(data)) if r.masked.sum() > 4)
    shown = tide("inspect", data, "--row", row)
    assert shown.code == 0, shown.err
    flow = shown.out.split("Masked positions" if kind == "shared" else "Chunks")[0]
    assert flow.count("›") - 2 >= int(all_rows(data)[row].masked.sum())  # the legend has at least two
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.out).splitlines()
    reasons = [line for line in lines if " shown: nothing beside the dataset names the tokenizer" in line]
    assert len(reasons) == (1 if kind == "shared" else 2)
    assert max(len(line.rstrip()) for line in lines if line not in reasons) <= int(width)


def test_control_characters_are_escaped() -> None:
    assert visible("a\nb\x1b[31m\u202e\u0085é漢") == "a⏎b\\x1b[31m\\u202e\\x85é漢"
    assert visible("\ud800") == "\\ud800"


# Bad input


def test_what_is_refused(tide: Tide, tmp_path: Path) -> None:
    data, cross = make(tmp_path / "d"), make(tmp_path / "c", kind="cross")
    page = tmp_path / "p.html"
    refused(tide("inspect", tmp_path), 1, tmp_path, "not a logit dataset")
    refused(tide("inspect", tmp_path / "none"), 1, tmp_path / "none")
    refused(tide("inspect", data, "--rows", 0), 2, "--rows", "0")
    refused(tide("inspect", data, "--view", 1), 2, "--view", "--row")
    refused(tide("inspect", data, "--beside", cross), 2, "--beside", "--html")
    refused(tide("inspect", data, "--row", "x"), 2, "'x'", "0 to 31")
    refused(tide("inspect", data, "--row", "99"), 2, "'99'", "0 to 31")
    refused(tide("inspect", data, "--row", "s00000"), 2, "10 sample ids", "s000000, ", "...")
    refused(tide("inspect", data, "--row", 0, "--view", 2), 2, "0..1", "2")
    refused(tide("inspect", data, "--row", 0, "--teacher-tokenizer", "x"), 2, "--teacher-tokenizer x")
    refused(tide("inspect", data, "--html", page, "--beside", cross), 2, "cross", "shared")
    refused(tide("inspect", data, "--html", tmp_path), 2, tmp_path, "is a folder")
    refused(tide("inspect", data, "--html", data / "manifest.json" / "p.html"), 1, "manifest.json")
    refused(tide("inspect", data, "--html", page, "--lambda-max", 2), 2, "lambda", "2")
    refused(tide("inspect", data, "--html", page, "--lambda-axes", "all"), 2, "'all'", "timestep_only")
    refused(tide("inspect", data, "--row", 0, "--tokenizer", tmp_path / "no"), 1, tmp_path / "no")
    assert not page.exists()


def test_the_head_that_exact_targets_need_is_missed(tide: Tide) -> None:
    refused(tide("inspect", GOLDEN / "exact", "--row", 0), 1, "head.safetensors", "missing")


def test_damaged_rows_are_not_shown(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "d")
    (shard,) = data.glob("*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(tide("inspect", data), 1, shard.name, "sha256")


def test_a_manifest_may_say_anything_beside_the_settings(tide: Tide, tmp_path: Path) -> None:
    """Types that no tide writes, and what a terminal would act on: shown, not trusted."""
    config = synthetic_config(NOISE, CODEC)
    config["source"] = ["\x1b[2Jspec", 7]
    config["teacher"] = {"name": {"a": "\x1b]0;title\x07"}, "attention": None, "weights_hash": 5}
    with DatasetWriter(tmp_path / "d", "shared", config) as writer:
        rows = synthetic_rows(0, 4, kind="shared", noise=NOISE, codec=CODEC, max_length=40)
        writer.write_part(0, 0, 4, list(rows), {"dropped": {"\x1b[5mwhy": 2}, "corpus_rows": 0})
        writer.finish(fidelity={"kl_mean": [1, {"\x1b": 2}]})
    result = tide("inspect", tmp_path / "d", "--json")
    assert result.code == 0, result.err
    assert "\x1b[2J" not in result.err
    assert "\x07" not in result.err
    assert "\\x1b[2Jspec" in result.err
    assert "\\x1b[5mwhy" in result.err


def test_the_teachers_side_of_chunks_is_told(
    tide: Tide, tmp_path: Path, student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: Any
) -> None:
    """A sample aligned as precompute does it: the texts of the teacher's tokens are those it was given, and
    there are as many as stored; where a stored length contradicts them, none."""
    preparer = Preparer(student_tokenizer, teacher_tokenizer, PrepareConfig(kind="cross", block_size=8))
    chat = Conversation(
        (Message("user", "Say it."), Message("assistant", "The quick brown fox jumps.")), "x", 0
    )
    made = preparer.prepare(chat)
    assert isinstance(made, Sample)
    spans = made.alignment
    assert isinstance(spans, ChunkSpans)
    n = len(spans.student_start)
    no = np.zeros(n, bool)
    chunks = ChunkTargets(
        spans.student_start,
        spans.student_length,
        spans.teacher_length.copy(),
        no,
        no,
        no,
        np.zeros(0, np.float32),
    )
    texts = TokenTexts(student_tokenizer), TokenTexts(teacher_tokenizer)
    pieces = teacher_pieces(made.student_ids, chunks, *texts)
    wanted = [
        [texts[1][i] for i in made.teacher_ids[a : a + k].tolist()]
        for a, k in zip(spans.teacher_start, spans.teacher_length)
    ]
    assert pieces == wanted
    chunks.teacher_length[3] += 1
    assert teacher_pieces(made.student_ids, chunks, *texts) == [*wanted[:3], None, *wanted[4:]]
    assert teacher_pieces(made.student_ids, chunks, texts[0], TokenTexts()) == [None] * n
