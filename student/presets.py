"""The paper's training settings by name: plain options of `tide train`, below every flag and file.

The paper (arXiv 2604.26951) and the scripts published with it differ in places; a preset follows the paper
and says where. What a preset takes the dataset to be is decided when that is made; a difference is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import UsageError
from shards.manifest import Manifest

PADDED_TOKENS = 2 * 512
"""Of a sample in the paper's [noisy, clean] layout."""
BLOCK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One run of the paper."""

    about: str
    options: Mapping[str, Any]
    """Option of `tide train` (no dashes, `_` for `-`) -> value."""
    compdemo: bool
    """Whether its dataset was made with CompDemo."""
    differs: str
    """Where this departs from the published script, or from the paper."""

    def of_dataset(self, manifest: Manifest) -> Iterator[str]:
        """What this dataset is that the paper's is not, in words."""
        if manifest.block_size != BLOCK:
            yield f"blocks of {manifest.block_size} (paper: {BLOCK})"
        if manifest.noise.compdemo != self.compdemo:
            has, had = ("CompDemo", "none") if manifest.noise.compdemo else ("no CompDemo", "with it")
            yield f"{has} (paper: {had})"
        if manifest.student.max_length != PADDED_TOKENS // 2:
            yield f"samples of up to {manifest.student.max_length} tokens (paper: {PADDED_TOKENS // 2})"


COMMON = {
    "epochs": 10.0,
    "lr": 5e-5,
    "temperature": 2.0,
    "ce_weight": 1.0,
    "ce_weighting": "scheduler",
    "ce_normalisation": "token",
    "fresh_noise": 0.0,
}
SHARED = COMMON | {
    "objective": "tidal",
    "lambda_initial": 0.1,
    "lambda_max": 0.9,
    "lambda_decay": "cosine",
    "lambda_axes": "both",
    "timestep_weighting": "mid-range",
    "batch_tokens": 10 * PADDED_TOKENS,
}
CROSS = COMMON | {"objective": "reverse-calm", "chunk_temperature": 5.0, "batch_tokens": 8 * PADDED_TOKENS}

STORED = "noise is the dataset's stored views in turn, not drawn at every step"
SHARED_DIFFERS = f"10 epochs (paper; script: 3); a batch of the tokens of 10 padded samples; {STORED}"
CROSS_DIFFERS = (
    "10 epochs (paper; script: 2); a batch of the tokens of 8 padded samples; chunk temperature 5 (script; "
    f"its code's default: 2); {STORED}"
)


def _shared(about: str, *, compdemo: bool = True, **options: Any) -> Preset:
    return Preset(about=about, options=SHARED | options, compdemo=compdemo, differs=SHARED_DIFFERS)


def _cross(about: str, *, compdemo: bool = False, **options: Any) -> Preset:
    return Preset(about=about, options=CROSS | options, compdemo=compdemo, differs=CROSS_DIFFERS)


PRESETS: dict[str, Preset] = {
    "paper-shared": _shared("TIDE-Shared, one tokenizer: TIDAL with CompDemo"),
    "paper-cross": _cross("TIDE-Cross, two tokenizers: Reverse CALM"),
    "paper-ablation-shared-ce": _shared("CE alone, one tokenizer", objective="ce"),
    "paper-ablation-shared-kl": _shared("KL, one tokenizer", objective="kl", compdemo=False),
    "paper-ablation-shared-tide-cross": _shared(
        "TIDE-Cross on one tokenizer, which is reverse KL in the paper's code",
        objective="reverse-kl",
        compdemo=False,
    ),
    "paper-ablation-shared-no-timestep-axis": _shared(
        "Table 2: TIDE-Shared, lambda over training alone", lambda_axes="training_only"
    ),
    "paper-ablation-shared-no-compdemo": _shared("Table 2: TIDE-Shared without CompDemo", compdemo=False),
    "paper-ablation-cross-ce": _cross("CE alone, two tokenizers", objective="ce"),
    "paper-ablation-cross-calm": _cross("CALM, two tokenizers", objective="calm"),
    "paper-ablation-cross-tide-shared": _cross(
        "TIDE-Shared on two tokenizers: CALM-TIDAL with CompDemo",
        objective="calm-tidal",
        compdemo=True,
        lambda_initial=0.1,
        lambda_max=0.9,
        lambda_decay="cosine",
        lambda_axes="both",
    ),
}


def preset_named(name: str) -> Preset:
    """
    Raises:
        UsageError: no such preset (lists them).
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
