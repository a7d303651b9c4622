"""From messages to text: a student folder, its chat template, and the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoConfig

from shards.errors import ModelError, UsageError
from student.device import pick_device
from student.model import A2DQwen3Config, load_student, read_config
from student.sampler import BlockSampler
from student.tokenizer import read_tokenizer

DEFAULT_BLOCK = 32
"""Tokens per block where a student does not say what it was trained with."""


def load_sampler(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[BlockSampler, Any]:
    """A sampler over the student in a folder or hub id, and its tokenizer.

    Args:
        dtype: of the weights; None = bfloat16 on CUDA, else float32.
        device: None = cuda where there is one, else cpu.

    Raises:
        UsageError: no such device.
        ModelError: the folder holds no block-diffusion student, or a tokenizer without a mask token.
    """
    where = pick_device(device)
    read_config(path)
    config = AutoConfig.from_pretrained(str(path))
    if config.model_type != A2DQwen3Config.model_type:
        raise ModelError(
            f"{path}: model_type {config.model_type!r} is an autoregressive model, not a block-diffusion "
            "student; train it with tide train first"
        )
    mask = read_tokenizer(path).mask_token_id
    if mask is None:
        raise ModelError(f"{path}: the tokenizer has no mask token, so this is no student that tide trained")
    if mask >= config.vocab_size:  # loading would make up an embedding for it
        raise ModelError(
            f"{path}: the mask token {mask} is outside the model's {config.vocab_size} ids; the tokenizer "
            "does not belong to it"
        )
    number = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    model, tokenizer = load_student(path, dtype=number, attention="sdpa")
    return make_sampler(model.to(where).eval(), tokenizer), tokenizer


def make_sampler(model: Any, tokenizer: Any, *, static: bool | None = None) -> BlockSampler:
    """A sampler over a student in evaluation mode with SDPA attention; `static`: see `BlockSampler`."""
    ends = {tokenizer.eos_token_id, *_list(getattr(model.generation_config, "eos_token_id", None))}
    return BlockSampler(
        model,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_ids=sorted(ends),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        static=static,
    )


def block_size_of(sampler: BlockSampler) -> int:
    """Tokens per block that the student was trained with."""
    return getattr(sampler.model.config, "block_size", None) or DEFAULT_BLOCK


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, think: bool = False) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins. See `chat_text`."""
    return raw_ids(tokenizer, chat_text(tokenizer, messages, think=think))


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    think: bool = False,
    continue_last: bool = False,
) -> str:
    """A conversation in the student's chat template, up to where the assistant's answer begins.

    Args:
        think: leave the template's thinking block open, where it has one; else an empty one is put there.
        continue_last: the last message is the beginning of that answer, to be gone on with.

    Raises:
        UsageError: no chat template, or one that refuses these messages.
    """
    if not isinstance(tokenizer.chat_template, str):
        raise UsageError("the student's tokenizer has no chat template: pass --raw to complete plain text")
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not continue_last,
            continue_final_message=continue_last,
            enable_thinking=think,
        )
    except (TemplateError, ValueError) as e:
        raise UsageError(f"the chat template refuses the messages: {str(e).splitlines()[0]}") from e


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
