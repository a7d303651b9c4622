"""`tide plan`: what a run would cost, before it runs."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tools.console import Output
from tools.options import Config, Json, opt
from tools.planning.commands import precompute, project
from tools.tables import Column, Table

if TYPE_CHECKING:
    from student.memory import Estimate, Plan, Shape

ASSUMED, CHOSEN = "Assumptions", "Settings (those --vram picks where it is given)"

plan = typer.Typer(help="What a run would cost, before it runs.", no_args_is_help=True, add_completion=False)
plan.command("all")(project)
plan.command()(precompute)


@plan.command()
def train(
    student: Annotated[str, opt("Student: model folder or hub id; its config.json is enough.", "DIR|ID")],
    vram: Annotated[
        float | None, opt("Pick settings for a card of this size (default: none).", "GIB")
    ] = None,
    batch_tokens: Annotated[int, opt("Packed student tokens per step, over all GPUs.", "TOKENS")] = 8192,
    gpus: Annotated[int, opt("GPUs, each with the whole student.", "N")] = 1,
    optimizer: Annotated[str, opt("transformers' name.", "NAME", CHOSEN)] = "adamw_bnb_8bit",
    accumulation: Annotated[int, opt("Micro-batches of a step.", "N", CHOSEN)] = 1,
    gradient_checkpointing: Annotated[
        bool, opt("Layers run again in the backward pass.", None, CHOSEN)
    ] = False,
    eight_bit_embedding: Annotated[
        bool, opt("The embedding's optimiser state in 8 bits too.", None, CHOSEN)
    ] = False,
    lora: Annotated[int | None, opt("Train updates of this rank (default: the weights).", "RANK")] = None,
    qlora: Annotated[bool, opt("The same over weights in 4 bits.")] = False,
    bf16: Annotated[bool, opt("Compute in bfloat16.")] = True,
    flex: Annotated[
        bool, typer.Option("--flex/--sdpa", help="FlexAttention (CUDA) or SDPA with dense masks.")
    ] = True,
    context_gb: Annotated[float, opt("CUDA context and workspaces.", "GB", ASSUMED)] = 0.6,
    slack: Annotated[float, opt("Share of the card not to be had.", "SHARE", ASSUMED)] = 0.05,
    longest: Annotated[int, opt("Packed tokens of the longest row.", "TOKENS", ASSUMED)] = 1024,
    masked_share: Annotated[float, opt("Masked positions per packed token.", "SHARE", ASSUMED)] = 0.4,
    chunk_mb: Annotated[float, opt("Logits the loss makes at a time.", "MB", ASSUMED)] = 256.0,
    chunk_copies: Annotated[float, opt("Tensors of that size.", "N", ASSUMED)] = 3.0,
    config: Config = None,
    json: Json = False,
) -> None:
    """Memory that `tide train` would use, from the student's configuration alone; runs nothing.

    With --vram, the fastest settings that fit the card, which are those that tide train --vram uses.
    """
    from student.memory import Assumptions, Plan, Shape, estimate, fit
    from student.model import read_config
    from tools.commands.train import LORA_TARGETS, adapter_of

    assumed = Assumptions(
        context_gb=context_gb,
        slack=slack,
        row_tokens=longest,
        masked_share=masked_share,
        chunk_mb=chunk_mb,
        chunk_copies=chunk_copies,
    )
    shape = Shape.of(read_config(student))
    chosen = Plan(
        batch_tokens=batch_tokens,
        world=gpus,
        accumulation=accumulation,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        eight_bit_embedding=eight_bit_embedding,
        adapter=adapter_of(lora, qlora, None, 0.0, LORA_TARGETS),
        flex=flex,
    )
    needs = estimate(shape, chosen, assumed)
    if vram is not None:
        chosen, needs = fit(shape, vram, chosen, assumed)
    output = Output(as_json=json)
    output.report(memory_table(shape, chosen, needs, vram))
    output.result(
        {
            "command": "plan train",
            "student": student,
            "parameters": shape.parameters,
            "vram_gib": vram,
            "peak_bytes": needs.peak,
            "bytes": needs.parts,
            "moments": needs.moments,
            "micro_tokens": needs.micro_tokens,
            "settings": asdict(chosen),
            "assumptions": asdict(assumed),
        }
    )


def memory_table(shape: Shape, plan: Plan, needs: Estimate, vram: float | None) -> Table:
    """What an estimate says, with the settings and assumptions it rests on."""
    rows: list[tuple[Any, ...]] = [(name, size / 1e9) for name, size in needs.parts.items() if size]
    rows += [(f"in use at the {moment}", size / 1e9) for moment, size in needs.moments.items()]
    said = [f"{f.name} {getattr(plan, f.name)}" for f in fields(plan) if f.name != "adapter"]
    if plan.adapter is not None:
        said.append(f"{'QLoRA' if plan.adapter.four_bit else 'LoRA'} of rank {plan.adapter.rank}")
    assumed = [f"{f.name} {getattr(needs.assumptions, f.name):g}" for f in fields(needs.assumptions)]
    card = "" if vram is None else f" of {vram * 2**30 / 1e9:.1f} GB"
    return Table(
        title=f"{shape.parameters / 1e6:,.1f} M parameters: {needs.peak / 1e9:.1f} GB a GPU{card}",
        columns=(Column(label="", align="left"), Column(label="GB", digits=2)),
        rows=tuple(rows),
        note=f"settings: {', '.join(said)}; micro-batches of up to {needs.micro_tokens:,} tokens\n"
        f"assumed: {', '.join(assumed)}; gradients come as activations go: a moment is no sum of all",
    )
