"""Settings of a training run. Heavy imports are local: the command line reads defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from shards.errors import UsageError

Schedule = Literal["cosine", "linear", "constant"]

CONFIG_FILE, METRICS, SAMPLES = "train_config.json", "metrics.jsonl", "samples.jsonl"
"""In a run's folder: what the run is, a JSON line for each record, a JSON line for each text written."""

CHANGEABLE = frozenset(
    {
        "row_tokens",
        "accumulation",
        "gradient_checkpointing",
        "workers",
        "log_every",
        "save_every",
        "keep",
        "eval_every",
        "eval_samples",
        "keep_best",
        "sample_every",
        "samples",
        "sample_tokens",
        "report_to",
        "trainer_args",
    }
)
"""Fields that may differ on resume: they decide memory, speed and files, not what is learnt."""
REPORTERS = ("tensorboard", "wandb", "trackio")
"""Libraries that metrics may go to besides the console and metrics.jsonl."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """LoRA (arXiv 2106.09685): low-rank updates of frozen weights; QLoRA (2305.14314) with `four_bit`."""

    rank: int = 16
    alpha: float | None = None
    """Updates are scaled by alpha / rank; None = twice the rank."""
    dropout: float = 0.0
    """Of the updates' inputs."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Names of the linear layers that get one; never the head, which the loss reads as it is."""
    four_bit: bool = False
    """Keep the frozen weights in 4 bits (NF4, double quantisation); needs bitsandbytes."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"the rank of LoRA must be at least 1, got {self.rank}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.targets or set(self.targets) & {"lm_head", "embed_tokens"}:
            raise UsageError(
                f"LoRA targets must be linear layers such as {', '.join(LORA_TARGETS)}, not the head or the "
                f"embedding; got {', '.join(self.targets) or 'none'}"
            )

    @property
    def scaled_by(self) -> float:
        """alpha, resolved."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything but data, student and objective."""

    steps: int
    """Optimiser steps; learning rate and lambda schedules run over them."""
    batch_tokens: int = 8192
    """Packed student tokens, clean and noisy, per optimiser step, over all ranks and micro-batches."""
    row_tokens: int | None = None
    """Packed row length; None = 4096 on CUDA, else a micro-batch is one row, without padding."""
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
    eight_bit_embedding: bool = False
    """With an 8-bit optimiser: keep the embedding's state in 8 bits too, which transformers keeps in 32."""
    adapter: AdapterConfig | None = None
    """Train a low-rank update of the student's weights; None = the weights themselves."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and run the layer again in the backward pass: less memory, about a third
    more work."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 = never."""
    bf16: bool | None = None
    """Compute in bfloat16 by autocast, weights float32; None = where CUDA offers it."""
    fresh_noise: float | None = None
    """Share of the rows that redraw their noise and carry CE alone (`student.fresh`); None = where the
    run meets stored views more than once 0.25, or 1 if CE is all there is; else 0 (`student.fresh`)."""
    seed: int = 0
    """Of the data order and of fresh noise."""
    log_every: int = 10
    """Steps between lines on the console and in metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept."""
    workers: int | None = None
    """Processes that read and pack batches ahead of training; 0 = this one does; None = 1 with CUDA, else
    0."""
    eval_every: int | None = None
    """Steps between evaluations on held-out samples, always with the same masks; None = never."""
    eval_samples: int = 128
    """Most held-out samples an evaluation looks at."""
    keep_best: bool = False
    """Keep the student of the best evaluation in the run's folder `best`."""
    sample_every: int | None = None
    """Steps between texts written for held-out prompts (`student.samples`); None = never."""
    samples: int = 3
    """Held-out prompts that texts are written for."""
    sample_tokens: int = 64
    """Tokens of such a text, at most."""
    report_to: tuple[str, ...] = ()
    """Where metrics also go: names of `REPORTERS`."""
    trainer_args: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of transformers.TrainingArguments, as they are (fsdp, fsdp_config, deepspeed, ...)."""

    def __post_init__(self) -> None:
        for name in (
            *("steps", "batch_tokens", "row_tokens", "accumulation"),
            *("log_every", "save_every", "keep", "eval_every", "eval_samples"),
            *("sample_every", "samples", "sample_tokens"),
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")
        if self.keep_best and self.eval_every is None:
            raise UsageError("keep_best needs evaluations to compare; set eval_every")
        if self.schedule not in get_args(Schedule):
            raise UsageError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise UsageError(f"warmup is a share of the steps, at least 0 and below 1, got {self.warmup}")
        if self.fresh_noise is not None and not 0.0 <= self.fresh_noise <= 1.0:
            raise UsageError(f"fresh_noise is a share of the rows, from 0 to 1, got {self.fresh_noise}")
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate must be positive, got {self.learning_rate}")

    def resolved(self) -> TrainConfig:
        """With every None replaced by what this machine decides."""
        import torch

        cuda = torch.cuda.is_available()
        return replace(
            self,
            row_tokens=self.row_tokens or (4096 if cuda else self.batch_tokens),
            bf16=(cuda and torch.cuda.is_bf16_supported()) if self.bf16 is None else self.bf16,
        )


def check_libraries(config: TrainConfig) -> None:
    """Refuse what this installation cannot do, before anything is loaded.

    Raises:
        UsageError: an optional library is missing, or a reporter is unknown.
    """

    def need(module: str, what: str, otherwise: str) -> None:
        if find_spec(module) is None:
            raise UsageError(f"{what} needs {module}: pip install {module}, or {otherwise}")

    if config.adapter is not None:
        need("peft", "LoRA", "train all weights")
        if config.adapter.four_bit:
            need("bitsandbytes", "4-bit LoRA", "use LoRA on plain weights")
    if "bnb" in config.optimizer or "8bit" in config.optimizer:
        need("bitsandbytes", f"optimizer {config.optimizer}", "use adamw_torch")
    for name in config.report_to:
        if name not in REPORTERS:
            raise UsageError(f"report_to must be among {', '.join(REPORTERS)}, got {name!r}")
        need(name, f"reporting to {name}", "leave it out: metrics.jsonl has every figure")


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
        "report_to": list(config.report_to) or "none",
        "run_name": out.name,
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
        "log_level": "error",
        "log_level_replica": "error",
        "ddp_find_unused_parameters": False,
    }
    try:
        return TrainingArguments(**ours | defaults | dict(config.trainer_args))
    except (TypeError, ValueError, ImportError) as e:
        raise UsageError(f"training arguments: {str(e).strip().splitlines()[0]}") from e
