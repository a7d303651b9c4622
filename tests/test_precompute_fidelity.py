"""`--sketch`, `--codec exact` and `--fidelity`, from precompute to training, on golden models."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load
from small_precompute import conversation, write_corpus
from test_precompute_runner import rows_of
from transformers import PreTrainedTokenizerFast

from precompute.config import PrecomputeConfig
from precompute.runner import precompute
from shards.card import card
from shards.codec import Codec, DenseCodec, ExactCodec, SparseCodec
from shards.errors import ConfigMismatch, CorruptShard, UsageError
from shards.merge import merge
from shards.pull import pull
from shards.reader import LogitDataset
from shards.verify import verify
from student.batch import collate
from student.config import TrainConfig
from student.objective import parse_objective
from student.tables import dataset_table
from student.tensors import with_table
from student.trainer import train
from tools.commands.precompute import fidelity_line

Make = Callable[..., PrecomputeConfig]
SKETCH = SparseCodec(cap=12, sketch=6, sketch_step=0.1)


@pytest.fixture
def make(tmp_path: Path, golden: Path, student_tokenizer: PreTrainedTokenizerFast) -> Make:
    for name, source in (("student", "student"), ("teacher", "teacher_dense")):
        shutil.copytree(golden / "D_trace" / "models" / source, tmp_path / name)
        student_tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    corpus = write_corpus(tmp_path / "corpus.jsonl", [conversation(i) for i in range(11)])

    def settings(codec: Codec, out: str, **changes: Any) -> PrecomputeConfig:
        return PrecomputeConfig(
            teacher=str(tmp_path / "teacher"),
            student=str(tmp_path / "student"),
            corpus=str(corpus),
            out=tmp_path / out,
            codec=codec,
            **{"views": 2, "samples_per_part": 4, "row_tokens": 1024, "max_length": 96, "max_dropped": 1.0}
            | changes,
        )

    return settings


def losses(out: Path, text: str, temperature: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of an objective on all rows, student logits being random, and its gradient."""
    dataset = LogitDataset(out)
    m = dataset.manifest
    codec = m.codec
    rows = list(rows_of(out).values())
    batch = collate(
        sorted(rows, key=lambda r: (r.sample_id, r.view)),
        block_size=m.block_size,
        mask_token_id=m.student.mask_token_id,
        row_tokens=4096,
        shared_vocab_size=m.shared_vocab_size,
        temperatures=codec.temperatures if isinstance(codec, SparseCodec) else (),
    )
    assert batch.positions is not None
    target = with_table(batch.positions.target, dataset_table(dataset))
    batch = dataclasses.replace(batch, positions=dataclasses.replace(batch.positions, target=target))
    torch.manual_seed(0)
    logits = (3 * torch.randn(len(batch.gold), m.student.vocab_size)).requires_grad_()
    objective = parse_objective(text, temperature=temperature)
    loss = objective(logits, batch, 0.5).total
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_exact_is_dense(make: Make, temperature: float) -> None:
    """From hidden states and head: every loss and gradient of the dense codec, at any temperature."""
    exact, dense = make(ExactCodec(), "exact"), make(DenseCodec(), "dense")
    for config in (exact, dense):
        precompute(config)
    text = "tidal+kl+reverse-kl:0.5+reverse-calm"
    for got, want in zip(losses(exact.out, text, temperature), losses(dense.out, text, temperature)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_the_head_comes_along_with_its_licence(make: Make, tmp_path: Path) -> None:
    manifest = precompute(make(ExactCodec(), "exact"))
    (file,) = manifest.settings.files
    assert (file.file, file.licence) == ("head.safetensors", "apache-2.0")
    assert (tmp_path / "exact" / file.file).stat().st_size == file.bytes
    assert "apache-2.0" in card(manifest).split("file head.safetensors")[1].splitlines()[0]
    pull(tmp_path / "exact", tmp_path / "copy")
    assert not verify(tmp_path / "copy", full=True).problems
    with open(tmp_path / "copy" / file.file, "r+b") as f:
        f.seek(file.bytes - 5)
        f.write(b"!")
    assert [p.file for p in verify(tmp_path / "copy").problems] == [file.file]
    with pytest.raises(CorruptShard, match=r"head\.safetensors: the file: sha256 differs"):
        dataset_table(LogitDataset(tmp_path / "copy"))


def test_bfloat16_states_are_stored_in_two_bytes(make: Make) -> None:
    manifest = precompute(make(ExactCodec(), "exact", dtype="bfloat16", limit=3))
    assert isinstance(manifest.codec, ExactCodec)
    assert manifest.codec.dtype == "bfloat16"
    for row in rows_of(make(ExactCodec(), "exact").out).values():
        assert row.positions is not None
        hidden = torch.from_numpy(row.positions.target.hidden)  # type: ignore[union-attr]
        torch.testing.assert_close(hidden.bfloat16().float(), hidden, rtol=0, atol=0)


def test_a_sketch_is_made_once_and_read_again(make: Make, tmp_path: Path) -> None:
    """Basis in the identity; a longer corpus, other workers and another dataset use the same file."""
    first = precompute(make(SKETCH, "a", limit=4))
    grown = precompute(make(SKETCH, "a"))
    assert grown.identity == first.identity
    assert isinstance(grown.codec, SparseCodec)
    table = (tmp_path / "a" / "sketch.safetensors").read_bytes()
    other = precompute(make(SKETCH, "b", sketch_from=str(tmp_path / "a"), seed=3))
    assert (tmp_path / "b" / "sketch.safetensors").read_bytes() == table
    assert other.settings.files[0].sha256 == grown.settings.files[0].sha256
    basis, weight = (load(table)[n].double() for n in ("basis", "weight"))
    gram = basis.T @ (weight[:, None] * basis)
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64), rtol=0, atol=5e-3)
    for i in range(2):
        precompute(make(SKETCH, f"half{i}", part=f"{i}/2"))
    merged = merge(tmp_path / "whole", [tmp_path / "half0", tmp_path / "half1"]).manifest
    assert [s.sha256 for s in merged.shards] == [s.sha256 for s in grown.shards]
    assert not verify(tmp_path / "whole", full=True).problems


def test_codes_are_the_projections_of_dense_log_probs(make: Make, tmp_path: Path) -> None:
    """c = U^T W (x - m), x the dense codec's log-probs centred in the weights; within half a step, or
    clipped."""
    manifest = precompute(make(SKETCH, "sparse"))
    precompute(make(DenseCodec(), "dense"))
    codec = manifest.codec
    assert isinstance(codec, SparseCodec)
    found = load((tmp_path / "sparse" / "sketch.safetensors").read_bytes())
    basis, mean, w = (found[n].double().numpy() for n in ("basis", "mean", "weight"))
    limit = np.where(np.arange(6) < codec.sketch_wide, 127, 7)
    dense = rows_of(tmp_path / "dense")
    for key, row in rows_of(tmp_path / "sparse").items():
        assert row.positions is not None
        assert dense[key].positions is not None
        logp = dense[key].positions.target.logp.astype(float)  # type: ignore[union-attr]
        x = logp - (logp @ w)[:, None] - mean
        codes = (x * w) @ basis / codec.sketch_step
        got = row.positions.target.sketch  # type: ignore[union-attr]
        assert np.abs(got - np.clip(codes, -limit, limit)).max(initial=0) <= 0.51


def test_refusals(make: Make, tmp_path: Path, golden: Path) -> None:
    precompute(make(SparseCodec(cap=12), "plain", limit=3))
    with pytest.raises(ConfigMismatch, match=r"codec\.sketch: 0 -> 6"):
        precompute(make(SKETCH, "plain"))
    assert not (tmp_path / "plain" / "sketch.safetensors").exists()
    with pytest.raises(UsageError, match="this dataset has no sketch"):
        precompute(make(SKETCH, "x", sketch_from=str(tmp_path / "plain")))
    with pytest.raises(UsageError, match="--sketch R"):
        make(DenseCodec(), "x", sketch_from="y")


@pytest.mark.parametrize(
    "codec", [SparseCodec(cap=8), SKETCH, ExactCodec(), DenseCodec()], ids=lambda c: c.name
)
def test_fidelity_is_in_the_manifest_and_the_same_for_all(make: Make, tmp_path: Path, codec: Codec) -> None:
    """Bytes, KL, and every gradient; two workers on one folder, one after the other, agree with one alone."""
    single = precompute(make(codec, "one", fidelity=3))
    precompute(make(codec, "two", fidelity=3, part="0/2"))
    shared = precompute(make(codec, "two", fidelity=3, part="1/2"))
    measured = single.fidelity
    assert measured == shared.fidelity
    assert measured is not None
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (
        tmp_path / "two" / "manifest.json"
    ).read_bytes()
    names = {"tidal 0.1", "tidal 0.45", "tidal 0.9", "kl", "reverse-kl"}
    assert measured["gradient_cosine"].keys() == measured["gradient_relative_error"].keys() == names
    sizes = measured["bytes_per_masked_position"]
    assert math.isclose(sizes["all"], sum(v for k, v in sizes.items() if k != "all"))
    assert measured["positions"] > 20
    if isinstance(codec, SparseCodec):
        assert 0 < measured["kl_mean"] < measured["kl_p99"] < 1
        assert 0.5 < measured["gradient_cosine"]["tidal 0.9"] < 1
    else:
        assert abs(measured["kl_mean"]) < 1e-5
        assert min(measured["gradient_cosine"].values()) > 0.9999
    assert "Fidelity" in card(single)
    assert f"{measured['positions']} positions: {sizes['all']:.1f} bytes each" in fidelity_line(measured)
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["fidelity"] == measured


def plain_rows(folder: Path) -> list[dict[str, Any]]:
    """The columns of a dataset, without our code."""
    files = sorted(folder.glob("*.arrow"))
    return pa.concat_tables(pa.ipc.open_file(pa.memory_map(str(f))).read_all() for f in files).to_pylist()


def test_a_sketch_and_hidden_states_are_readable_without_us(make: Make, tmp_path: Path) -> None:
    """By FORMAT.md alone: hidden states and head give the dense log-probs; codes and basis give coefficients,
    and a tail that is nearer to the teacher's than its mean shape is."""
    for name, codec in (("exact", ExactCodec()), ("sketch", SKETCH), ("dense", DenseCodec())):
        precompute(make(codec, name))
    weight = load((tmp_path / "exact" / "head.safetensors").read_bytes())["weight"].numpy()
    vocab = len(weight)
    settings = json.loads((tmp_path / "sketch" / "manifest.json").read_text())["config"]["codec"]
    found = load((tmp_path / "sketch" / "sketch.safetensors").read_bytes())
    basis, mean, w = (found[n].double().numpy() for n in ("basis", "mean", "weight"))
    wide, rank = settings["sketch_wide"], settings["sketch"]
    with_sketch, with_mean = [], []
    rows = zip(*(plain_rows(tmp_path / n) for n in ("exact", "sketch", "dense")), strict=True)
    for exact, sketch, dense in rows:
        want = np.array(dense["dense_logp"]).reshape(-1, vocab)
        logits = np.array(exact["hidden"]).reshape(-1, weight.shape[1]) @ weight.T
        got = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        np.testing.assert_allclose(got, want, atol=1e-4)
        stored = np.array(sketch["sketch"], np.int8).reshape(wide + (rank - wide) // 2, -1)
        codes = [*stored[:wide]]
        for pair in stored[wide:].astype(int):
            low = pair & 15
            codes += [np.where(low > 7, low - 16, low), pair >> 4]
        x = want - (want @ w)[:, None] - mean
        rest = x - settings["sketch_step"] * np.array(codes).T @ basis.T
        with_sketch.append(np.square(rest) @ w)
        with_mean.append(np.square(x) @ w)
    assert np.concatenate(with_sketch).mean() < 0.6 * np.concatenate(with_mean).mean()


def test_training_uses_the_table(make: Make, tmp_path: Path) -> None:
    """Two steps of the trainer: exact targets give the losses of dense ones, and a sketch comes nearer to
    them than a tail of the student's shape."""
    losses = {}
    codecs = {"dense": DenseCodec(), "exact": ExactCodec(), "sketch": SKETCH, "sparse": SparseCodec(cap=12)}
    for name, codec in codecs.items():
        precompute(make(codec, name))
        settings = TrainConfig(steps=2, batch_tokens=200, row_tokens=64, log_every=1)
        objective = parse_objective("tidal+reverse-kl")
        train(tmp_path / name, tmp_path / "student", tmp_path / f"run-{name}", settings, objective)
        lines = (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()
        losses[name] = np.array([json.loads(line)["loss"] for line in lines])
    assert len(losses["dense"]) == 2
    np.testing.assert_allclose(losses["exact"], losses["dense"], rtol=1e-4)
    missed = {name: np.abs(values - losses["dense"]) for name, values in losses.items()}
    assert (missed["sketch"] < 0.9 * missed["sparse"]).all()
