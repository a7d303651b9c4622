"""Shared fixtures. Golden folder: `TIDE_GOLDEN`, default the project's copy. No test reaches a model hub."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

settings.register_profile("tide", deadline=None)  # a busy machine is no failure
settings.load_profile("tide")

GOLDEN = Path(os.environ.get("TIDE_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def tokenizer(name: str, template: str, specials: dict[str, str]) -> PreTrainedTokenizerFast:
    path = GOLDEN / "D_trace" / "models" / f"{name}_tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=template, **specials)


def trace_template(case: str, side: str) -> str:
    return json.loads((GOLDEN / "D_trace" / f"{case}.json").read_text())["chat_templates"][side]


def token_of(name: str, i: int) -> str:
    path = GOLDEN / "D_trace" / "models" / f"{name}_tokenizer.json"
    return next(t["content"] for t in json.loads(path.read_text())["added_tokens"] if t["id"] == i)


@pytest.fixture(scope="session")
def student_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 304 entries, ChatML template, mask 294, eos 292, pad 290."""
    specials = {"mask_token": 294, "eos_token": 292, "pad_token": 290}
    return tokenizer(
        "student",
        trace_template("A_cd_s1", "student"),
        {k: token_of("student", i) for k, i in specials.items()},
    )


@pytest.fixture(scope="session")
def teacher_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 entries, role template, mask 302, eos and pad 298."""
    specials = {"mask_token": 302, "eos_token": 298, "pad_token": 298}
    return tokenizer(
        "teacher",
        trace_template("A_cd_s1", "teacher"),
        {k: token_of("teacher", i) for k, i in specials.items()},
    )
