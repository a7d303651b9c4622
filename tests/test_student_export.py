"""The self-contained export, read where tide cannot be imported: the logits are those that tide computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shards.errors import ModelError, UsageError
from student.export import export_student
from student.model import A2DQwen3LMHeadModel, load_student
from student.tokenizer import load_tokenizer, tokenizer_hash

WITHOUT_TIDE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("student", "shards", "precompute", "tools"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = torch.tensor([tokenizer("the cat <|mask|> on").input_ids])
found = {"ids": ids}
for cls in (AutoModelForCausalLM, AutoModelForMaskedLM):
    model = cls.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found[cls.__name__] = model(input_ids=ids).logits
assert not {"student", "shards"} & sys.modules.keys()
save_file(found, out)
"""


def test_loads_where_tide_cannot_be_imported(model: Path, tmp_path: Path) -> None:
    exported, found = tmp_path / "exported", tmp_path / "logits.safetensors"
    size = export_student(model, exported)
    assert size == sum(p.stat().st_size for p in exported.iterdir())
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TIDE, str(exported), str(found)],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        check=True,
    )
    theirs = load_file(found)
    ours, tokenizer = load_student(model, attention="sdpa")
    assert theirs["ids"][0].tolist() == tokenizer("the cat <|mask|> on").input_ids
    assert tokenizer.mask_token_id in theirs["ids"]
    with torch.no_grad():
        logits = ours.eval()(input_ids=theirs["ids"]).logits
    for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        torch.testing.assert_close(theirs[name], logits, rtol=0, atol=0)


def test_an_export_is_a_student_again(model: Path, tmp_path: Path) -> None:
    """With our class, not the copy beside it; what is saved from it names no file that is not there."""
    export_student(model, tmp_path / "exported")
    again, tokenizer = load_student(tmp_path / "exported")
    assert type(again) is A2DQwen3LMHeadModel
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(model))
    again.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is A2DQwen3LMHeadModel


def test_number_format(model: Path, tmp_path: Path) -> None:
    export_student(model, tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_refusals(model: Path, tmp_path: Path) -> None:
    """Nothing is overwritten, and nothing is left behind where the student cannot be loaded."""
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        export_student(model, tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        export_student(tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_importing_the_package_is_enough(model: Path) -> None:
    """A checkpoint is read by plain transformers once `student` is imported."""
    script = (
        "import sys, student; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "A2DQwen3LMHeadModel"
