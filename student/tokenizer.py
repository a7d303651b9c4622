"""The student's tokenizer: loading it with the ids diffusion needs, and the hash that ties a dataset to
it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from shards.errors import ModelError

MASK_TOKEN = "<|mask|>"
"""Content of the mask token that is added to a tokenizer without one (the released a2d-qwen3 students use it
too)."""


def read_tokenizer(path: str | Path, *, tokenizer_type: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id as it is published; runs no code of it.

    Its own files alone decide: a configuration given here keeps the library from reading config.json, whose
    model type it need not know and whose older fields it would warn about.

    Args:
        tokenizer_type: the library's tokenizer to read the files with; None = the one they name.

    Raises:
        ModelError: no tokenizer there.
    """
    how: dict[str, Any] = {"tokenizer_type": tokenizer_type} if tokenizer_type else {}
    try:
        return AutoTokenizer.from_pretrained(
            str(path), config=PreTrainedConfig(), trust_remote_code=False, **how
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ModelError(
            f"{path}: no tokenizer found ({_first_line(e)}); a model folder needs tokenizer.json and "
            "tokenizer_config.json"
        ) from e


def load_tokenizer(path: str | Path, *, tokenizer_type: str | None = None) -> Any:
    """The fast tokenizer of a model folder or hub id, with mask, eos and pad ids.

    A missing mask token is added (`MASK_TOKEN`), a missing pad token is set to eos. The result depends on the
    folder alone, so that both stages see equal ids and equal hashes.

    Args:
        tokenizer_type: see `read_tokenizer`.

    Raises:
        ModelError: no tokenizer there, no `tokenizer.json` form of it, or no eos token.
    """
    tokenizer = read_tokenizer(path, tokenizer_type=tokenizer_type)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"{path}: the tokenizer has no tokenizer.json form; convert it to a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what decides ids: model, normalizer, pre-tokenizer, added tokens, special ids.

    Left out: what a call changes (truncation, padding), what acts on finished ids (post-processor, decoder),
    and the chat template. Equal before and after `save_pretrained`.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    decides: dict[str, Any] = {name: spec.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
    decides["added_tokens"] = sorted((t["id"], t["content"]) for t in spec.get("added_tokens") or ())
    decides["special_ids"] = [tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    text = json.dumps(decides, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).strip().splitlines()[0]
