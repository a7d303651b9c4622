"""Reductions against float64 numpy twins written from the definitions, over chunk sizes and cut
vocabularies."""

import numpy as np
import pytest
import torch

from precompute.reduce import reduce_dense, reduce_gold, reduce_sparse, sum_chunks

Q, V = 37, 50
TEMPERATURES = (1.0, 2.0)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """Rows from flat to one-hot."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(Q, V, generator=g) * torch.logspace(-1, 2, Q)[:, None]


@pytest.fixture(scope="module")
def gold() -> torch.Tensor:
    return torch.arange(Q) + 8  # the last ones lie outside a vocabulary of 40


def log_softmax64(logits: torch.Tensor, vocab_size: int | None = None) -> np.ndarray:
    x = logits.double().numpy()[:, :vocab_size]
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def identity(x: torch.Tensor) -> torch.Tensor:
    """The logits themselves; a head gives a tensor that may be overwritten."""
    return x.clone()


@pytest.mark.parametrize("head_rows", [1, 8, 1000])
@pytest.mark.parametrize(("cap", "tail_bound"), [(8, 1e-3), (40, 1e-3), (40, 0.0), (3, 0.3)])
def test_sparse(
    logits: torch.Tensor, gold: torch.Tensor, cap: int, tail_bound: float, head_rows: int
) -> None:
    """Counts, ids, log-probs, tails and gold against sorting and summing in float64."""
    vocab_size = 40
    target, golds = reduce_sparse(
        logits, gold, identity, vocab_size=vocab_size, cap=cap, tail_bound=tail_bound,
        temperatures=TEMPERATURES, head_rows=head_rows,
    )  # fmt: skip
    logp = log_softmax64(logits, vocab_size)
    at = 0
    for i in range(Q):
        order = np.argsort(-logp[i], kind="stable")
        dropped = 1 - np.cumsum(np.exp(logp[i, order]))
        enough = np.flatnonzero(dropped < tail_bound)
        n = min(cap, enough[0] + 1) if len(enough) else cap
        count = target.counts[i]
        # float32 may place a mass of exactly the bound on its other side
        assert count == n or abs(dropped[min(count, n) - 1] - tail_bound) < 1e-6
        kept = target.ids[at : at + count]
        np.testing.assert_allclose(target.logp[at : at + count], logp[i, kept], atol=1e-4)
        np.testing.assert_allclose(logp[i, kept], logp[i, order[:count]], atol=1e-5)
        rest = np.delete(logp[i], kept)
        for j, T in enumerate(TEMPERATURES):
            expected = np.log(np.exp(rest / T).sum()) if len(rest) else -np.inf
            np.testing.assert_allclose(target.tails[i, j], expected, rtol=1e-5, atol=1e-4)
        at += count
    assert at == len(target.ids) == len(target.logp)
    assert np.isnan(golds[gold.numpy() >= vocab_size]).all()
    inside = gold.numpy() < vocab_size
    np.testing.assert_allclose(golds[inside], logp[inside, gold.numpy()[inside]], atol=1e-4)


def test_any_temperature_and_far_tails(gold: torch.Tensor) -> None:
    """Temperatures other than 1 and 2, tails hundreds of nats down, tokens that cannot occur (-inf), and
    fewer possible tokens than entries: all against float64."""
    g = torch.Generator().manual_seed(1)
    far = torch.randn(4, V, generator=g) - 300 * (torch.arange(V) >= 3)
    never = torch.randn(4, V, generator=g).masked_fill(torch.arange(V) % 3 == 0, -torch.inf)
    few = torch.randn(4, V, generator=g).masked_fill(torch.arange(V) >= 2, -torch.inf)
    temperatures = (0.5, 1.0, 1.5, 2.0, 5.0)
    for x in (far, never, few):
        target, _ = reduce_sparse(
            x, gold[:4], identity, vocab_size=V, cap=3, tail_bound=0.0, temperatures=temperatures, head_rows=8
        )
        logp, at = log_softmax64(x), 0
        for i, n in enumerate(target.counts):
            rest = np.delete(logp[i], target.ids[at : at + n])
            with np.errstate(divide="ignore"):
                exact = [np.logaddexp.reduce(rest / T) for T in temperatures]
            np.testing.assert_allclose(target.tails[i], exact, rtol=1e-5, atol=1e-4)
            at += n


def test_no_second_chunk_of_logits_is_made(logits: torch.Tensor, gold: torch.Tensor) -> None:
    """Whatever is made beside a chunk of logits is smaller than the chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != chunk:
                    made.append(x.untyped_storage().nbytes())
            return out

    wide = torch.randn(8, 5000)
    chunk = wide.untyped_storage().data_ptr()
    with Watch():
        reduce_sparse(
            wide, gold[:8], lambda x: x, vocab_size=5000, cap=8, tail_bound=1e-3,
            temperatures=TEMPERATURES, head_rows=8,
        )  # fmt: skip
    assert made
    assert max(made) < wide.untyped_storage().nbytes() / 10


def test_whole_vocabulary_kept_leaves_no_tail(logits: torch.Tensor, gold: torch.Tensor) -> None:
    target, _ = reduce_sparse(
        logits[:2], gold[:2], identity, vocab_size=V, cap=200, tail_bound=0.0,
        temperatures=TEMPERATURES, head_rows=8,
    )  # fmt: skip
    assert target.counts.tolist() == [V, V]
    assert np.isneginf(target.tails).all()


def test_dense(logits: torch.Tensor, gold: torch.Tensor) -> None:
    target, golds = reduce_dense(logits, gold, identity, vocab_size=40, head_rows=7)
    np.testing.assert_allclose(target.logp, log_softmax64(logits, 40), atol=1e-4)
    assert np.isnan(golds[-5:]).all()
    np.testing.assert_allclose(golds[:10], target.logp[np.arange(10), gold.numpy()[:10]])


def test_gold_is_normalised_over_the_whole_vocabulary(logits: torch.Tensor, gold: torch.Tensor) -> None:
    golds = reduce_gold(logits, gold, identity, head_rows=5)
    np.testing.assert_allclose(golds, log_softmax64(logits)[np.arange(Q), gold.numpy()], atol=1e-4)


def test_chunks_sum_their_tokens() -> None:
    """Tokens come in any order (two passes, several pieces); inactive chunks leave no entry."""
    logp = np.array([-1.0, -2.0, -4.0, -8.0], dtype=np.float32)
    active = np.array([False, True, False, True, True])
    assert sum_chunks(logp, np.array([4, 1, 4, 3]), active).tolist() == [-2.0, -8.0, -5.0]


@pytest.mark.parametrize("head_rows", [1, 6])
def test_logits_stay_within_a_chunk(logits: torch.Tensor, gold: torch.Tensor, head_rows: int) -> None:
    """The head is never asked for more than `head_rows` rows, and for every row once."""
    asked: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return hidden

    reduce_gold(logits, gold, head, head_rows=head_rows)
    assert max(asked) == head_rows
    assert sum(asked) == Q


def test_nothing_asked() -> None:
    none = torch.zeros(0, V)
    target, golds = reduce_sparse(
        none, torch.zeros(0, dtype=torch.int64), identity, vocab_size=V, cap=4, tail_bound=1e-3,
        temperatures=TEMPERATURES, head_rows=8,
    )  # fmt: skip
    assert target.tails.shape == (0, 2)
    assert len(target.counts) == len(target.ids) == len(golds) == 0
