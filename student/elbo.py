"""Bounds on the log-likelihood of a continuation after its context, for tasks that ask for likelihoods.

A block diffusion model bounds log p(continuation | context) from below, block by block: with n tokens of the
continuation in a block, of which l, uniform on 1..n, are hidden at random, the expectation of
(n / l) * sum of their log-probs (LLaDA, equation 6, in each block of BD3LM's factorisation). It is the bound
that `student.evaluate` estimates with its timesteps, with less variance where there are few tokens, and
exact where a block holds one. What fills the last block is hidden in every draw and never counted.

Draws are spread evenly over l. Masks come from the seed and the context alone, so the choices of one question
meet the same noise, and so do all models with one tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shards.noise import uniform01
from student.evaluate import read_log_probs
from student.layout import Piece, Stream, lay_out


@dataclass(frozen=True, slots=True)
class Continuation:
    """What is asked: how likely are `tokens` after `context`?"""

    context: Sequence[int]
    tokens: Sequence[int]


@torch.no_grad()
def log_likelihood_bounds(
    model: Any,
    asked: Sequence[Continuation],
    *,
    mask_token_id: int,
    block_size: int,
    draws: int = 32,
    seed: int = 0,
    row_tokens: int = 1024,
    batch_rows: int = 8,
    head_rows: int = 256,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """[S] float64: an estimate, in nats, of each continuation's bound; 0 for one without tokens.

    Args:
        model: a block-diffusion student in evaluation mode.
        block_size: blocks count from the sequence start, as in training.
        draws: masks per continuation; a single one, which is exact, where every block holds one token.
        row_tokens: packed row length; a draw that needs more gets a row of its own.
        batch_rows: rows per forward pass, about.
        progress: called with the number of continuations laid out so far.
    """
    device = next(model.parameters()).device
    total = np.zeros(len(asked))
    for batch in _batches(asked, mask_token_id, block_size, draws, seed, row_tokens, row_tokens * batch_rows):
        logp = read_log_probs(
            model,
            [part.piece for part in batch],
            np.concatenate([part.gold for part in batch]),
            pad_id=mask_token_id,
            row_tokens=row_tokens,
            head_rows=head_rows,
            device=device,
        )
        at = 0
        for part in batch:
            total[part.index] += logp[at : at + len(part.gold)] @ part.weight
            at += len(part.gold)
        if progress is not None:
            progress(batch[-1].index + 1)
    return total


@dataclass(frozen=True, slots=True)
class _Part:
    """Some draws of one continuation, laid out."""

    index: int
    piece: Piece
    gold: np.ndarray
    """[all hidden] int64, draw after draw."""
    weight: np.ndarray
    """[all hidden] float64: n / l of its block, over the number of draws."""


def _batches(
    asked: Sequence[Continuation],
    mask_token_id: int,
    block_size: int,
    draws: int,
    seed: int,
    row_tokens: int,
    tokens: int,
) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    for index, one in enumerate(asked):
        for part in _parts(index, one, mask_token_id, block_size, draws, seed, row_tokens):
            batch.append(part)
            if sum(len(p.piece) for p in batch) >= tokens:
                yield batch
                batch = []
    if batch:
        yield batch


def _parts(
    index: int, one: Continuation, mask_token_id: int, block_size: int, draws: int, seed: int, row_tokens: int
) -> Iterator[_Part]:
    """As many draws to a piece as a row holds: they share its clean stream."""
    start, n = len(one.context), len(one.tokens)
    if not n:
        return
    length = -(-(start + n) // block_size) * block_size
    clean = np.full(length, mask_token_id, dtype=np.int64)
    clean[:start] = one.context
    clean[start : start + n] = one.tokens
    blocks = (start + np.arange(n)) // block_size
    draws = draws if (np.bincount(blocks) > 1).any() else 1
    streams, golds, weights = [], [], []
    for hidden, weight in masks(one.context, blocks, draws, seed):
        asked = start + np.flatnonzero(hidden)
        noisy = clean.copy()
        noisy[asked] = mask_token_id
        streams.append(Stream(noisy, asked))
        golds.append(clean[asked])
        weights.append(weight[hidden] / draws)
    first = int(blocks[0]) * block_size
    fits = max(1, (row_tokens - first) // (length - first))
    for i in range(0, draws, fits):
        some = slice(i, i + fits)
        piece = lay_out(clean, streams[some], attention="staircase", block_size=block_size)
        yield _Part(index, piece, np.concatenate(golds[some]), np.concatenate(weights[some]))


def masks(
    context: Sequence[int], blocks: np.ndarray, draws: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per draw, which of the n tokens are hidden ([n] bool) and the weight n / l of each one's block.

    Args:
        blocks: [n] block of each token, ascending.
    """
    key = hashlib.blake2b(np.asarray(context, dtype=np.int64).tobytes(), digest_size=16).hexdigest()
    offset = uniform01(seed, key, "elbo-share", int(blocks[-1]) + 1)
    for d in range(draws):
        order = uniform01(seed, key, f"elbo-{d}", len(blocks))
        hidden = np.zeros(len(blocks), dtype=bool)
        weight = np.zeros(len(blocks))
        for b in np.unique(blocks):
            where = np.flatnonzero(blocks == b)
            share = (offset[b] + d / draws) % 1.0
            count = int(share * len(where)) + 1
            hidden[where[np.argsort(order[where], kind="stable")[:count]]] = True
            weight[where] = len(where) / count
        yield hidden, weight
