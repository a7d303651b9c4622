"""FORMAT.md against the code, where the page could drift away: columns, types, hashes, the noise recipe."""

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards import guard
from shards.codec import Codec, DenseCodec, ExactCodec, SparseCodec
from shards.encoding import decode, encode
from shards.invariants import MASS_SLACK, repeated
from shards.manifest import Manifest, shard_hash
from shards.noise import NoiseConfig, uniform01
from shards.realistic import realistic_rows
from shards.schema import FORMAT_VERSION, Kind, schema
from shards.synthetic import synthetic_rows

PAGE = (Path(guard.__file__).parent / "FORMAT.md").read_text()
GOLDEN = Path(__file__).parent / "golden_shards"


def documented() -> dict[str, str]:
    """Column -> type, from the page's tables."""
    found = {}
    for names, kind in re.findall(r"^\| (?:\w+: )?(`[^|]*`)[^|]*\| ([^|]+) \|", PAGE, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    return found


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("shared", SparseCodec()),
        ("shared", SparseCodec(sketch=4, table="a" * 64)),
        ("shared", ExactCodec(width=3, table="a" * 64)),
        ("shared", DenseCodec()),
        ("cross", DenseCodec()),
    ],
)
def test_every_column_is_on_the_page_with_its_type(kind: Kind, codec: Codec) -> None:
    page = documented()
    for field in schema(kind, codec):
        is_list = pa.types.is_list(field.type)
        item = field.type.value_type if is_list else field.type
        assert page[field.name].split()[0] == (f"[{item}]" if is_list else str(item)), field.name


def test_the_page_is_one_page() -> None:
    assert f"format version {FORMAT_VERSION}" in PAGE.splitlines()[0]
    assert len(PAGE.splitlines()) <= 120
    for limit in (
        f"At most {guard.MAX_BATCH_ROWS} rows",
        "at most 1 GiB",
        "at most 4 Mi",
        f"{MASS_SLACK} at most",
    ):
        assert limit in PAGE


def canonical(x: object) -> str:
    """H of the page."""
    text = json.dumps(x, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.mark.parametrize("name", ["sparse", "dense", "cross"])
def test_the_hashes_are_those_of_the_page(name: str) -> None:
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text())
    assert manifest["identity"] == canonical(manifest["config"])
    assert manifest["sha256"] == canonical({k: v for k, v in manifest.items() if k != "sha256"})
    (shard,) = manifest["shards"]
    whole, ends = (GOLDEN / name / shard["file"]).read_bytes(), [0]
    ends += (
        [shard["batches"][0]["offset"]]
        + [b["offset"] + b["length"] for b in shard["batches"]]
        + [shard["bytes"]]
    )
    digests = [hashlib.sha256(whole[a:b]).digest() for a, b in pairwise(ends)]
    named = [shard["head_sha256"], *(b["sha256"] for b in shard["batches"]), shard["foot_sha256"]]
    assert [d.hex() for d in digests] == named
    assert hashlib.sha256(b"".join(digests)).hexdigest() == shard["sha256"] == shard_hash(named)


def philox(key: int, n: int) -> list[int]:
    """Philox 4x64-10 as published (Salmon et al. 2011), counter from 1."""
    mask, words = (1 << 64) - 1, list[int]()
    counter = 1
    while len(words) < n:
        x = [counter & mask, counter >> 64 & mask, 0, 0]
        k0, k1 = key & mask, key >> 64
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [b >> 64 ^ x[1] ^ k0, b & mask, a >> 64 ^ x[3] ^ k1, a & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += x
        counter += 1
    return words[:n]


def test_the_noise_recipe_is_complete() -> None:
    key = hashlib.blake2b(b"5|mask|1|sample", digest_size=16).digest()
    u = [(w >> 11) * 2.0**-53 for w in philox(int.from_bytes(key, "little"), 11)]
    assert u == uniform01(5, "sample", "mask|1", 11).tolist()


def test_a_record_batch_fits_the_size_of_the_study() -> None:
    """Bytes per masked position on rows like real ones; compressed sizes do not depend on the machine.

    Clean ids and all planes, u8 log-probs, one tail: below 33 bytes without gold log-probs, which are float32
    and hardly compress (3.2 more).
    """
    codec = SparseCodec(temperatures=(1.0,))
    rows = realistic_rows(1, 256, codec)
    batch = encode(rows, "shared", codec, "", vocab_size=157_184, shared_vocab_size=157_184)
    positions = sum(int(r.masked.sum()) for r in rows)

    def size(b: pa.RecordBatch) -> float:
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 3), use_threads=False)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, b.schema, options=options) as stream:
            stream.write_batch(b)
        return sink.getvalue().size / positions

    gold = batch.schema.get_field_index("gold_logp")
    assert size(batch.remove_column(gold)) < 32
    assert size(batch) < 36


def test_repeated_ids_are_found_wherever_they_are() -> None:
    """Against a plain count, over head sizes that put repeats at every place of the sorted windows."""
    rng = np.random.default_rng(0)
    for widest in (1, 2, 3, 16, 64, 255):
        for _ in range(8):
            counts = rng.integers(1, widest + 1, 400).astype(np.uint8)
            ids = np.concatenate([rng.choice(5_000, n, replace=False) for n in counts]).astype(np.int32)
            assert repeated(ids, counts) is None
            if widest == 1:
                continue
            ends = np.cumsum(counts, dtype=np.int64)
            wide = rng.choice(np.flatnonzero(counts > 1))
            a, b = rng.choice(np.arange(ends[wide] - counts[wide], ends[wide]), 2, replace=False)
            ids[a] = ids[b]
            found = repeated(ids, counts)
            assert found is not None
            assert {a, b} <= set(np.flatnonzero(found).tolist())
            owner = np.repeat(np.arange(400), counts)
            assert set(owner[found]) == {wide}


def test_rows_are_cut_when_asked_for() -> None:
    rows = list(synthetic_rows(0, 5, kind="shared", noise=NoiseConfig(views=1), codec=DenseCodec()))
    made = encode(rows, "shared", DenseCodec(), "", vocab_size=304, shared_vocab_size=300)
    back = decode(made, "shared", DenseCodec(), vocab_size=304, shared_vocab_size=300)
    names = [r.sample_id for r in rows]
    assert (len(back), [r.sample_id for r in back], back[-1].sample_id) == (5, names, names[-1])
    assert [r.sample_id for r in back[1:3]] == names[1:3]
    with pytest.raises(IndexError):
        back[5]


def test_what_a_record_batch_may_take_covers_every_legal_one() -> None:
    """The bound against what real batches of each kind and codec take in memory, at the longest sample."""
    for kind, codec in (("shared", SparseCodec(cap=255)), ("shared", DenseCodec()), ("cross", DenseCodec())):
        noise = NoiseConfig(views=4, unit="chunk" if kind == "cross" else "token")
        rows = list(synthetic_rows(0, 60, kind=kind, noise=noise, codec=codec, max_length=16))[:200]
        made = encode(rows, kind, codec, "", vocab_size=304, shared_vocab_size=300)
        limit = guard.memory_limit(kind, codec, len(rows), max_length=16, block_size=8, vocab_size=300)
        assert made.nbytes <= limit


def test_a_manifest_keeps_its_hash_through_json() -> None:
    manifest = Manifest.load(GOLDEN / "sparse")
    assert (
        manifest.to_json()["sha256"]
        == json.loads((GOLDEN / "sparse" / "manifest.json").read_text())["sha256"]
    )
