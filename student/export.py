"""A student for people without tide: a transformers folder with its own modelling file.

Checkpoints hold weights, configuration and tokenizer, which transformers reads once `student` is imported. An
export adds the network's source and names it in config.json (`auto_map`), so that
`from_pretrained(folder, trust_remote_code=True)` needs torch and transformers alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from shards.errors import UsageError
from student import modeling_a2d_qwen3 as modeling
from student.model import load_student, without_progress_bar

AUTO_CLASSES = {
    "AutoConfig": modeling.A2DQwen3Config,
    "AutoModel": modeling.A2DQwen3Model,
    "AutoModelForCausalLM": modeling.A2DQwen3LMHeadModel,
    "AutoModelForMaskedLM": modeling.A2DQwen3LMHeadModel,
}
README = """---
library_name: transformers
pipeline_tag: text-generation
tags: [diffusion-language-model, block-diffusion]
---

A block-diffusion language model of the family `a2d-qwen3`: Qwen3 with bidirectional attention, whose output i
predicts token i. Needs torch and transformers; the network is in `{file}`.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

A masked token is written `{mask}` (id {mask_id}); `logits.argmax(-1)` at its place is the best guess at it.
"""


def export_student(model: str | Path, out: Path, *, dtype: torch.dtype = torch.float32) -> int:
    """Write a self-contained folder: config.json, modelling file, safetensors, tokenizer, README.md.

    config.json is written last: a folder that has one is complete.

    Args:
        model: student folder or hub id, or a Qwen3 checkpoint, which becomes a student.
        out: a new or empty folder.
        dtype: of the weights.

    Returns:
        Bytes written.

    Raises:
        ModelError: `model` cannot be loaded.
        UsageError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: not an empty folder; name a new one")
    student, tokenizer = load_student(model, dtype=dtype, attention="sdpa")
    source = Path(modeling.__file__)
    out.mkdir(parents=True, exist_ok=True)
    with without_progress_bar():
        student.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").unlink()
    tokenizer.save_pretrained(out)
    shutil.copyfile(source, out / source.name)
    (out / "README.md").write_text(
        README.format(file=source.name, mask=tokenizer.mask_token, mask_id=tokenizer.mask_token_id)
    )
    config["auto_map"] = {name: f"{source.stem}.{c.__name__}" for name, c in AUTO_CLASSES.items()}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(p.stat().st_size for p in out.iterdir())
