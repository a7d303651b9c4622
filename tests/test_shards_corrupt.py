"""Everything read is doubted: each way a dataset can be broken or forged gives its own error, in one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shards.codec import DenseCodec, SparseCodec
from shards.encoding import decode, encode
from shards.errors import CorruptShard, ManifestError, PlanMismatch, RowError, ShardError, VersionError
from shards.manifest import Manifest, identity_of, shard_hash
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import Row
from shards.schema import planes
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE = NoiseConfig(views=2)
CODEC = SparseCodec(cap=12, tail_bound=0.05)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "data"
    with DatasetWriter(out, "shared", synthetic_config(NOISE, CODEC)) as writer:
        for p in range(2):
            rows = list(synthetic_rows(8 * p, 8 * p + 8, kind="shared", noise=NOISE, codec=CODEC))
            writer.write_part(p, 8 * p, 8 * p + 8, rows, {})
        writer.finish()
    return out


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def read_all(folder: Path) -> None:
    found = LogitDataset(folder)
    for s in range(len(found.manifest.shards)):
        found.check_shard(s)


def expect(error: type[ShardError], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message) as e:
        read_all(folder)
    assert "\n" not in str(e.value)
    assert type(e.value) is error


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as a forger would: with the identity and the manifest's own hash made to fit."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["identity"] = identity_of(manifest["config"])
    path.write_text(json.dumps(signed(manifest)))


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    return {**body, "sha256": identity_of(body)}


def test_the_untouched_dataset_is_fine(data: Path) -> None:
    read_all(data)


def test_a_truncated_shard(data: Path) -> None:
    shard = shards(data)[1]
    with open(shard, "r+b") as f:
        f.truncate(shard.stat().st_size // 2)
    expect(CorruptShard, rf"{shard.name}: expected \d+ bytes, got \d+: delete it and run", data)
    found = LogitDataset(data)  # readers that ask for one record batch notice as well
    with pytest.raises(CorruptShard, match=r"record batch 3: the file is truncated \(expected \d+ bytes at"):
        found.read(1, 3)


@pytest.mark.parametrize("where", ["head", "record batch 2", "foot"])
def test_one_flipped_bit_anywhere(data: Path, where: str) -> None:
    record = LogitDataset(data).manifest.shards[0]
    batch = record.batches[2]
    at = {"head": 40, "record batch 2": batch.offset + batch.length // 2, "foot": record.bytes - 20}[where]
    with open(data / record.file, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 4]))
    expect(
        CorruptShard, rf"{record.file}: {where}: sha256 differs \(manifest \w{{12}}, file \w{{12}}\)", data
    )


def test_a_flip_on_disk_is_found_by_the_second_run_too(data: Path) -> None:
    found = LogitDataset(data)
    found.read(0, 0)
    record = found.manifest.shards[0]
    with open(data / record.file, "r+b") as f:
        f.seek(record.batches[0].offset + 30)
        f.write(b"\xff\xff")
    for reader in (found, LogitDataset(data)):
        with pytest.raises(CorruptShard, match="record batch 0: sha256 differs"):
            reader.read(0, 0)


def test_swapped_shards(data: Path) -> None:
    a, b = shards(data)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    with pytest.raises(
        CorruptShard, match=f"{a.name}: record batch 0: (sha256 differs|the file is truncated)"
    ):
        LogitDataset(data).read(0, 0)


def test_a_missing_shard(data: Path) -> None:
    shard = shards(data)[0]
    shard.unlink()
    expect(CorruptShard, f"{shard.name} is missing from .*: delete it", data)
    with pytest.raises(CorruptShard, match="is missing"):
        LogitDataset(data).read(0, 0)


def test_another_datasets_manifest(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    noise = replace(NOISE, seed=1)
    with DatasetWriter(other, "shared", synthetic_config(noise, CODEC)) as writer:
        writer.write_part(0, 0, 8, list(synthetic_rows(0, 8, kind="shared", noise=noise, codec=CODEC)), {})
        writer.finish()
    shutil.copy(other / "manifest.json", data / "manifest.json")
    expect(CorruptShard, "is missing from", data)


def test_a_shard_of_another_dataset_under_a_consistent_manifest(data: Path) -> None:
    # All hashes fit, but the file says which dataset it belongs to.
    edit(data, lambda m: m["config"].update(holdout=0.5))
    expect(CorruptShard, "its schema is not that of this dataset", data)


def test_no_manifest(data: Path, tmp_path: Path) -> None:
    (data / "manifest.json").unlink()
    expect(ManifestError, "has no manifest.json: not a logit dataset, or an unfinished one", data)
    with pytest.raises(ManifestError, match=r"has no manifest.json"):
        LogitDataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not valid JSON"),
        ('{"format_version": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "manifest.json is not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        (b"\xff\xfe\xff", "manifest.json is not valid JSON"),
    ],
    ids=["cut", "nan", "deep", "list", "bytes"],
)
def test_a_manifest_that_is_no_manifest(data: Path, text: str | bytes, message: str) -> None:
    (data / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    expect(ManifestError, message, data)


def file_name(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["shards"][0].update(file=name)


def batch(i: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda m: m["shards"][0]["batches"][i].update(values)


def config(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(m: dict[str, Any]) -> None:
        for path, value in values.items():
            *parents, last = path.split("__")
            at = m["config"]
            for p in parents:
                at = at[p]
            at[last] = value

    return change


FORGED: list[tuple[Callable[[dict[str, Any]], Any], type[ShardError], str]] = [
    (
        lambda m: m.update(format_version=2),
        VersionError,
        r"format version 2 is not one this tide reads \(1\)",
    ),
    (lambda m: m.update(format_version=False), VersionError, "format version False"),
    (lambda m: m.pop("format_version"), VersionError, "format version None"),
    (config(codec={"name": "zfp"}), VersionError, "unknown codec 'zfp'"),
    (config(codec__cap=0), ManifestError, "codec cap must lie in 1..255"),
    (config(noise__views=0), ManifestError, "config.noise.views must lie in 1..65536, got 0"),
    (config(noise__views=1), ManifestError, "record batch 1 is of view 1, but there are 1 views"),
    (config(noise__shape="blue"), ManifestError, "config.noise: unknown setting 'shape'"),
    (config(noise__source="torch"), ManifestError, "source must be 'philox' or 'explicit', got 'torch'"),
    (config(student__vocab_size=1 << 40), ManifestError, "vocab_size must lie in 1..16777216"),
    (config(student__vocab_size="304"), ManifestError, "vocab_size must be a whole number, got '304'"),
    (config(student=None), ManifestError, "config.student must be a JSON object"),
    (config(block_size=-8), ManifestError, "block_size must lie in"),
    (lambda m: m.update(kind="both"), ManifestError, "kind must be 'shared' or 'cross', got 'both'"),
    (lambda m: m.update(config=[]), ManifestError, "config must be"),
    (lambda m: m.update(shards={}), ManifestError, "no list of shards"),
    (lambda m: m["shards"].insert(0, 7), ManifestError, "shard 0: no list of record batches"),
    (lambda m: m["shards"].append(m["shards"][0]), ManifestError, "part 0 .* overlaps or precedes part 1"),
    (lambda m: m["shards"][1].update(first=7), ManifestError, "overlaps or precedes"),
    (lambda m: m["shards"][1].update(first=-1), ManifestError, "impossible row range -1..16"),
    (lambda m: m["shards"].pop(), ManifestError, "totals say 32 rows, the shards have 16"),
    (lambda m: m["totals"].update(bytes=1), ManifestError, "totals say 1 bytes"),
    (lambda m: m["shards"][0].update(rows=1 << 60), ManifestError, "rows declared, 16 in the record batches"),
    (lambda m: m["shards"][0].update(sha256="0" * 64), ManifestError, "sha256 of .* does not follow"),
    (batch(0, sha256="zz"), ManifestError, "does not follow"),
    (batch(0, length=-5), ManifestError, "record batch 0 is impossible"),
    (batch(1, offset=0), ManifestError, r"record batch 1 is impossible: .* at 0 \(expected at \d+\)"),
    (batch(3, length=1 << 62), ManifestError, "record batch 3 is impossible"),
    (batch(3, length=1 << 29), ManifestError, r"end at byte \d+ of a file of"),
    (batch(0, rows=10**9), ManifestError, "record batch 0 is impossible: 1000000000 rows"),
    (batch(0, split="secret"), ManifestError, "of split 'secret'"),
    (batch(0, rows=True), ManifestError, "rows must be a whole number, got True"),
    *(
        (file_name(name), ManifestError, "is not a plain .arrow name inside the dataset's folder")
        for name in (
            "../x.arrow",
            "/etc/x.arrow",
            "a/b.arrow",
            "a\\b.arrow",
            "..",
            "a\0.arrow",
            "s3::x.arrow",
            "",
        )
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), FORGED, ids=[m for _, _, m in FORGED])
def test_a_forged_manifest(
    data: Path, change: Callable[[dict[str, Any]], Any], error: type[ShardError], message: str
) -> None:
    edit(data, change)
    expect(error, message, data)


def test_a_config_that_is_not_the_identitys(data: Path) -> None:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["block_size"] = 16
    path.write_text(json.dumps(signed(manifest)))
    expect(ManifestError, "the identity is not that of its config", data)


def test_a_record_batch_that_is_not_what_the_manifest_says(data: Path) -> None:
    edit(data, lambda m: [b.update(view=1 - b["view"]) for b in m["shards"][0]["batches"]])
    expect(CorruptShard, "record batch 0: has other rows than the 6 of split train view 1", data)


def test_bytes_that_are_no_record_batch_under_fitting_hashes(data: Path) -> None:
    record = LogitDataset(data).manifest.shards[0]
    content = bytearray((data / record.file).read_bytes())
    first = record.batches[0]
    content[first.offset : first.offset + first.length] = bytes(first.length)
    (data / record.file).write_bytes(content)

    def sign(m: dict[str, Any]) -> None:
        import hashlib

        s = m["shards"][0]
        s["batches"][0]["sha256"] = hashlib.sha256(bytes(first.length)).hexdigest()
        s["sha256"] = shard_hash([s["head_sha256"], *(b["sha256"] for b in s["batches"]), s["foot_sha256"]])

    edit(data, sign)
    expect(CorruptShard, "record batch 0: is not a record batch", data)


def test_a_tampered_noise_plan(tmp_path: Path) -> None:
    # Written as explicit noise, which is checked by invariants only; then declared to be of the Philox plan.
    given = synthetic_config(NOISE, CODEC)
    given["noise"]["source"] = "explicit"
    rows = list(synthetic_rows(0, 4, kind="shared", noise=NOISE, codec=CODEC))
    rows[0] = replace(rows[0], t=0.5)
    with DatasetWriter(tmp_path, "shared", given) as writer:
        writer.write_part(0, 0, 4, rows, {})
        writer.finish()
    read_all(tmp_path)
    edit(tmp_path, config(noise__source="philox"))
    with pytest.raises(PlanMismatch, match="sample s000000 view 0: stored timestep differ"):
        list(LogitDataset(tmp_path).samples("train"))
    assert len(list(LogitDataset(tmp_path, verify_plan=False).samples("train"))) == 3


def test_a_writer_refuses_rows_that_are_not_of_the_plan(tmp_path: Path) -> None:
    rows = [replace(r, t=0.5) for r in synthetic_rows(0, 2, kind="shared", noise=NOISE, codec=CODEC)]
    with (
        DatasetWriter(tmp_path, "shared", synthetic_config(NOISE, CODEC)) as writer,
        pytest.raises(PlanMismatch, match="stored timestep differ"),
    ):
        writer.write_part(0, 0, 2, rows, {})


# Rows: record batches as a forger could sign them. Each change is made to the first row's list of a column.


def changed(batch: pa.RecordBatch, column: str, change: Callable[[Any], Any]) -> pa.RecordBatch:
    if column == "top":  # all planes of the ids
        for plane in planes(column):
            batch = changed(batch, plane, change)
        return batch
    values = batch.column(column).to_pylist()
    values[0] = change(values[0])
    i = batch.schema.get_field_index(column)
    return batch.set_column(i, batch.schema.field(i), pa.array(values, type=batch.schema.field(i).type))


def put(i: int, value: Any) -> Callable[[list], list]:
    return lambda x: [*x[:i], value, *x[i + 1 :]] if i >= 0 else [*x[:i], value, *x[len(x) + i + 1 :]]


def cut(x: list) -> list:
    return x[:-1]


def flip(x: list) -> list:
    return [not v for v in x]


SHARED_CHANGES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("sample_id", lambda _: "", "expected a name"),
    ("split", lambda _: "test", "expected train or heldout, got test"),
    ("t", lambda _: 0.0, "a timestep in"),
    ("t", lambda _: float("nan"), "a timestep in"),
    ("input_0", cut, r"expected \d+ values \(one per token\), got"),
    ("input_2", put(3, 255), r"column input\[3\]: expected an id below the vocabulary's 304, got 167"),
    ("real_length", lambda _: 0, "a length within the sample, got 0"),
    ("real_length", lambda n: n + 1000, "a length within the sample"),
    ("content_bytes", lambda _: -1, "at least 0, got -1"),
    ("maskable", cut, "pairs of start and end, got 1"),
    ("maskable", put(0, -(2**31)), r"maskable\[0\]: expected span edges inside the sample"),
    ("maskable", put(1, 2**31 - 1), r"maskable\[1\]: expected span edges inside the sample"),
    ("maskable", lambda x: [x[1], x[0]], "span edges in ascending order"),
    ("maskable", lambda x: [x[1] - 1, x[1]], "masked positions inside the maskable spans"),
    ("masked", cut, "column input_0: expected"),
    ("masked", flip, "masked positions inside the maskable spans"),
    ("distilled", cut, "one per masked position"),
    ("distilled", flip, "one per distilled position"),
    ("half_a", cut, "one per distilled position"),
    ("gold_logp", cut, "one per distilled position"),
    ("gold_logp", put(0, None), r"gold_logp\[0\]: expected a finite log-prob"),
    ("gold_logp", put(0, 0.5), r"gold_logp\[0\]: expected a finite log-prob, at most 0, got 0.5"),
    ("gold_logp", put(0, float("-inf")), r"gold_logp\[0\]: expected a finite log-prob"),
    ("gold_logp", put(0, float("nan")), "expected null or a number, got 1 NaN"),
    ("counts", cut, "one per distilled position"),
    ("counts", put(0, 0), r"counts\[0\]: expected 1 to 12 kept entries, got 0"),
    ("counts", put(0, 13), r"counts\[0\]: expected 1 to 12 kept entries, got 13"),
    ("counts", lambda x: [x[0] - 1, *x[1:]], r"one per kept entry"),
    ("top_0", cut, "one per kept entry"),
    ("top", lambda x: [x[1], *x[1:]], r"column top\[\d\]: expected different ids in one head"),
    ("top_1", put(0, 2), r"top\[0\]: expected an id below the shared vocabulary's 300, got \d+"),
    ("top_2", put(0, 1), r"top\[0\]: expected an id below the shared vocabulary's 300"),
    ("top_logp", put(0, 250), "entries from most to least probable"),
    ("top_logp", lambda x: [0] * len(x), "head and tail that sum to a mass of 1"),
    ("top_logp", lambda x: [255] + [0] * (len(x) - 1), "head and tail that sum to a mass of 1"),
    ("tail_0", cut, "one per distilled position"),
    ("tail_0", put(0, 100), "head and tail that sum to a mass of 1"),
    ("tail_1", put(0, -128), r"tail_1\[0\]: expected the empty code -128 exactly where"),
]


@pytest.fixture(scope="module")
def shared_batch() -> pa.RecordBatch:
    rows = synthetic_rows(0, 60, kind="shared", noise=NOISE, codec=CODEC)
    # A row whose first heads are wide and whose first gold ids lie inside the shared vocabulary.
    fit = [
        r
        for r in rows
        if r.positions and len(r.positions.positions) > 3 and not np.isnan(r.positions.gold_logp[0])
    ]
    return encode(fit[:3], "shared", CODEC, "", vocab_size=304, shared_vocab_size=300)


@pytest.mark.parametrize(
    ("column", "change", "message"), SHARED_CHANGES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_forged_row(shared_batch: pa.RecordBatch, column: str, change: Callable, message: str) -> None:
    forged = changed(shared_batch, column, change)
    forged.validate(full=True)  # Arrow sees nothing wrong
    with pytest.raises(RowError, match=message) as e:
        decode(forged, "shared", CODEC, vocab_size=304, shared_vocab_size=300)
    assert "\n" not in str(e.value)
    assert "column" in str(e.value)


CROSS_CHANGES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("chunk_start", lambda x: [x[1], x[0], *x[2:]], "chunks in order and disjoint"),
    ("chunk_start", put(-1, 60_000), "chunks inside the sample"),
    ("chunk_length", put(0, 0), r"chunk_length\[0\]: expected at least one token, got 0"),
    ("chunk_length", put(0, 9), "chunks in order and disjoint"),
    ("chunk_teacher_length", put(0, 0), "at least one token"),
    ("chunk_teacher_length", cut, "one per chunk"),
    ("chunk_masked", flip, "masked iff one of its tokens is"),
    ("chunk_active", flip, "active chunks among the masked"),
    ("chunk_half_a", lambda x: [True] * len(x), "half A among the masked chunks"),
    ("chunk_logp", cut, "one per active chunk"),
    ("chunk_logp", put(0, float("nan")), r"chunk_logp\[0\]: expected a finite log-prob"),
    ("chunk_logp", put(0, 1.0), "a finite log-prob, at most 0, got 1.0"),
]


@pytest.mark.parametrize(
    ("column", "change", "message"), CROSS_CHANGES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_forged_chunks(column: str, change: Callable, message: str) -> None:
    noise = replace(NOISE, unit="chunk")
    rows = [r for r in synthetic_rows(0, 30, kind="cross", noise=noise, codec=CODEC) if r.chunks is not None]
    rows = [r for r in rows if r.chunks and r.chunks.active.any() and not r.chunks.active.all()][:3]
    good = encode(rows, "cross", CODEC, "", vocab_size=304)
    assert len(decode(good, "cross", CODEC, vocab_size=304)) == 3
    with pytest.raises(RowError, match=message):
        decode(changed(good, column, change), "cross", CODEC, vocab_size=304)


def test_an_active_chunk_with_a_prompt_token() -> None:
    noise = replace(NOISE, unit="chunk")
    for r in synthetic_rows(0, 30, kind="cross", noise=noise, codec=CODEC):
        assert r.chunks is not None
        straddling = np.flatnonzero(r.chunks.masked & ~r.chunks.active)
        if len(straddling):
            break
    c = int(straddling[0])
    active = r.chunks.active.copy()
    active[c] = True
    logp = np.insert(r.chunks.logp, int(r.chunks.active[:c].sum()), np.float32(-1))
    forged = replace(r, chunks=replace(r.chunks, active=active, logp=logp))
    with pytest.raises(RowError, match=rf"chunk_active\[{c}\]: expected active chunks without unmaskable"):
        encode([forged], "cross", CODEC, "", vocab_size=304)


def test_a_half_masked_chunk() -> None:
    noise = replace(NOISE, unit="chunk")
    for r in synthetic_rows(0, 30, kind="cross", noise=noise, codec=CODEC):
        assert r.chunks is not None
        wide = np.flatnonzero(r.chunks.active & (r.chunks.length > 1))
        if len(wide):
            break
    masked = r.masked.copy()
    masked[r.chunks.start[wide[0]]] = False
    with pytest.raises(RowError, match=r"chunk_masked\[\d+\]: expected a chunk masked whole"):
        encode([replace(r, masked=masked)], "cross", CODEC, "", vocab_size=304)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "one per distilled position and token"),
        (lambda x: [float("inf"), *x[1:]], "a finite log-prob"),
        (lambda x: [v - 1 for v in x], "probabilities that sum to 1"),
    ],
)
def test_forged_dense_targets(change: Callable, message: str) -> None:
    codec = DenseCodec()
    rows = [r for r in synthetic_rows(0, 8, kind="shared", noise=NOISE, codec=codec) if r.masked.sum() > 2][
        :2
    ]
    good = encode(rows, "shared", codec, "", vocab_size=304, shared_vocab_size=300)
    with pytest.raises(RowError, match=message):
        decode(changed(good, "dense_logp", change), "shared", codec, vocab_size=304, shared_vocab_size=300)


def test_gold_outside_the_shared_vocabulary_has_no_log_prob(shared_batch: pa.RecordBatch) -> None:
    with pytest.raises(RowError, match=r"gold_logp\[\d+\]: expected null \(the true id lies outside"):
        decode(shared_batch, "shared", CODEC, vocab_size=304, shared_vocab_size=10)


def test_offsets_that_do_not_start_at_0(shared_batch: pa.RecordBatch) -> None:
    # Arrow's own validation accepts both.
    i = shared_batch.schema.get_field_index("masked")
    whole = shared_batch.column(i)
    offsets = whole.offsets.to_numpy() + 1
    longer = pa.concat_arrays([pa.array([True]), whole.values])
    moved = pa.ListArray.from_arrays(pa.array(offsets), longer, type=whole.type)
    forged = shared_batch.set_column(i, shared_batch.schema.field(i), moved)
    forged.validate(full=True)
    with pytest.raises(RowError, match="column masked: expected offsets from 0 to"):
        decode(forged, "shared", CODEC, vocab_size=304, shared_vocab_size=300)


def test_offsets_beyond_the_values_do_not_crash_the_process(data: Path, shared_batch: pa.RecordBatch) -> None:
    # Arrow reads such a batch without complaint and touches foreign memory when the column is used.
    i = shared_batch.schema.get_field_index("input_0")
    column = shared_batch.column(i)
    offsets = column.offsets.to_numpy().copy()
    offsets[1] = 2**30
    forged = shared_batch.set_column(
        i,
        shared_batch.schema.field(i),
        pa.Array.from_buffers(
            column.type, len(column), [None, pa.py_buffer(offsets.tobytes())], children=[column.values]
        ),
    )
    with pytest.raises(CorruptShard, match="record batch 0: is not a record batch"):
        LogitDataset(data)._decode(forged.serialize().to_pybytes(), "part-x.arrow: record batch 0")


def wide_row() -> Row:
    return next(
        r
        for r in synthetic_rows(0, 60, kind="shared", noise=NOISE, codec=CODEC)
        if r.positions and len(r.positions.positions) > 3
    )


def head(r: Row, **values: Any) -> Row:
    assert r.positions is not None
    return replace(r, positions=replace(r.positions, target=replace(r.positions.target, **values)))


def asked(r: Row, i: int, position: int) -> Row:
    assert r.positions is not None
    positions = r.positions.positions.copy()
    positions[i] = position
    return replace(r, positions=replace(r.positions, positions=positions))


def with_first(x: np.ndarray, value: Any) -> np.ndarray:
    return np.concatenate([np.full_like(x[:1], value), x[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: asked(r, 0, -1), r"positions\[0\]: expected positions inside the sample, got -1"),
        (lambda r: asked(r, -1, 999), "positions inside the sample, got 999"),
        (lambda r: asked(r, 1, int(r.positions.positions[0])), "positions in ascending order"),
        (lambda r: asked(r, 0, 0), r"positions\[0\]: expected masked positions, got 0"),
        (lambda r: head(r, logp=with_first(r.positions.target.logp, np.nan)), r"top_logp\[0\]: .* got nan"),
        (lambda r: head(r, logp=with_first(r.positions.target.logp, 0.2)), "a finite log-prob, at most 0"),
        (lambda r: head(r, tails=r.positions.target.tails[:, :1]), r"tails: expected \[N, 2\] values"),
        (lambda r: head(r, tails=with_first(r.positions.target.tails, np.inf)), r"tail_0\[0\]: .* got inf"),
        (lambda r: head(r, ids=with_first(r.positions.target.ids, 1 << 24)), r"top\[0\]: expected an id in"),
        (lambda r: head(r, counts=with_first(r.positions.target.counts, 256)), "a value in 0..255, got 256"),
    ],
)
def test_targets_that_do_not_fit_are_not_encoded(change: Callable[[Row], Row], message: str) -> None:
    with pytest.raises(RowError, match=message):
        encode([change(wide_row())], "shared", CODEC, "", vocab_size=304, shared_vocab_size=300)


def test_rows_of_the_other_kind_are_not_encoded() -> None:
    with pytest.raises(RowError, match="column chunks: expected chunk targets, got none"):
        encode([wide_row()], "cross", CODEC, "", vocab_size=304)
    with pytest.raises(RowError, match="column positions: expected dense targets, got SparseTarget"):
        encode([wide_row()], "shared", DenseCodec(), "", vocab_size=304)


def test_nulls_and_other_schemas(shared_batch: pa.RecordBatch) -> None:
    names = ("sample_id", "masked", "half_a")
    nulls = [
        changed(shared_batch, "sample_id", lambda _: None),
        changed(shared_batch, "masked", lambda _: None),
    ]
    nulls.append(changed(shared_batch, "half_a", put(0, None)))
    for name, forged in zip(names, nulls):
        with pytest.raises(RowError, match=f"column {name}: expected no nulls, got 1"):
            decode(forged, "shared", CODEC, vocab_size=304, shared_vocab_size=300)
    with pytest.raises(RowError, match="other columns than a cross dataset"):
        decode(shared_batch, "cross", CODEC, vocab_size=304)
    with pytest.raises(RowError, match="counts differs"):
        decode(shared_batch.drop_columns(["counts"]), "shared", CODEC, vocab_size=304)


def test_a_manifest_survives_json(made: Path) -> None:
    manifest = Manifest.load(made)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
