"""`tide bench shards`: our format against raw Arrow, Parquet and mosaicml-streaming, on the same rows.

Every side stores whole rows (clean ids, noise, counts, ids, log-probs, tails, gold log-probs). `arrow` and
`arrow_zstd` keep ids as u32 and log-probs as f16, what one gets without thinking; `parquet` and `mds` keep
the u8 codes that we keep. All run on one thread.

The record, beside what every benchmark has (`tools.benches.common.report`):

    sides.NAME      bytes_per_position (masked ones); write_, read_ and read_cpu_rows_per_s: rows to bytes,
                    and bytes to flat numpy arrays, record batch after record batch (mds: row after row), none
                    kept. `ours` makes the structural checks of a later pass over the data, `ours_thorough`
                    all of those of the first; no other side checks anything. `arrow_zstd` gives u32 and f16
                    as they are stored, ours int32, float32 and masks
    bytes           bytes_per_position of ours: full (two tails, float32 gold), one_tail, and
                    one_tail_gold_null, without gold log-probs
    shuffled        rows_per_s and cpu_rows_per_s of `LogitDataset.stream`, every byte hashed: the `first`
                    pass, with all checks and every noise plan computed, a `later` one, and one with the plans
                    computed again (`planned`); `mds_first`: in order, its shards decompressed
    resume          seconds from opening a dataset to its first rows, at 1 % and at 99 % of an epoch
    hash            bytes per second of `tide verify` on every byte, and of sha256 alone, as many threads
    ratio_read      ours over arrow_zstd, rows per CPU second (the target is 0.9); ratio_read_thorough
    ratio_shuffled  ours (later) over mds in order, which checks nothing; ratio_shuffled_planned;
                    ratio_shuffled_first: both sides' first pass. Left out without mosaicml
    ratio_resume    99 % over 1 %. ratio_hash: ours over sha256. Both of wall time; ratio_hash_cpu
    equal           what each side gave back is what was put in
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tools.console import Output, Progress
from tools.options import Json, opt
from tools.tables import Column, Table

if TYPE_CHECKING:
    from shards.codec import SparseCodec
    from shards.row import Row
    from tools.benches.common import Timing
    from tools.benches.shard_stores import Rows, Store

STEP = 1 / 16
"""Nats per head code."""
BATCH = 256
"""Rows in a record batch."""
SHARD = 1024
"""Rows in a shard."""
FIRST = 32
"""Rows of the first batch after a resume."""


def bench_shards(
    rows: Annotated[int, opt("Rows; 4,096 or more for a resume far from the start.", "N")] = 4096,
    repeats: Annotated[int, opt("Timed runs of each side.", "N")] = 3,
    out: Annotated[Path | None, opt("Write the record here.", "FILE.json")] = None,
    json: Json = False,
) -> None:
    """Bytes per position, and rows per second written, read, shuffled, resumed and verified."""
    from tools.benches import common

    with Progress() as progress:
        line = progress.line("shards", "runs")
        record = measure(rows, repeats=repeats, progress=line)
    if out is not None:
        common.save(record, out)
    output = Output(as_json=json)
    output.report(table(record))
    against = record.get("ratio_shuffled")
    shuffles = (
        "mosaicml-streaming is not installed" if against is None else f"{against:.2f}x mosaicml in order"
    )
    output.say(
        f"read {record['ratio_read']:.2f}x the Arrow file's rate; shuffled: {shuffles}; resume at 99 % takes "
        f"{record['ratio_resume']:.2f}x that at 1 %; hash {record['ratio_hash']:.2f}x sha256 alone; rows "
        f"{'equal' if all(record['equal'].values()) else 'NOT equal'}"
    )
    output.result(record)


def measure(
    n: int, *, repeats: int = 5, progress: Callable[..., None] = lambda done, total, note: None
) -> dict[str, Any]:
    """The record for `n` rows."""
    from shards.codec import SparseCodec, codec_to_json
    from shards.noise import NoiseConfig
    from shards.realistic import realistic_config, realistic_rows
    from tools.benches import common
    from tools.benches.shard_stores import make_stores

    codec = SparseCodec(step=STEP)
    progress(0, None, "making rows")
    sizes = [min(BATCH, n - first) for first in range(0, n, BATCH)]
    noise = NoiseConfig(views=1)
    made = [realistic_rows(seed, size, codec, noise=noise) for seed, size in enumerate(sizes, 1)]
    batches = [[r for r in rows if r.masked.any()] for rows in made]  # mds cannot store empty arrays
    n = sum(map(len, batches))
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as name:
        folder = Path(name)
        stores = make_stores(folder, batches, codec)
        write = {s: timed_once(store.write)[1] for s, store in stores.items()}
        reads = {s: partial(drain, store.read) for s, store in stores.items()}
        ours = stores["ours"]
        reads["ours_thorough"] = partial(drain, lambda: ours.read(thorough=True))  # type: ignore[call-arg]
        dataset = make_dataset(folder / "data", realistic_config(codec, noise), batches)
        once = {"first": timed_once(lambda: shuffled(dataset, n))}
        if "mds" in reads:
            once["mds_first"] = timed_once(reads["mds"])
        streams = {"later": lambda: shuffled(dataset, n), "planned": lambda: shuffled(dataset, n, plans=True)}
        wall, cpu = both({**reads, **streams}, repeats, progress)
        resume = both(
            {f"{share} %": lambda s=share: resumed(dataset, n * s // 100) for share in (1, 99)},  # type: ignore[misc]
            repeats,
            progress,
        )
        hashing = both(hash_sides(dataset), repeats, progress)
        positions = sum(int(r.masked.sum()) for rows in batches for r in rows)
        total = sum(f.stat().st_size for f in dataset.glob("*.arrow"))
        equal = {s: same(batches, store) for s, store in stores.items()}
        bytes_of = {s: store.bytes() / positions for s, store in stores.items()}
        variants = {k: v / positions for k, v in variant_bytes(batches, codec).items()}
    sides: dict[str, dict[str, Any]] = {}
    for s in reads:
        stored = s.removesuffix("_thorough")
        sides[s] = {
            "bytes_per_position": bytes_of[stored],
            "write_rows_per_s": n / write[stored],
            "read_rows_per_s": n / wall[s].median,
            "read_cpu_rows_per_s": n / cpu[s].median,
            **wall[s].to_json(),
        }
    passes = once | {s: (wall[s].median, cpu[s].median) for s in streams}
    ratios = {
        "ratio_read": common.ratio(cpu, "arrow_zstd", "ours"),
        "ratio_read_thorough": common.ratio(cpu, "arrow_zstd", "ours_thorough"),
        "ratio_resume": common.ratio(resume[0], "99 %", "1 %"),
        "ratio_hash": common.ratio(hashing[0], "sha256", "ours"),
        "ratio_hash_cpu": common.ratio(hashing[1], "sha256", "ours"),
    }
    if "mds" in sides:
        ratios["ratio_shuffled"] = common.ratio(cpu, "mds", "later")
        ratios["ratio_shuffled_planned"] = common.ratio(cpu, "mds", "planned")
        ratios["ratio_shuffled_first"] = once["mds_first"][1] / once["first"][1]
    return common.report(
        "shards",
        sizes={"rows": n, "positions": positions, "bytes": total, "codec": codec_to_json(codec)},
        sides=sides,
        ratios=ratios,
        bytes=variants,
        shuffled={s: {"rows_per_s": n / w, "cpu_rows_per_s": n / c} for s, (w, c) in passes.items()},
        resume={k: t.to_json() for k, t in resume[0].items()},
        hash={k: {"bytes_per_s": total / t.median, **t.to_json()} for k, t in hashing[0].items()},
        mosaicml="mds" in sides or "not installed",
        equal=equal,
    )


def both(
    calls: Mapping[str, Callable[[], object]], repeats: int, progress: Callable[..., None]
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Wall and this process's own seconds of sides that take turns; others disturb the latter less."""
    from tools.benches import common

    cpu: dict[str, list[float]] = {name: [] for name in calls}

    def counted(name: str) -> Callable[[], None]:
        def run() -> None:
            start = time.process_time()
            calls[name]()
            cpu[name].append(time.process_time() - start)

        return run

    wall = common.compare({n: counted(n) for n in calls}, repeats=repeats, progress=progress)
    return wall, {n: common.Timing(tuple(s[-repeats:])) for n, s in cpu.items()}


def timed_once(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and this process's own seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def drain(read: Callable[[], Iterable[object]]) -> None:
    deque(read(), maxlen=0)


def make_dataset(folder: Path, config: dict[str, Any], batches: Rows) -> Path:
    """A finished dataset of these rows."""
    from shards.writer import DatasetWriter

    rows = [r for batch in batches for r in batch]
    with DatasetWriter(folder, "shared", config) as writer:
        for part, first in enumerate(range(0, len(rows), SHARD)):
            last = min(first + SHARD, len(rows))
            writer.write_part(part, first, last, rows[first:last], {})
        writer.finish()
    return folder


def shuffled(folder: Path, n: int, *, plans: bool = False) -> None:
    """An epoch in training order. `plans`: with the noise plans computed again that this process knows."""
    from shards.noise import NoiseConfig
    from shards.reader import PASSED, LogitDataset

    if plans:
        PASSED.difference_update([p for p in PASSED if isinstance(p[1], NoiseConfig)])
    for _ in islice(LogitDataset(folder).stream(0), n):
        pass


def resumed(folder: Path, index: int) -> None:
    """The first rows after a resume, by a process that has checked none of them before."""
    from shards.reader import PASSED, LogitDataset, StreamState

    PASSED.clear()
    for _ in islice(LogitDataset(folder).stream(0, StreamState(0, index)), FIRST):
        pass


def hash_sides(folder: Path) -> dict[str, Callable[[], object]]:
    """Every byte of a dataset against its manifest; the same bytes, in memory, hashed by as many threads."""
    from shards.parallel import processors
    from shards.verify import verify

    files = [f.read_bytes() for f in sorted(folder.glob("*.arrow"))]

    def alone() -> None:
        with ThreadPoolExecutor(min(processors(), len(files))) as pool:
            list(pool.map(lambda data: hashlib.sha256(data).hexdigest(), files))

    def ours() -> None:
        if verdict := verify(folder).problems:
            raise RuntimeError(f"the benchmark's own dataset is damaged: {verdict[0]}")

    return {"ours": ours, "sha256": alone}


def same(batches: Rows, store: Store) -> bool:
    """Whether what a store gives back is what was put in, but for the rounding of its log-probs."""
    import numpy as np

    from tools.benches.shard_stores import target

    wanted = [target(r) for rows in batches for r in rows]
    ids, logp = store.heads()
    exact = np.concatenate([t.logp for t in wanted])
    # f16 keeps 11 bits; codes are clipped where they end.
    bound = np.maximum(STEP / 2 + 1e-5, -exact * 2.0**-11) + np.maximum(0, -exact - 255 * STEP)
    return bool(
        np.array_equal(ids, np.concatenate([t.ids for t in wanted])) and (np.abs(logp - exact) <= bound).all()
    )


def variant_bytes(batches: Rows, codec: SparseCodec) -> dict[str, int]:
    """Bytes of our record batches with less in them."""
    import pyarrow as pa

    from shards.encoding import encode
    from shards.realistic import REALISTIC_VOCAB
    from tools.benches.shard_stores import target, write_ipc

    one = replace(codec, temperatures=codec.temperatures[:1])

    def with_one_tail(row: Row) -> Row:
        assert row.positions is not None
        head = replace(target(row), tails=target(row).tails[:, :1])
        return replace(row, positions=replace(row.positions, target=head))

    def size(made: Sequence[pa.RecordBatch]) -> int:
        sink = pa.BufferOutputStream()
        write_ipc(made, sink, "zstd")
        return int(sink.getvalue().size)

    def without_gold(batch: pa.RecordBatch) -> pa.RecordBatch:
        i = batch.schema.get_field_index("gold_logp")
        gold = batch.column(i)
        none = pa.ListArray.from_arrays(
            gold.offsets, pa.nulls(len(gold.values), pa.float32()), type=gold.type
        )
        return batch.set_column(i, batch.schema.field(i), none)

    full = [encode(rows, "shared", codec, "", vocab_size=REALISTIC_VOCAB) for rows in batches]
    short = [[with_one_tail(r) for r in rows] for rows in batches]
    single = [encode(rows, "shared", one, "", vocab_size=REALISTIC_VOCAB) for rows in short]
    return {
        "full": size(full),
        "one_tail": size(single),
        "one_tail_gold_null": size([without_gold(b) for b in single]),
    }


def table(record: dict[str, Any]) -> Table:
    columns = (
        Column(label="", align="left"),
        Column(label="bytes/position", digits=1),
        Column(label="written, rows/s", digits=0),
        Column(label="read, rows/s", digits=0),
        Column(label="read, rows/CPU-s", digits=0),
    )
    figures = ("bytes_per_position", "write_rows_per_s", "read_rows_per_s", "read_cpu_rows_per_s")
    lines = [(name, *(side[k] for k in figures)) for name, side in record["sides"].items()]
    for name, stream in record["shuffled"].items():
        label = "mds, first" if name == "mds_first" else f"ours, shuffled, {name}"
        lines.append((label, None, None, stream["rows_per_s"], stream["cpu_rows_per_s"]))
    sizes = record["sizes"]
    return Table(
        title=f"{sizes['rows']} rows, {sizes['positions']} masked positions",
        columns=columns,
        rows=tuple(lines),
        note="One thread. Ours with less in it: "
        + ", ".join(f"{k} {v:.1f} bytes/position" for k, v in record["bytes"].items()),
    )
