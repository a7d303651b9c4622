"""The fit of a sketch's basis, and its codes, against principal components of whole log-probs in numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import load

from precompute.sketch import SketchCoder, fit_sketch, fitted
from shards.codec import SparseCodec, pack_sketch, unpack_sketch
from shards.errors import CorpusError, CorruptShard
from student.tables import open_table
from student.tensors import Basis

N, H, V, R = 200, 12, 60, 6


@pytest.fixture(scope="module")
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(0.5, -1, H)
    return (
        torch.randn(N, H, generator=g) * scale,
        torch.randn(V, H, generator=g),
        torch.randn(V, generator=g),
    )


@pytest.mark.parametrize("biased", [False, True])
def test_the_basis_is_the_principal_components(parts: tuple[torch.Tensor, ...], biased: bool) -> None:
    """x = log-probs, each position less its mean in the weights; SVD of sqrt(w) (x - m), float64."""
    hidden, weight, bias = parts
    found = load(fit_sketch(hidden, weight, bias if biased else None, R))
    logits = (hidden @ weight.T + (bias if biased else 0)).double().numpy()
    half = np.exp(logits / 2 - (logits / 2).max(1, keepdims=True))
    w = (half / half.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(found["weight"].numpy(), w, rtol=1e-4)
    logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    x = logp - (logp @ w)[:, None]
    np.testing.assert_allclose(found["mean"].numpy(), x.mean(0), atol=1e-4)
    _, s, vt = np.linalg.svd(np.sqrt(w) * (x - x.mean(0)), full_matrices=False)
    np.testing.assert_allclose(found["scale"].numpy(), s[:R] / np.sqrt(N - 1), rtol=1e-3)
    basis = vt[:R].T / np.sqrt(w)[:, None]
    signs = np.sign(basis[np.abs(basis).argmax(0), np.arange(R)])
    np.testing.assert_allclose(found["basis"].float().numpy(), basis * signs, atol=2e-2)


def test_the_fit_is_a_function_of_its_inputs(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias = parts
    assert fit_sketch(hidden, weight, bias, R) == fit_sketch(hidden.clone(), weight.clone(), bias.clone(), R)


def test_codes_do_not_depend_on_chunks_or_shifts(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias = parts
    table = fit_sketch(hidden, weight, bias, R)
    codec = SparseCodec(sketch=R, sketch_wide=R, sketch_step=0.05, table="a" * 64)
    basis = open_table(table, codec, V)
    assert isinstance(basis, Basis)
    coder = SketchCoder(basis, codec, torch.device("cpu"))
    logits = hidden @ weight.T + bias
    codes = coder(logits)
    shifted = coder(logits - 7.5)
    assert codes.shape == (N, R)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int) - shifted).max() <= 1  # rounding of the shift itself
    assert (codes == np.concatenate([coder(x) for x in logits.split(7)])).mean() > 0.999
    assert 3 < codes.std() < 127


def test_wide_codes_go_to_what_varies_most(parts: tuple[torch.Tensor, ...]) -> None:
    table = fit_sketch(*parts, R)
    scale = load(table)["scale"]
    for step in (0.01, 0.1, 1.0, 10.0):
        wide = fitted(SparseCodec(sketch=R, sketch_step=step), table)
        assert (R - wide) % 2 == 0
        assert (4 * scale[wide:] <= 7 * step).all()


@pytest.mark.parametrize("wide", [0, 3, 7])
def test_packing(wide: int) -> None:
    """Every pair of half-byte codes and every byte code comes back."""
    codec = SparseCodec(sketch=7 if wide % 2 else 8, sketch_wide=wide, table="a" * 64)
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (5000, codec.sketch)).astype(np.int8)
    codes[:, :wide] = rng.integers(-127, 128, (5000, wide))
    stored = pack_sketch(codes, codec)
    assert stored.dtype == np.int8
    assert stored.shape == (5000, codec.sketch_bytes)
    np.testing.assert_array_equal(unpack_sketch(stored, codec), codes)


def test_refusals(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias = parts
    for h, rank in ((hidden, H + 1), (hidden[:4], R), (hidden[:1].repeat(50, 1), 1)):
        with pytest.raises(CorpusError, match=f"a sketch of {rank} coefficients"):
            fit_sketch(h, weight, bias, rank)
    codec = SparseCodec(sketch=R, sketch_wide=R, table="a" * 64)
    table = fit_sketch(hidden, weight, bias, R)
    for data, size, message in (
        (table, V + 1, r"basis: expected \(61, 6\) numbers"),
        (table[:-4], V, "not a safetensors file"),
        (b"", V, "not a safetensors file"),
    ):
        with pytest.raises(CorruptShard, match=message):
            open_table(data, codec, size)
