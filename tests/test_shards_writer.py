"""Several writers on one folder, and folders that refuse to be written: no part is made twice without need,
none is lost, what is published last names them all, and its bytes are those of a lone undisturbed writer."""

import errno
import fcntl
import json
import multiprocessing as mp
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import locks
from shards.atomic import remove_abandoned, write_atomic, write_once
from shards.codec import SparseCodec
from shards.errors import ConfigMismatch, ManifestError, ShardError
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.reader import LogitDataset
from shards.row import Row
from shards.settings import identity_of
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter

NOISE = NoiseConfig(views=2)
CODEC = SparseCodec(cap=12, tail_bound=0.05)
CONFIG = synthetic_config(NOISE, CODEC)
PARTS, SIZE = 4, 5
FORK = mp.get_context("fork")


def rows(first: int, last: int) -> list[Row]:
    return list(synthetic_rows(first, last, kind="shared", noise=NOISE, codec=CODEC))


def span(part: int, n: int = PARTS * SIZE) -> tuple[int, int]:
    return part * SIZE, min(n, (part + 1) * SIZE)


def write(writer: DatasetWriter, part: int, n: int = PARTS * SIZE) -> str:
    """The file that counts."""
    first, last = span(part, n)
    return writer.write_part(part, first, last, rows(first, last), {"dropped": {"absent": part}}).file


def run(out: Path, n: int = PARTS * SIZE) -> list[int]:
    """What a precompute over `n` corpus rows does; returns the parts it made."""
    made = []
    with DatasetWriter(out, "shared", CONFIG) as writer:
        left = list(range(-(-n // SIZE)))
        while left := [p for p in left if not writer.has(p, span(p, n)[1])]:
            for part in left:
                if claim := writer.claim(part, span(part, n)[1]):
                    with claim:
                        write(writer, part, n)
                    made.append(part)
        writer.finish()
    return made


def contents(out: Path) -> dict[str, bytes]:
    """Every file, claims and temporary ones included; the lock file, which is empty, left out."""
    files = (p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a lone writer."""
    out = tmp_path_factory.mktemp("whole") / "data"
    assert run(out) == list(range(PARTS))
    return contents(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data"  # the card has the folder's name in it


def opened(out: Path, **options: bool) -> DatasetWriter:
    return DatasetWriter(out, "shared", CONFIG, **options)


def test_two_writers_take_different_parts(out: Path, whole: dict[str, bytes]) -> None:
    with opened(out) as a, opened(out) as b:
        claims = [a.claim(0, SIZE), b.claim(0, SIZE), b.claim(1, 2 * SIZE), b.claim(1, 2 * SIZE)]
        assert [c is not None for c in claims] == [True, False, True, False]
        assert b.claimant(0) == f"process {os.getpid()} on {os.uname().nodename}"
        write(a, 0)
        assert not a.has(1, 2 * SIZE)
        assert b.has(0, SIZE)
        assert b.claim(0, SIZE) is None, "on disk, though still claimed"
        write(b, 1)
        for claim in claims:
            if claim:
                claim.close()
        assert a.claim(1, 2 * SIZE) is None
        for part in (2, 3):
            write(a, part)
        first = a.finish()
        assert (out / ".claims").exists(), "b is still there"
        assert b.finish() == first
    assert contents(out) == whole
    assert not (out / ".claims").exists()


def _share(out: Path, made: str, seconds: float) -> None:
    signal.alarm(60)
    for part in run(out):
        Path(made, f"{part}-{os.getpid()}").touch()


def test_many_processes_make_every_part_once(out: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    made = tmp_path / "made"
    made.mkdir()
    workers = [FORK.Process(target=_share, args=(out, str(made), 60.0)) for _ in range(5)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0] * 5
    assert sorted(int(p.name.split("-")[0]) for p in made.iterdir()) == list(range(PARTS))
    assert contents(out) == whole


def test_a_claim_ends_with_its_process(out: Path) -> None:
    program = f"""
import json, os, sys
from pathlib import Path
from shards.writer import DatasetWriter
writer = DatasetWriter(Path(sys.argv[1]), "shared", json.loads(sys.argv[2]))
claim = writer.claim(0, {SIZE})
print(claim is not None, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(out), json.dumps(CONFIG)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    with opened(out) as writer:
        assert writer.claim(0, SIZE) is None
        assert writer.claimant(0).startswith(f"process {other.pid} on ")
        other.kill()
        other.communicate()
        claim = writer.claim(0, SIZE)
        assert claim is not None
        claim.close()


def test_closing_a_writer_gives_its_claims_back(out: Path) -> None:
    a = opened(out)
    assert a.claim(0, SIZE)
    a.close()
    with opened(out) as b:
        assert b.claim(0, SIZE)
    with pytest.raises(ValueError, match="closed"):
        a.claim(1, 2 * SIZE)
    with pytest.raises(ValueError, match="closed"):
        write(a, 1)


def other_rows(part: int) -> list[Row]:
    """Rows of a part as other hardware gives them: the same samples, log-probs in other last bits."""
    made = rows(*span(part))
    positions = made[0].positions
    assert positions is not None
    gold = positions.gold_logp - np.float32(1e-3)
    return [replace(made[0], positions=replace(positions, gold_logp=gold)), *made[1:]]


def test_the_first_of_two_records_counts(out: Path, whole: dict[str, bytes]) -> None:
    """Both make the part, as where the file system has no locks: the second keeps the first one's, and leaves
    nothing of its own."""
    with opened(out) as a, opened(out) as b:
        assert not b.has(0, SIZE)
        first = write(a, 0)
        assert b.write_part(0, 0, SIZE, other_rows(0), {"dropped": {"absent": 9}}).file == first
        assert [p.name for p in out.glob("*.arrow")] == [first]
    run(out)
    assert contents(out) == whole


def test_a_record_that_appears_meanwhile_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether a part is there and the publishing of its record another writer is faster."""
    with opened(out) as a, opened(out) as b:
        link = os.link

        def slow(*args: str) -> None:
            monkeypatch.setattr(os, "link", link)
            write(b, 0)
            link(*args)

        monkeypatch.setattr(os, "link", slow)
        kept = a.write_part(0, 0, SIZE, other_rows(0), {})
        assert [p.name for p in out.glob("*.arrow")] == [kept.file]
        assert a.finish().report == {"dropped": {"absent": 0}}


def test_a_longer_part_replaces_a_shorter_one_in_either_order(out: Path, whole: dict[str, bytes]) -> None:
    """Two runs with other limits: the last part of the short run is whole in the end."""
    short = 2 * SIZE + 2
    with opened(out) as a, opened(out) as b:
        for part in range(3):
            write(a, part, short)
        assert a.has(2, short)
        assert not b.has(2, 3 * SIZE)
        claim = b.claim(2, 3 * SIZE)
        assert claim is not None
        with claim:
            write(b, 2)
        shorter = span(2, short)
        with opened(out) as c:
            assert c.write_part(2, *shorter, rows(*shorter), {}).last == 3 * SIZE
        write(b, 3)
        assert [s.last for s in a.finish().shards] == [5, 10, 15, 20]
        b.finish()
    assert contents(out) == whole


def test_what_is_published_last_names_every_part(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is overtaken between deriving its manifest and writing it, by one that made another part
    and published: the manifest on disk in the end has that part, and its shard is there."""
    save = Manifest.save
    with opened(out) as a, opened(out) as b:
        for part in range(PARTS - 1):
            write(a, part)

        def slow(manifest: Manifest, path: Path) -> None:
            monkeypatch.setattr(Manifest, "save", save)
            write(b, PARTS - 1)
            b.finish()
            save(manifest, path)

        monkeypatch.setattr(Manifest, "save", slow)
        assert len(a.finish().shards) == PARTS
    assert contents(out) == whole


def test_leftovers_are_removed_by_a_writer_that_is_alone(out: Path, whole: dict[str, bytes]) -> None:
    def leave() -> list[Path]:
        left = [out / "part-00001-0123456789ab.arrow", out / ".tmp-part.1234.arrow"]
        left += [out / "parts" / ".tmp-part.1234.json"]
        for path in left:
            path.write_bytes(b"left over")
        return left

    run(out)
    left = leave()
    with opened(out):
        assert not any(p.exists() for p in left)
        left = leave()
        with opened(out):
            assert all(p.exists() for p in left), "they might be those of the first writer"
    run(out)
    assert contents(out) == whole


def test_a_file_that_is_being_written_is_not_taken_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def slow(fd: int) -> None:
        remove_abandoned(tmp_path)
        sync(fd)

    monkeypatch.setattr(os, "fsync", slow)
    write_atomic(tmp_path / "a.json", b"1")
    (tmp_path / ".tmp-b").write_bytes(b"")
    assert write_once(tmp_path / "a.json", b"2") is False
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"1"


def test_a_temporary_file_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not calls:
            calls.append(fd)
            remove_abandoned(tmp_path)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomic(tmp_path / "a.json", b"1")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_without_locks_work_may_be_done_twice_but_nothing_is_lost(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that has none. A grown dataset holds no shard of its old manifest either, since
    other programs read all files of a pattern."""

    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run(out, 7)
    with opened(out) as a, opened(out) as b:
        assert a.claim(1, 2 * SIZE)
        assert b.claim(1, 2 * SIZE)
        for part in range(1, PARTS):
            write(a, part)
            write(b, part)
        assert a.finish() == b.finish()
    assert contents(out) == whole


def test_without_hard_links_the_first_record_counts_too(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    test_the_first_of_two_records_counts(out, whole)


def test_a_folder_that_someone_keeps_for_himself_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push or pull locks the whole folder; a writer waits for a moment's cleaning alone."""
    monkeypatch.setattr(locks, "CLEANING_S", 0.1)
    run(out)
    with open(out / ".lock", "rb+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(
            ShardError, match="is being fetched, sent or changed by another tide: wait for it"
        ):
            opened(out)
    opened(out).close()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_rotten_bytes_are_found_when_asked_for(out: Path, whole: dict[str, bytes]) -> None:
    run(out)
    flip(next(out.glob("part-00002-*.arrow")))
    with opened(out) as writer:
        assert writer.has(2, 3 * SIZE), "sizes agree, and nothing was read"
    with opened(out, verify=True) as writer:
        assert [writer.has(p, span(p)[1]) for p in range(PARTS)] == [True, True, False, True]
        claim = writer.claim(2, 3 * SIZE)
        assert claim is not None
        with claim:
            write(writer, 2)
        writer.finish()
    assert contents(out) == whole


def test_settings_are_taken_over_from_the_dataset(out: Path) -> None:
    """Those that are asked for, and no others; a dataset whose configuration was edited is refused."""
    mine = CONFIG | {"compute": {"threads": 4, "row_tokens": 64}}
    theirs = CONFIG | {"compute": {"threads": 2, "row_tokens": 32}}
    with DatasetWriter(out, "shared", mine) as writer:
        identity = writer.identity
    both = ("compute.threads", "compute.row_tokens", "compute.absent")
    with DatasetWriter(out, "shared", theirs, take_over=both) as writer:
        assert writer.config == mine
        assert writer.identity == identity == identity_of(mine)
    with pytest.raises(ConfigMismatch, match=r"settings \(compute\.row_tokens: 64 -> 32\): choose"):
        DatasetWriter(out, "shared", theirs, take_over=both[:1])
    path = out / "dataset.json"
    path.write_text(path.read_text().replace('"threads": 4', '"threads": 3'))
    with pytest.raises(ManifestError, match=r"dataset\.json was changed"):
        DatasetWriter(out, "shared", mine)


def refused(out: Path, *words: str) -> str:
    with pytest.raises(ShardError) as e:
        run(out)
    message = str(e.value)
    assert "\n" not in message
    for word in (str(out), "run the same tide precompute again", *words):
        assert word in message
    return message


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on device; free some space there"),
        (errno.EDQUOT, "Disk quota exceeded; free some of the quota there"),
        (errno.EIO, "Input/output error; see that its disk is there and sound"),
    ],
)
def test_what_the_system_refuses_is_said_with_a_remedy(
    out: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    """At the flush of the second part's shard, where network file systems and quotas tell it."""
    real = os.fsync

    def failing(fd: int) -> None:
        if "part-00001" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(code, os.strerror(code))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        refused(out, f"part 1 (0.0 MB) cannot be written: {words}", "finished parts are kept")
    assert not list(out.rglob(".tmp-*"))
    assert [p.name for p in out.glob("parts/*.json")] == ["part-00000.json"]
    assert run(out) == [1, 2, 3]
    assert contents(out) == whole


def test_a_full_disk_at_any_write_loses_nothing_that_was_done(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th write fails, for every n there is: a named error, no temporary file, finished parts kept."""
    rows_in_all = 2 * SIZE
    run(out, rows_in_all)
    wanted = contents(out)
    shutil.rmtree(out)
    real, countdown = os.write, 0

    def limited(fd: int, data: bytes) -> int:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:20_000])  # a write may take a part of what it is given

    monkeypatch.setattr(os, "write", limited)
    for n in range(1, 100):
        countdown = n
        with suppress(ShardError):
            run(out, rows_in_all)
            break
        assert not list(out.rglob(".tmp-*"))
        before = {int(p.stem[5:]) for p in out.glob("parts/*.json")}
        countdown = -1
        assert set(run(out, rows_in_all)).isdisjoint(before)
        assert contents(out) == wanted
        shutil.rmtree(out)
    assert n > 10
    assert contents(out) == wanted


def test_a_limit_on_file_sizes(out: Path, whole: dict[str, bytes]) -> None:
    """A real refusal: the kernel lets no file grow beyond the limit, which the second part's shard does."""
    sizes = [len(data) for name, data in sorted(whole.items()) if name.endswith(".arrow")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) - 1, before[1]))
    try:
        refused(out, "part 0 (", "cannot be written: File too large; raise the limit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.rglob("*.arrow"))
    assert not list(out.rglob(".tmp-*"))
    assert run(out) == list(range(PARTS))
    assert contents(out) == whole


def test_a_small_file_system_fills_up(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A real tmpfs in a mount namespace of its own: full in the middle, then enlarged, then read-only."""
    arrows = sorted(len(data) for name, data in whole.items() if name.endswith(".arrow"))
    pages = sum(-(-n // 4096) for n in arrows[:3]) + 8
    program = f"""
import importlib.util, subprocess, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("writer_tests", {__file__!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
disk = Path({str(tmp_path)!r})
out = disk / "data"
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
mount("size={pages * 4}k")
said = tests.refused(out, "No space left on device; free some space there")
assert not list(out.rglob(".tmp-*")), said
before = [p.stem for p in out.glob("parts/*.json")]
assert before, said
mount("remount,ro")
tests.refused(out, "Read-only file system; make the file system writable")
mount("remount,rw,size=64m")
assert len(tests.run(out)) == tests.PARTS - len(before)
got = {{name: data.hex() for name, data in tests.contents(out).items()}}
import json
print(json.dumps(got))
"""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        [unshare, "-rm", sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if "mount:" in done.stderr and "denied" in done.stderr:
        pytest.skip("no tmpfs in a namespace here")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert {name: bytes.fromhex(data) for name, data in got.items()} == whole


def test_a_folder_that_vanishes(out: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Unmounted (here: moved away) between two parts, and gone for good (removed) before the manifest: said
    so, nothing written beside it; back again, it goes on."""
    with opened(out) as writer:
        write(writer, 0)
        out.rename(tmp_path / "away")
        out.mkdir()  # a mount point without its disk
        with pytest.raises(
            ShardError, match=r"data is gone .*bring it back and run the same tide precompute"
        ):
            writer.claim(1, 2 * SIZE)
        with pytest.raises(ShardError, match="data is gone"):
            write(writer, 1)
        assert not list(out.iterdir())
    out.rmdir()
    (tmp_path / "away").rename(out)
    assert run(out) == [1, 2, 3]
    assert contents(out) == whole
    with opened(out) as writer:
        shutil.rmtree(out)
        with pytest.raises(ShardError, match="data is gone"):
            writer.finish()
    assert not out.exists()


def test_a_folder_that_vanishes_in_the_middle_of_a_part(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync
    with opened(out) as writer:

        def slow(fd: int) -> None:
            shutil.rmtree(out, ignore_errors=True)
            sync(fd)

        monkeypatch.setattr(os, "fsync", slow)
        with pytest.raises(ShardError, match=r"part 0 .* No such file or directory; see that its disk"):
            write(writer, 0)


def test_a_finished_part_that_disappears_is_not_left_out_silently(out: Path, whole: dict[str, bytes]) -> None:
    with opened(out) as writer:
        for part in range(PARTS):
            write(writer, part)
        next(out.glob("part-00001-*.arrow")).unlink()
        with pytest.raises(ShardError, match="part 1 was finished and is gone or damaged: run the same"):
            writer.finish()
    assert not (out / "manifest.json").exists()
    assert run(out) == [1]
    assert contents(out) == whole


@contextmanager
def powerless() -> Iterator[None]:
    """As a user whom permissions bind."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_permission(whole: dict[str, bytes], there: bool) -> None:
    """A new folder where none may be made, and a dataset begun by another user."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        if there:
            run(out, SIZE)
            for path in (out, out / "parts", out / ".lock"):
                path.chmod(0o555)
        os.chmod(folder, 0o555)
        with powerless():
            refused(out, "Permission denied; make the folder writable")
        os.chmod(folder, 0o755)
        if there:
            out.chmod(0o755)
            (out / "parts").chmod(0o755)
            (out / ".lock").chmod(0o644)
        run(out)
        assert contents(out) == whole


@pytest.mark.parametrize("name", ["file", "file/data"])
def test_a_file_in_place_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / name, "choose a folder as --out")
    assert (tmp_path / "file").read_text() == "mine"


def test_readers_are_not_disturbed_by_a_second_run(out: Path) -> None:
    """A finished dataset stays whole while writers come and go."""
    run(out)
    data = LogitDataset(out)
    with opened(out), opened(out):
        assert sum(data.check_shard(s) for s in range(PARTS)) == 2 * PARTS * SIZE
