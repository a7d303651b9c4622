"""What options of `tide train` mean together: adapters, sharding, a card's memory, a preset's differences."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from shards.errors import UsageError
from tools.console import Output

if TYPE_CHECKING:
    from student.config import AdapterConfig, TrainConfig

logger = logging.getLogger(__name__)


def adapter_of(
    rank: int | None, four_bit: bool, alpha: float | None, dropout: float, targets: str
) -> AdapterConfig | None:
    """The adapter that the LoRA options describe, if any."""
    from student.config import AdapterConfig

    if rank is None and not four_bit:
        return None
    default = AdapterConfig()
    return AdapterConfig(
        rank=default.rank if rank is None else rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(filter(None, targets.split(","))),
        four_bit=four_bit,
    )


def sharding(fsdp: bool, deepspeed: Path | None) -> dict[str, Any]:
    """transformers' arguments for weights sharded over GPUs."""
    if deepspeed is not None and not deepspeed.is_file():
        raise UsageError(f"--deepspeed {deepspeed}: no such file; pass DeepSpeed's settings as JSON")
    if fsdp and deepspeed is not None:
        raise UsageError("--fsdp and --deepspeed exclude each other: both shard the weights")
    if fsdp:
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
        return {"fsdp": True, "fsdp_config": wrapped}
    return {} if deepspeed is None else {"deepspeed": str(deepspeed)}


def explain(name: str, manifest: Any) -> None:
    """Say what a preset is, and where this run is not the paper's."""
    from student.presets import preset_named

    preset = preset_named(name)
    logger.info("%s: %s; differs: %s", name, preset.about, preset.differs)
    if other := ", ".join(preset.of_dataset(manifest)):
        logger.warning("%s: the dataset differs from the paper's: %s", name, other)


def fit_card(ctx: typer.Context, student: str, vram: float, settings: TrainConfig) -> TrainConfig:
    """The settings with those that `--vram` picks, where nobody gave them; prints what they should use."""
    from dataclasses import replace

    import torch

    from student.memory import Plan, Shape, estimate, fit
    from student.model import read_config
    from tools.commands.plan import memory_table

    def given(option: str) -> bool:
        source = ctx.get_parameter_source(option)
        return source is not None and source.name != "DEFAULT"

    cuda = torch.cuda.is_available()
    wanted = settings.optimizer if given("optimizer") or not cuda else "adamw_bnb_8bit"
    plan = Plan(
        batch_tokens=settings.batch_tokens,
        world=int(os.environ.get("WORLD_SIZE", "1")),
        bf16=settings.bf16 is not False,
        optimizer=wanted,
        adapter=settings.adapter,
    )
    shape = Shape.of(read_config(student))
    chosen, needs = fit(shape, vram, plan)
    picks: dict[str, Any] = {
        "optimizer": chosen.optimizer,
        "gradient_checkpointing": chosen.gradient_checkpointing,
        "eight_bit_embedding": chosen.eight_bit_embedding,
        "accumulation": chosen.accumulation,
        "row_tokens": min(4096, needs.micro_tokens) if cuda else None,
    }
    kept = {name: getattr(settings, name) for name in picks if given(name)}
    if kept.keys() & {"accumulation", "gradient_checkpointing", "eight_bit_embedding"}:
        changes = {k: v for k, v in kept.items() if k not in ("optimizer", "row_tokens")}
        chosen = replace(chosen, **changes)
        needs = estimate(shape, chosen)
    ctx.params.update(picks | kept)  # what was picked is saved with the options
    Output(as_json=True).report(memory_table(shape, chosen, needs, vram))
    return replace(settings, **picks | kept)
