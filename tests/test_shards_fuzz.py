"""Damage at random, seeded: every flipped bit and every splice of a shard or manifest is found, or harmless.

The second half plays a forger who signs what he damaged: then all hashes fit, and the rows must be refused or
decode to something that keeps every invariant, in a process of its own, which a crash would kill.

The short versions run always; the long ones by `python -m pytest -m slow tests/test_shards_fuzz.py`.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.codec import SparseCodec
from shards.errors import TideError
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

CODEC = SparseCodec(cap=8, tail_bound=0.05)


def make(out: Path) -> Path:
    """A dataset of one small shard, so that damage reaches every kind of byte."""
    noise = NoiseConfig(views=2)
    with DatasetWriter(out, "shared", synthetic_config(noise, CODEC)) as writer:
        rows = list(synthetic_rows(0, 3, kind="shared", noise=noise, codec=CODEC, max_length=24))
        writer.write_part(0, 0, 3, rows, {"dropped": {"absent": 1}})
        writer.finish({"seconds": 1.25})
    return out


def content(folder: Path) -> str:
    """Everything a reader gets, as text: numpy values with their types."""
    data = LogitDataset(folder)
    rows = [row for s in range(len(data.manifest.shards)) for b in data.shard_rows(s) for row in b]
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        return f"{data.manifest}{rows}"


def flips(rng: np.random.Generator, whole: bytes, n: int) -> Iterator[bytes]:
    for _ in range(n):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        yield bytes(damaged)


def splices(rng: np.random.Generator, whole: bytes, n: int) -> Iterator[bytes]:
    """A range is cut out, doubled, zeroed, made random, or put elsewhere; or the end is missing."""
    for i in range(n):
        a, b = sorted(rng.integers(0, len(whole) + 1, 2).tolist())
        b = min(b, a + int(rng.choice([1, 4, 8, 64, len(whole)])))
        piece, at = whole[a:b], int(rng.integers(len(whole)))
        yield [
            whole[:a] + whole[b:],
            whole[:b] + piece + whole[b:],
            whole[:a] + bytes(b - a) + whole[b:],
            whole[:a] + rng.bytes(b - a) + whole[b:],
            whole[:at] + piece + whole[at + len(piece) :],
            whole[:a],
        ][i % 6]


def undetected(folder: Path, n_flips: int, n_splices: int, seed: int) -> tuple[int, list[str]]:
    """Cases tried (half on the shard, half on the manifest), and those that went unnoticed."""
    expected, rng, missed, tried = content(folder), np.random.default_rng(seed), [], 0
    for path in (next(folder.glob("*.arrow")), folder / "manifest.json"):
        whole = path.read_bytes()
        cases = [*flips(rng, whole, n_flips // 2), *splices(rng, whole, n_splices // 2)]
        for i, damaged in enumerate(cases):
            path.write_bytes(damaged)
            tried += 1
            try:
                if content(folder) != expected:
                    missed.append(f"{path.name} case {i}: other content without an error")
            except TideError as e:
                if "\n" in str(e):
                    missed.append(f"{path.name} case {i}: more than one line: {e}")
        path.write_bytes(whole)
    assert content(folder) == expected
    return tried, missed


def test_damage_is_found(tmp_path: Path) -> None:
    assert undetected(make(tmp_path / "data"), 150, 60, seed=0) == (210, [])


@pytest.mark.slow
def test_damage_is_found_long(tmp_path: Path) -> None:
    assert undetected(make(tmp_path / "data"), 1_600, 600, seed=1) == (2_200, [])


def signed_damage(folder: Path, n: int, seed: int) -> tuple[int, int]:
    """(refused, decoded) of `n` damaged record batches whose hashes were made to fit."""
    data, rng = LogitDataset(folder), np.random.default_rng(seed)
    record = data.manifest.shards[0]
    refused = decoded = 0
    for i in range(n):
        batch = record.batches[i % len(record.batches)]
        whole = (folder / record.file).read_bytes()[batch.offset : batch.offset + batch.length]
        # The metadata at the front is what a crash would come from: half of the flips go there.
        cut = 400 if i % 4 < 2 else len(whole)
        if i % 4 == 3:
            damaged = next(splices(rng, whole, 1 + i % 6))
        else:
            damaged = next(flips(rng, whole[:cut], 1)) + whole[cut:]
        try:
            decoded += bool(list(data._decode(damaged, "forged")))
        except TideError:
            refused += 1
    return refused, decoded


def run_signed(folder: Path, n: int, seed: int) -> tuple[int, int]:
    """`signed_damage` in a process with 4 GiB of address space to spare."""
    program = (
        "import faulthandler, resource, runpy, sys; from pathlib import Path; faulthandler.enable(); "
        "f = runpy.run_path(sys.argv[1])['signed_damage']; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2); "
        "print(*f(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))"
    )
    command = [sys.executable, "-c", program, __file__, str(folder), str(n), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, decoded = done.stdout.split()[-2:]
    return int(refused), int(decoded)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")
def test_signed_damage_does_not_crash(tmp_path: Path) -> None:
    refused, decoded = run_signed(make(tmp_path / "data"), 400, seed=0)
    assert refused + decoded == 400
    assert refused > 100


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")
def test_signed_damage_does_not_crash_long(tmp_path: Path) -> None:
    refused, decoded = run_signed(make(tmp_path / "data"), 20_000, seed=1)
    assert refused + decoded == 20_000


def test_a_copy_is_as_good(tmp_path: Path) -> None:
    """The comparison itself: equal for equal bytes, in another folder too."""
    folder = make(tmp_path / "a")
    assert content(Path(shutil.copytree(folder, tmp_path / "b"))) == content(folder)
