"""`tide bench NAME`: the benchmarks, each side by side with what a user would otherwise run."""

from __future__ import annotations

import typer

from tools.benches.codec import bench_codec
from tools.benches.generate import bench_generate
from tools.benches.precompute import bench_precompute
from tools.benches.shards import bench_shards
from tools.benches.train import bench_train

bench = typer.Typer(
    name="bench",
    help="Benchmarks against the alternatives, in one run; ratios first.",
    no_args_is_help=True,
)
bench.command("codec")(bench_codec)
bench.command("generate")(bench_generate)
bench.command("precompute")(bench_precompute)
bench.command("shards")(bench_shards)
bench.command("train")(bench_train)
