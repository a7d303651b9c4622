"""LoRA and QLoRA by peft: a trained run's adapter, and the plain student it merges into.

The merged student is what everything else uses (`tide eval`, `tide export`, another run's start); it is made
from the start's float32 weights and the saved adapter, also where training kept the weights in 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from student.config import AdapterConfig
from student.model import load_student, without_progress_bar


def load_for_training(path: str | Path, adapter: AdapterConfig | None, seed: int) -> tuple[Any, Any]:
    """The student and its tokenizer, with a fresh adapter, drawn from `seed`, where one is asked for.

    Raises: see `load_student`.
    """
    if adapter is None:
        return load_student(path)
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model, tokenizer = load_student(path, quantization=four_bit() if adapter.four_bit else None)
    if adapter.four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    wanted = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.scaled_by,  # type: ignore[arg-type]  # a float serves
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    return get_peft_model(model, wanted), tokenizer


def four_bit() -> Any:
    """bitsandbytes' settings of QLoRA (arXiv 2305.14314): NF4, constants quantised too, bfloat16 products."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def plain(model: Any) -> Any:
    """The network itself, adapter layers in place: transformers' class, of which peft's is a wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_merged(start: str | Path, adapter: Path, out: Path, *, block_size: int) -> None:
    """Write to `out` the student that `start` becomes with the adapter of a folder, as a plain folder.

    Raises: see `load_student`.
    """
    from peft import PeftModel

    model, tokenizer = load_student(start, attention="sdpa")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.config.block_size = block_size
    with without_progress_bar():
        merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
