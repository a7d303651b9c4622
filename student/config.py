"""Settings of a training run. Heavy imports are local: the command line reads defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from shards.errors import UsageError

Schedule = Literal["cosine", "linear", "constant"]

CHANGEABLE = frozenset({"row_tokens", "accumulation", "log_every", "save_every", "keep", "trainer_args"})
"""Fields that may differ on resume: they decide memory, speed and files, not what is learnt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything but data, student and objective."""

    steps: int
    """Optimiser steps; learning rate and lambda schedules run over them."""
    batch_tokens: int = 8192
    """Packed student tokens, clean and noisy, per optimiser step, over all ranks and micro-batches."""
    row_tokens: int | None = None
    """Packed row length; None = 512 on a CPU (dense masks), 4096 on CUDA (empty tiles are skipped)."""
    accumulation: int = 1
    """Micro-batches a rank cuts its share of a step into; lowers memory, changes nothing else."""
    learning_rate: float = 5e-5
    """Peak learning rate (paper: 5e-5)."""
    schedule: Schedule = "cosine"
    """Learning rate after warm-up: `cosine` or `linear` down to 0, or `constant`."""
    warmup: float = 0.1
    """Share of the steps with linearly rising learning rate."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    optimizer: str = "adamw_torch"
    """transformers' `optim`, for example `adamw_bnb_8bit`."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 = never."""
    bf16: bool | None = None
    """Compute in bfloat16 by autocast, weights float32; None = where CUDA offers it."""
    seed: int = 0
    """Of the data order."""
    log_every: int = 10
    """Steps between lines on the console and in metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept."""
    trainer_args: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of transformers.TrainingArguments, as they are (fsdp, deepspeed, report_to, ...)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "accumulation", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.row_tokens is not None and self.row_tokens < 1:
            raise UsageError(f"row_tokens must be at least 1, got {self.row_tokens}")
        if self.schedule not in get_args(Schedule):
            raise UsageError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise UsageError(f"warmup is a share of the steps, at least 0 and below 1, got {self.warmup}")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate must be positive, got {self.learning_rate}")

    def resolved(self) -> TrainConfig:
        """With every None replaced by what this machine decides."""
        import torch

        cuda = torch.cuda.is_available()
        return replace(
            self,
            row_tokens=self.row_tokens or (4096 if cuda else 512),
            bf16=(cuda and torch.cuda.is_bf16_supported()) if self.bf16 is None else self.bf16,
        )


def training_arguments(config: TrainConfig, out: Path) -> Any:
    """`transformers.TrainingArguments` for a resolved configuration.

    Raises:
        UsageError: `trainer_args` names an unknown argument, or one that a field of TrainConfig decides.
    """
    import torch
    from transformers import TrainingArguments

    ours: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": config.steps,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        "warmup_steps": round(config.warmup * config.steps),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "optim": config.optimizer,
        "max_grad_norm": config.max_grad_norm,
        "bf16": bool(config.bf16),
        "seed": config.seed,
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_steps": config.save_every,
        "save_strategy": "steps",
        "ignore_data_skip": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    taken = sorted(ours.keys() & config.trainer_args.keys())
    if taken:
        raise UsageError(
            f"trainer_args: {', '.join(taken)} is decided by the training configuration; set it there"
        )
    defaults = {
        "report_to": "none",
        "log_level": "error",
        "log_level_replica": "error",
        "ddp_find_unused_parameters": False,
    }
    try:
        return TrainingArguments(**ours | defaults | dict(config.trainer_args))
    except (TypeError, ValueError, ImportError) as e:
        raise UsageError(f"training arguments: {str(e).strip().splitlines()[0]}") from e
