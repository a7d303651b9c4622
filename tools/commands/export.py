"""`tide export`: a student folder that needs no tide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shards.errors import UsageError
from tools.console import Output, doing
from tools.options import Config, Json, opt


def export(
    ctx: typer.Context,
    model: Annotated[str, opt("Student: run or model folder, or hub id.", "DIR|ID")],
    out: Annotated[Path, opt("New folder.", "DIR")],
    dtype: Annotated[str, opt("Number format of the weights.", "float32|bfloat16")] = "float32",
    config: Config = None,
    json: Json = False,
) -> None:
    """Write a student with its modelling file, for people without tide.

    They load the folder with transformers' from_pretrained(DIR, trust_remote_code=True).
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"--dtype must be one of float32, bfloat16, got {dtype!r}")

    with doing(f"exporting {model}"):
        import torch

        from student.export import export_student

        size = export_student(model, out, dtype=getattr(torch, dtype))
    output = Output(as_json=json)
    output.say(f"{out}: self-contained student, {size / 1e6:,.1f} MB")
    output.result({"command": "export", "model": model, "out": out, "dtype": dtype, "bytes": size})
