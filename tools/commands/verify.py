"""`tide verify`: is a logit dataset what its manifest says?"""

from __future__ import annotations

from typing import Annotated

import typer

from tools.console import Output, Progress
from tools.options import Config, Json, megabytes, opt

SHOWN = 20
"""Warnings printed; the JSON line has all."""


def verify(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(metavar="PATH|URL", help="Logit dataset: folder, hf://, s3://, ...")],
    full: Annotated[bool, opt("Decode every row too: schema, invariants, noise plans, records.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Check every byte of a logit dataset against its manifest; exit code 1 where a file is damaged.

    Every damaged shard is listed with the reason.
    """
    from shards.errors import CorruptShard
    from shards.verify import verify as check

    with Progress() as progress:
        verdict = check(data, full=full, report=megabytes(progress, "verifying"))
    totals, problems = verdict.manifest.totals, verdict.problems
    output = Output(as_json=json)
    for warning in verdict.warnings[:SHOWN]:
        output.say(f"warning: {warning}")
    if len(verdict.warnings) > SHOWN:
        output.say(f"warning: and {len(verdict.warnings) - SHOWN} more of these")
    for problem in problems:
        output.say(f"bad: {problem.file}: {problem.reason}")
    shards, size = len(verdict.manifest.shards), totals["bytes"]
    checked = f"{shards} shards, {totals['rows']:,} rows, {size / 1e6:,.1f} MB"
    speed = size / 1e6 / max(verdict.seconds, 1e-9)
    if not problems:
        what = "every byte and every row" if full else "every byte"
        output.say(f"{data}: {what} as the manifest says ({checked}; {speed:,.0f} MB/s)")
    output.result(
        {
            "command": "verify",
            "data": data,
            "full": full,
            "ok": not problems,
            "problems": [{"file": p.file, "reason": p.reason} for p in problems],
            "warnings": verdict.warnings,
            "identity": verdict.manifest.identity,
            "shards": shards,
            "rows": totals["rows"],
            "bytes": size,
            "seconds": verdict.seconds,
        }
    )
    if problems:
        raise CorruptShard(
            f"{data}: {len(problems)} of its files cannot be used (each is listed as bad): tide pull fetches "
            "these again into a copy; elsewhere delete them, and run the same tide precompute again"
        )
