"""`tide verify`, `push`, `pull`, `merge` by the real command: what is printed, the JSON line, exit codes,
Ctrl-C, and every command that docs/sharing.md shows."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from http_servers import serving
from hub_server import HubHandler

from shards.codec import SparseCodec
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from tools import cli

Tide = Callable[..., SimpleNamespace]
NOISE, CODEC = NoiseConfig(views=2), SparseCodec(cap=12, tail_bound=0.05)
PAGE = Path(__file__).parents[1] / "docs" / "sharing.md"


@pytest.fixture
def tide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tide:
    """Run `tide ARGUMENTS` and return its exit code, standard output and standard error."""

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tide", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=out, err=err)

    return run


def make(out: Path, *parts: int, licence: str | None = None) -> Path:
    config = synthetic_config(NOISE, CODEC)
    config["source"]["licence"] = licence
    with DatasetWriter(out, "shared", config) as writer:
        for p in parts:
            rows = synthetic_rows(p * 4, p * 4 + 4, kind="shared", noise=NOISE, codec=CODEC)
            writer.write_part(p, p * 4, p * 4 + 4, list(rows), {})
        writer.finish()
    return out


@pytest.fixture
def remotes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The hub's stand-in and moto's S3 with a bucket named `bucket`; gives the hub's state."""
    import s3fs
    from huggingface_hub import HfFileSystem, constants
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    state: dict[str, Any] = {"repos": {}, "asked": Counter(), "large": {}}
    with serving(HubHandler, **state) as url:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        HfFileSystem.clear_instance_cache()
        yield state
        HfFileSystem.clear_instance_cache()
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_page(
    tide: Tide, remotes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands in its order, in an empty folder with a dataset `data`; pulls go to a folder each."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", 0, 1)
    make(tmp_path / "site-a", 0)
    make(tmp_path / "site-b", 1)
    commands = re.findall(r"^    tide (.*)$", PAGE.read_text(), re.M)
    assert len(commands) == 11
    # What others published on the hub before: the page verifies it first, and pulls a tag of it.
    assert tide("push", "data", "hf://datasets/team/data").code == 0
    repo = remotes["repos"]["team/data"]
    repo.branches["v1.0"] = repo.branches["main"]
    for number, command in enumerate(commands):
        words = shlex.split(command)
        if words[0] == "pull":
            words[2] = f"pulled-{number}"
        result = tide(*words)
        assert result.code == 0, (command, result.err)
        if words[0] == "pull":
            assert Manifest.load(words[2]) == Manifest.load("data")
    assert Manifest.load("all") == Manifest.load("data")


def test_verify_lists_all_and_fails(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "data", 0, 1, 2)
    clean = tide("verify", data, "--json")
    assert clean.code == 0
    assert json.loads(clean.out.splitlines()[-1])["ok"] is True
    first, second, _ = sorted(data.glob("*.arrow"))
    os.truncate(first, 99)
    second.unlink()
    (data / "notes").write_text("x")
    bad = tide("verify", data)
    assert bad.code == 1
    assert f"bad: {first.name}: the file is truncated" in bad.out
    assert f"bad: {second.name}: missing" in bad.out
    assert "warning: notes: not part of the dataset" in bad.out
    assert re.fullmatch(r"error: .*: 2 of its files cannot be used.*\n", bad.err)
    said = json.loads(tide("verify", data, "--full", "--json").out.splitlines()[-1])
    assert [p["file"] for p in said["problems"]] == [first.name, second.name]


def test_push_and_pull_say_what_moved(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "data", 0, 1, licence="cc-by-4.0")
    pushed = tide("push", data, tmp_path / "shared")
    assert "licence: cc-by-4.0 (source)" in pushed.out
    assert "2 of 2 files sent" in pushed.out
    said = json.loads(tide("pull", tmp_path / "shared", tmp_path / "copy", "--json").out.splitlines()[-1])
    assert (said["moved"], said["files"], said["licences"]) == (2, 2, ["cc-by-4.0"])
    assert "none is stated" in tide("push", make(tmp_path / "other", 0), tmp_path / "there").out


def test_refusals_are_one_line(tide: Tide, tmp_path: Path) -> None:
    data = make(tmp_path / "data", 0)
    other = make(tmp_path / "other", 0, licence="mit")
    for arguments, code, words in (
        (("verify", tmp_path / "nothing"), 1, "has no manifest.json"),
        (("push", tmp_path / "nothing", tmp_path / "x"), 1, "has no manifest.json"),
        (("push", data, other), 1, 'source.licence: "mit" -> null'),
        (("pull", data, other), 1, 'source.licence: "mit" -> null'),
        (("merge", tmp_path / "out", data, other), 1, "made with other settings"),
        (("merge", tmp_path / "out", data, "--prefer", "last"), 2, "--prefer must be first"),
        (("push", data), 2, "Missing argument 'URL'"),
    ):
        result = tide(*arguments)
        assert (result.code, result.err.count("\n")) == (code, 1), result.err
        assert words in result.err


def test_ctrl_c_in_a_push_to_the_hub(tmp_path: Path) -> None:
    """A real process, interrupted while its first file is on the way: one line, nothing visible, and the same
    command finishes."""
    data = make(tmp_path / "data", 0, 1, 2)
    arrived, go = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        go.wait(60)

    state: dict[str, Any] = {
        "repos": {},
        "asked": Counter(),
        "large": {},
        "before_upload": staticmethod(hold),
    }
    with serving(HubHandler, **state) as url:
        environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "tools.cli", "push", str(data), "hf://datasets/team/data"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert arrived.wait(60)
        process.send_signal(signal.SIGINT)
        go.set()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert err.splitlines()[-1] == "error: interrupted; the same tide push goes on from there"
        repo = state["repos"]["team/data"]
        assert "manifest.json" not in repo.commits[repo.branches["main"]]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "manifest.json" in repo.commits[repo.branches["main"]]
        assert state["asked"]["upload"] == 3
