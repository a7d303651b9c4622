"""Model folders and a corpus small enough that a whole `tide precompute` takes a fraction of a second."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

TEXT = "the river runs past an old mill and nobody asks it where to; two plus two is four, so far."
WORDS = TEXT.split()
OTHER = "{% for m in messages %}{{ '# ' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '# assistant: ' }}{% endif %}"
)


def conversation(i: int) -> dict[str, Any]:
    text = [" ".join(np.roll(WORDS, -3 * i - k)[: 4 + (5 * i + 3 * k) % 9]) for k in range(2)]
    return {"messages": [{"role": "user", "content": text[0]}, {"role": "assistant", "content": text[1]}]}


def write_corpus(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_folders(
    root: Path,
    golden: Path,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """`root` with model folders `student`, `teacher_dense` (same tokenizer), `teacher_other` (another
    template), `teacher_moe` (another tokenizer), and corpus.jsonl of 11 conversations."""
    for name, source, tokenizer in (
        ("student", "student", student_tokenizer),
        ("teacher_dense", "teacher_dense", student_tokenizer),
        ("teacher_other", "teacher_dense", student_tokenizer),
        ("teacher_moe", "teacher_moe", teacher_tokenizer),
    ):
        shutil.copytree(golden / "D_trace" / "models" / source, root / name)
        tokenizer.save_pretrained(root / name)
    (root / "teacher_other" / "chat_template.jinja").write_text(OTHER)
    write_corpus(root / "corpus.jsonl", [conversation(i) for i in range(11)])
    return root
