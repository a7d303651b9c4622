"""What of backend vllm needs no vLLM: pieces as requests, answers as bytes, checkpoints under other names,
and what is refused.

The engine is replaced by what it is asked to be: an output is told by the tokens that it saw.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Tide, refused
from safetensors.torch import load_file, save_file
from small_vllm import make_folder

from precompute.backends.vllm_checkpoint import read_checkpoint
from precompute.backends.vllm_requests import Request, from_bytes, in_order, requests_of, to_bytes
from precompute.backends.vllm_teacher import page_of
from precompute.backends.vllm_version import MASKS, installed, require_combination, require_vllm
from precompute.config import PrecomputeConfig
from precompute.teachers.load import load_teacher
from shards.codec import DenseCodec, ExactCodec, SparseCodec
from shards.errors import ModelError, UsageError
from shards.row import DenseTarget, ExactTarget, SparseTarget
from student.layout import Attention, Stream, lay_out

BLOCK = 4


def saw(request: Request, attention: Attention) -> list[tuple[int, ...]]:
    """The tokens behind each output that a request reads, in an engine whose steps are blocks, whole requests
    or (causal) anything."""
    ends = {
        "bidirectional": np.full_like(request.read, len(request.ids)),
        "causal": request.read + 1,
    }.get(attention, (request.read // BLOCK + 1) * BLOCK)
    return [(int(p), *request.ids[:end].tolist()) for p, end in zip(request.read, ends)]


def sees(clean: np.ndarray, noisy: np.ndarray, at: int, asked: int, attention: Attention) -> tuple[int, ...]:
    """By the definition of the mask: the tokens behind the output at `at` that predicts `asked`."""
    first, end = at // BLOCK * BLOCK, (at // BLOCK + 1) * BLOCK
    seen = {
        "bidirectional": noisy,
        "causal": noisy[: at + 1],
        "block-causal": noisy[:end],
        "staircase": np.append(clean[:first], (noisy if at // BLOCK == asked // BLOCK else clean)[first:end]),
    }[attention]
    return (at, *seen.tolist())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("attention", MASKS)
def test_each_output_is_of_what_the_mask_shows(attention: Attention, shifted: bool) -> None:
    """Drawn streams of all lengths; every read of a piece is answered once, in the order of its reads."""
    rng = np.random.default_rng(0)
    for length in (1, 3, 4, 9, 20, 23):
        clean = rng.integers(0, 90, length)
        streams = []
        for _ in range(3):
            hidden = rng.random(length) < 0.5
            asked = np.flatnonzero(hidden & (np.arange(length) >= shifted) & (rng.random(length) < 0.8))
            streams.append(Stream(np.where(hidden, 99, clean), asked))
        piece = lay_out(clean, streams, attention=attention, block_size=BLOCK, shifted=shifted)
        requests = requests_of(piece, attention)
        want = [sees(clean, s.ids, i - shifted, i, attention) for s in streams for i in s.asked.tolist()]
        outputs = [saw(r, attention) for r in requests]
        where = in_order(requests, [(np.zeros(len(o)), None) for o in outputs])
        flat = [seen for some in outputs for seen in some]
        assert [flat[k] for k in where] == want
        assert all((np.diff(r.read) > 0).all() for r in requests)
        # What begins with clean text is read past it: of a cached prefix no output is left.
        starts = next((r.ids for r in requests if r.clean), np.zeros(0, dtype=int))
        for r in requests:
            if not r.clean and attention == "staircase":
                assert (r.read >= (len(r.ids) - 1) // BLOCK * BLOCK).all()
                before = (len(r.ids) - 1) // BLOCK * BLOCK
                np.testing.assert_array_equal(r.ids[:before], starts[:before])


def test_answers_as_bytes() -> None:
    """All kinds of answers, empty ones too, survive the way from the engine."""
    rng = np.random.default_rng(0)
    f32, i32 = np.float32, np.int32
    for n in (0, 5):
        counts = rng.integers(1, 4, n).astype(i32)
        k = int(counts.sum())
        logp = rng.normal(size=n).astype(f32)
        sparse = SparseTarget(
            counts, np.arange(k, dtype=i32), rng.normal(size=k).astype(f32), np.full((n, 2), -np.inf, f32)
        )
        for codec, target in (
            (None, None),
            (SparseCodec(), sparse),
            (DenseCodec(), DenseTarget(rng.normal(size=(n, 7)).astype(f32))),
            (ExactCodec(), ExactTarget(rng.normal(size=(n, 3)).astype(f32))),
        ):
            got_logp, got = from_bytes(to_bytes(logp, target), codec)
            np.testing.assert_array_equal(got_logp, logp)
            assert type(got) is type(target)
            for name in () if target is None else target.__slots__:
                np.testing.assert_array_equal(getattr(got, name), getattr(target, name))


@pytest.mark.parametrize("teacher", ["qwen3", "llada", "dream", "llada2"])
def test_published_tensors_under_the_library_names(teacher: str, tmp_path: Path) -> None:
    """Against the library model that `load_teacher` makes of the same folder; experts keep their own names,
    and a tied head is a tensor of its own."""
    folder = make_folder(tmp_path, teacher)
    checkpoint = read_checkpoint(folder)
    published = load_file(folder / "model.safetensors")
    named = dict(checkpoint.named(published.items()))
    model = load_teacher(folder).model
    want = {k: v for k, v in model.state_dict().items() if ".mlp.experts." not in k}
    want |= {k: v for k, v in published.items() if ".mlp.experts." in k}
    assert named.keys() == want.keys()
    for name, tensor in named.items():
        torch.testing.assert_close(tensor, want[name])
    torch.testing.assert_close(checkpoint.head(), model.get_output_embeddings().weight)
    published.popitem()
    save_file(published, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lacks"):
        read_checkpoint(folder)


def test_the_engine_is_told_what_decides(tmp_path: Path) -> None:
    """Sliding windows and the length that a model was made for have no say, as in the other backend."""
    checkpoint = read_checkpoint(make_folder(tmp_path, "fast"))
    config = checkpoint.engine_config("bidirectional", 32, longest=160)
    assert config["architectures"] == ["TideQwen2"]
    assert config["model_type"] == "qwen2"
    assert not config["is_causal"]
    assert config["sliding_window"] is None
    assert set(config["layer_types"]) == {"full_attention"}
    assert config["max_position_embeddings"] == 160
    assert checkpoint.engine_config("staircase", 32, longest=10)["is_causal"]


@pytest.mark.parametrize(("block", "page"), [(32, 32), (4, 32), (48, 96), (64, 64)])
def test_pages_hold_whole_blocks(block: int, page: int) -> None:
    """A page that ended inside a block would be taken for another block's that begins alike."""
    assert page_of(block) == page
    assert page % block == 0


def options(folder: Path, *more: object) -> tuple[object, ...]:
    corpus = folder / "corpus.jsonl"
    corpus.write_text('{"text": "a river runs past an old mill"}\n')
    given = ("--teacher", folder, "--student", folder, "--corpus", corpus, "--out", folder / "out")
    return ("precompute", *given, "--backend", "vllm", *more)


@pytest.mark.skipif(installed() is not None, reason="vLLM is installed here")
def test_without_vllm(tide: Tide, model: Path) -> None:
    refused(tide(*options(model)), 2, "vLLM 0.32", "not installed", "tide[vllm]", "--backend transformers")
    assert not (model / "out").exists()


def pretend(path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """An installed distribution of this version, as far as its metadata go."""
    info = path / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(path)


def test_another_minor_version(
    tide: Tide, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path, monkeypatch, "0.33.1")
    refused(tide(*options(model)), 2, "vLLM 0.32", "found 0.33.1", "tide[vllm]")


def test_a_patch_version_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, monkeypatch, "0.32.7")
    assert require_vllm() == "0.32.7"


def test_what_the_other_backend_has(
    tide: Tide, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, heads and codecs that vLLM has not: one line that names the backend which has them."""
    pretend(tmp_path, monkeypatch, "0.32.0")
    mask = ("--teacher-attention", "staircase-causal")
    refused(tide(*options(model, *mask)), 2, "staircase-causal", "--backend transformers")
    refused(tide(*options(model)), 2, "heads of 16", "--backend transformers")  # the fixture's model
    with pytest.raises(UsageError, match="no sketches: use --backend transformers"):
        require_combination("staircase", SparseCodec(sketch=16, sketch_wide=16), 64, name="teacher")
    for attention in MASKS:
        require_combination(attention, SparseCodec(), 64, name="teacher")


def test_settings_of_the_engine_are_for_it() -> None:
    config = PrecomputeConfig(teacher="t", student="s", corpus="c", out=Path("o"), backend="vllm")
    for changes in ({"backend": "tgi"}, {"tensor_parallel": 0}, {"cache_gb": 0.0}):
        with pytest.raises(UsageError, match="-".join(next(iter(changes)).split("_"))):
            replace(config, **changes)
    with pytest.raises(UsageError, match="--backend vllm"):
        replace(config, backend="transformers", tensor_parallel=2)
