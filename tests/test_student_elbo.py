"""Bounds on continuations: against the exact expectation over all masks, in one block and in several, and
against nothing at all changed by packing."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from student.elbo import Continuation, log_likelihood_bounds, masks
from student.model import load_student

BLOCK = 4


@pytest.fixture(scope="module")
def student(model: Path):
    """Sharp enough that what is hidden matters."""
    network, tokenizer = load_student(model, attention="sdpa")
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 2:
                p.mul_(8)
    return network.eval(), tokenizer.mask_token_id


def bounds(student, asked, **options) -> np.ndarray:
    network, mask = student
    return log_likelihood_bounds(network, asked, mask_token_id=mask, block_size=BLOCK, **options)


def block_log_probs(student, seen: list[int], block: list[int]) -> torch.Tensor:
    """[T, V] of a block after whole clean blocks, by a plain block-causal pass."""
    network, _ = student
    ids = torch.tensor([[*seen, *block]])
    at = torch.arange(ids.shape[1]) // BLOCK
    mask = (at[:, None] >= at[None, :])[None, None]
    out = network(input_ids=ids, attention_mask={"full_attention": mask}).logits[0, len(seen) :]
    return out.double().log_softmax(-1)


@torch.no_grad()
def exact(student, context: list[int], tokens: list[int]) -> float:
    """Sum over blocks of the mean over l = 1..n, and over all sets of l hidden tokens, of n / l * log p."""
    _, mask = student
    ids, start, total = [*context, *tokens], len(context), 0.0
    for b in range(start // BLOCK, -(-len(ids) // BLOCK)):
        here = [p for p in range(b * BLOCK, (b + 1) * BLOCK) if start <= p < len(ids)]
        n, by_count = len(here), []
        for count in range(1, n + 1):
            values = []
            for hidden in itertools.combinations(here, count):
                block = [
                    mask if p in hidden or p >= len(ids) else ids[p]
                    for p in range(b * BLOCK, (b + 1) * BLOCK)
                ]
                logp = block_log_probs(student, ids[: b * BLOCK], block)
                values.append(sum(logp[p - b * BLOCK, ids[p]].item() for p in hidden) * n / count)
            by_count.append(np.mean(values))
        total += float(np.mean(by_count))
    return total


CASES = [([5, 6, 7], [9, 10, 11, 12, 13, 14]), ([1, 2, 3, 4], [20, 21, 22]), ([], [30, 31, 32, 33, 34])]


@pytest.mark.parametrize(("context", "tokens"), CASES)
def test_many_draws_give_the_exact_expectation(student, context, tokens):
    """4,000 draws over five seeds: their mean lies within four standard errors of it, and they do differ."""
    found = [bounds(student, [Continuation(context, tokens)], draws=800, seed=seed)[0] for seed in range(5)]
    error = np.std(found, ddof=1) / math.sqrt(5)
    assert 0 < error < 0.1 * abs(np.mean(found))
    assert abs(np.mean(found) - exact(student, context, tokens)) < 4 * error + 1e-3


def test_one_token_a_block_is_exact_in_one_draw(student):
    for context, tokens in (([5, 6], [9]), ([5, 6, 7], [9])):
        (found,) = bounds(student, [Continuation(context, tokens)], draws=16)
        assert found == pytest.approx(exact(student, context, tokens), abs=1e-4)


def test_neither_packing_nor_company_matters(student):
    asked = [Continuation(c, t) for c, t in CASES] + [Continuation([1], [])]
    together = bounds(student, asked, draws=6)
    alone = [bounds(student, [a], draws=6, row_tokens=8, batch_rows=1)[0] for a in asked]
    assert together == pytest.approx(alone, abs=1e-4)
    assert together[3] == 0.0


def test_choices_of_a_question_meet_the_same_masks():
    blocks = np.array([0, 0, 0, 1, 1])
    first = list(masks([1, 2], blocks, 8, 0))
    again = list(masks([1, 2], blocks, 8, 0))
    other = list(masks([1, 3], blocks, 8, 0))
    assert all((a[0] == b[0]).all() for a, b in zip(first, again))
    assert any((a[0] != b[0]).any() for a, b in zip(first, other))
    counts = sorted(int(hidden[:3].sum()) for hidden, _ in masks([1, 2], blocks, 3, 0))
    assert counts == [1, 2, 3]  # spread evenly over l
    for hidden, weight in first:
        for b in (0, 1):
            n = (blocks == b).sum()
            assert weight[blocks == b][0] == n / hidden[blocks == b].sum()
