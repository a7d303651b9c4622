"""Stage two stands alone: with precompute, tools and every teacher's runtime unimportable, a student trains.

Another process, so that nothing imported by other tests helps; an import hook refuses them.
"""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, importlib.abc, json, pkgutil, sys

REFUSED = {"precompute", "tools", "vllm", "ray"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)

sys.meta_path.insert(0, Refuse())
import student
for module in pkgutil.walk_packages(student.__path__, "student."):
    importlib.import_module(module.name)

from pathlib import Path
from transformers import PreTrainedTokenizerFast
from shards.codec import SparseCodec
from shards.noise import NoiseConfig
from shards.synthetic import synthetic_config, synthetic_rows
from shards.writer import DatasetWriter
from student.config import TrainConfig
from student.model import A2DQwen3Config, A2DQwen3LMHeadModel
from student.objective import parse_objective
from student.tokenizer import load_tokenizer, tokenizer_hash
from student.trainer import train

work, tokenizer_file = Path(sys.argv[1]), sys.argv[2]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
tokenizer.save_pretrained(work / "student")
A2DQwen3LMHeadModel(A2DQwen3Config(
    vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)).save_pretrained(work / "student")
noise, codec = NoiseConfig(views=1), SparseCodec(cap=8)
config = synthetic_config(noise, codec)
config["student"] |= {"tokenizer_hash": tokenizer_hash(load_tokenizer(work / "student")), "max_length": 32}
rows = list(synthetic_rows(0, 8, kind="shared", noise=noise, codec=codec, max_length=32))
with DatasetWriter(work / "data", "shared", config) as writer:
    writer.write_part(0, 0, 8, rows, {})
    writer.finish()
summary = train(work / "data", work / "student", work / "out", TrainConfig(steps=1), parse_objective("tidal"))
print(json.dumps({
    "finished": summary.finished,
    "modules": sorted({name.partition(".")[0] for name in sys.modules} & REFUSED),
}))
"""


def test_a_student_trains_without_precompute(tmp_path: Path, golden: Path) -> None:
    tokenizer = golden / "D_trace" / "models" / "student_tokenizer.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tokenizer)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '{"finished": true, "modules": []}'
