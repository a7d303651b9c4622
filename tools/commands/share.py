"""`tide push`, `tide pull`, `tide merge`: logit datasets pass between folders, buckets, the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from shards.errors import TideError, UsageError
from tools.console import INTERRUPTED, Output, Progress
from tools.options import Config, Json, megabytes, opt


class Interrupted(TideError):
    """Ctrl-C: what is complete stays."""

    exit_code = INTERRUPTED


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as e:
        raise Interrupted(f"interrupted; the same tide {command} goes on from there") from e


def push(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a finished logit dataset.")],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Folder, s3://BUCKET/PATH, other fsspec URL, or a dataset repo of the Hugging Face Hub: "
            "hf://datasets/OWNER/NAME[@BRANCH] or OWNER/NAME.",
        ),
    ],
    public: Annotated[bool, opt("A hub repo made by this can be seen by all (default: private).")] = False,
    replace: Annotated[bool, opt("Let go of parts that only URL has, or has with other bytes.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Publish a logit dataset: verified, only what is missing, visible at once or not at all.

    The same command goes on after an interruption, and publishes a dataset that has grown.
    """
    # The hub's client would draw bars of its own over ours; it reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from shards.push import push as send

    with _resumable("push"), Progress() as progress:
        done = send(source, url, replace=replace, private=not public, report=megabytes(progress, "pushing"))
    output = Output(as_json=json)
    _tell(output, done, f"{source} -> {done.url}", "sent")
    output.result({"command": "push", "source": source, **_summary(done)})


def pull(
    ctx: typer.Context,
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Logit dataset: hf://datasets/OWNER/NAME[@REVISION], OWNER/NAME, s3://, https://, folder.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="DST", help="Local folder; may hold an older version.")],
    revision: Annotated[
        str | None,
        opt("Hub: branch, tag or commit. Elsewhere: sha256 of the manifest (default: newest).", "REV"),
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Copy a logit dataset into a folder: only what is missing, every shard verified.

    The same command goes on after an interruption, and fetches what the dataset has grown by. DST/origin.json
    notes where it came from, and which revision.
    """
    from shards.pull import pull as fetch

    with _resumable("pull"), Progress() as progress:
        done = fetch(url, out, revision=revision, report=megabytes(progress, "pulling"))
    output = Output(as_json=json)
    _tell(output, done, f"{done.url} -> {out}", "fetched")
    if not done.continuable:
        output.say("the parts' records are not there: this copy can be used, but not continued")
    output.result({"command": "pull", "out": out, **_summary(done)})


def merge(
    ctx: typer.Context,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the dataset to make or to add to.")],
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Folders of finished datasets.")],
    prefer: Annotated[
        str | None, opt("Where sources have a part with other bytes: take the first one's.", "first")
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Join the parts that several workers or sites made with the same configuration into one dataset.

    Shards are hard links where the file system allows it, else copies. OUT is a dataset like any other: train
    on it, push it, go on with tide precompute.
    """
    if prefer not in (None, "first"):
        raise UsageError(f"--prefer must be first, got {prefer!r}")
    from shards.merge import merge as join

    with _resumable("merge"), Progress() as progress:
        done = join(out, sources, prefer_first=prefer == "first", report=megabytes(progress, "merging"))
    totals = done.manifest.totals
    output = Output(as_json=json)
    if done.replaced:
        output.say(f"parts with other bytes, those of the first folder taken: {list(done.replaced)}")
    output.say(
        f"{out}: {len(done.manifest.shards)} parts ({done.added} new, {done.repeated} in several sources), "
        f"{totals['rows']:,} rows, {totals['bytes'] / 1e6:,.1f} MB"
    )
    output.result(
        {
            "command": "merge",
            "out": out,
            "sources": sources,
            "parts": len(done.manifest.shards),
            "added": done.added,
            "repeated": done.repeated,
            "replaced": done.replaced,
            "identity": done.manifest.identity,
            "rows": totals["rows"],
            "bytes": totals["bytes"],
        }
    )


def _tell(output: Output, done: Any, way: str, verb: str) -> None:
    from shards.transfer import licences

    stated = [f"{text} ({where})" for where, text in licences(done.manifest.config)]
    output.say(
        f"licence: {', '.join(stated) or 'none is stated; the owner of the corpus knows what is allowed'}"
    )
    output.say(
        f"{way}: {done.moved} of {done.files} files {verb} ({done.moved_bytes / 1e6:,.1f} MB), revision "
        f"{done.revision}"
    )


def _summary(done: Any) -> dict[str, Any]:
    from shards.transfer import licences

    return {
        "url": done.url,
        "revision": done.revision,
        "identity": done.manifest.identity,
        "licences": [text for _, text in licences(done.manifest.config)],
        "files": done.files,
        "moved": done.moved,
        "moved_bytes": done.moved_bytes,
        "bytes": done.manifest.totals["bytes"],
        "continuable": done.continuable,
    }
