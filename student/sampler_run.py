"""One batch of sequences on its way from prompts to completions; `student.sampler` says how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shards.errors import UsageError
from student.attention import Coordinates, dense_mask
from student.kv_cache import SlotCache
from student.layout import PAD
from student.sampler_config import Completion, Finish, SamplerConfig, Snapshot
from student.weights_first import weights_first

if TYPE_CHECKING:
    from student.sampler import BlockSampler


@dataclass(slots=True)
class _Row:
    """One sequence being written."""

    prompt: list[int]
    pad: int
    start: int
    """First slot of the block at work."""
    generator: torch.Generator
    finish: Finish | None = None
    passes: int = 0
    new: list[int] = field(default_factory=list)
    """Tokens of finished blocks after the prompt."""


class SamplerRun:
    """One batch from its prompts to its completions."""

    def __init__(
        self, sampler: BlockSampler, prompts: Sequence[Sequence[int]], config: SamplerConfig
    ) -> None:
        self.s, self.c = sampler, config
        self.rows = [self._row(i, list(p)) for i, p in enumerate(prompts)]
        size = config.block_size
        self.slots = max(
            (_up(r.pad + len(r.prompt) + config.max_new_tokens, size) for r in self.rows), default=0
        )
        self.tokens = torch.full((len(self.rows), self.slots), sampler.mask_token_id, device=sampler.device)
        for i, r in enumerate(self.rows):
            self.tokens[i, r.pad : r.pad + len(r.prompt)] = torch.tensor(r.prompt, device=sampler.device)
        self.pads = torch.tensor([r.pad for r in self.rows], device=sampler.device)
        self.ends = torch.tensor([r.pad + len(r.prompt) for r in self.rows], device=sampler.device)
        model = sampler.model
        self.copies = 2 if config.guidance else 1  # with guidance, once more with the prompt hidden
        self.cache = SlotCache(
            model.config,
            self.copies * len(self.rows),
            self.slots,
            dtype=next(model.parameters()).dtype,
            device=sampler.device,
        )
        self._graph: Any = None

    def completions(self) -> list[Completion]:
        done = []
        for r in self.rows:
            ids = r.new[: self.c.max_new_tokens]
            end = next((k for k, token in enumerate(ids) if token in self.s.eos), len(ids))
            text = self.s.decode(ids[:end])
            cut = min((at for stop in self.c.stop if (at := text.find(stop)) >= 0), default=len(text))
            done.append(Completion(ids[:end], text[:cut], r.finish or "length", r.passes))
        return done

    @torch.inference_mode()
    def snapshots(self, *, watched: bool) -> Iterator[Snapshot]:
        """Write every row to its end; yields after each pass where somebody watches."""
        self._prefill()
        while live := [i for i, r in enumerate(self.rows) if r.finish is None]:
            masked = self._open_blocks(live)
            plan = self._plan(masked)
            step = 0
            while masked.any():
                self._denoise(masked, live, None if plan is None else plan[step])
                step += 1
                if watched:
                    yield from (self._snapshot(i) for i in live if masked[i].any())
            self._close_blocks(live)
            if watched:
                yield from (self._snapshot(i, done=True) for i in live)

    def _row(self, i: int, prompt: list[int]) -> _Row:
        size = self.c.block_size
        check_prompt(prompt, i, self.c, self.s.model.config.max_position_embeddings)
        pad = _pad(prompt, self.c)
        generator = torch.Generator().manual_seed(self.c.seed + i)
        return _Row(prompt, pad, (pad + len(prompt)) // size * size, generator)

    def _prefill(self) -> None:
        """One pass over the prompts' whole blocks; what is beyond a row's own is overwritten later."""
        end = max((r.start for r in self.rows), default=0)
        if not end:
            return
        slot = torch.arange(end, device=self.s.device).expand(len(self.rows), end)
        sample = torch.zeros_like(slot).masked_fill(slot < self.pads[:, None], PAD)
        stream = torch.zeros_like(slot)
        at = Coordinates(sample, stream, slot // self.c.block_size, slot)
        self.cache.point(slice(0, end), slice(0, end))
        self._body(self.tokens[:, :end], slot, dense_mask("block-causal", at))
        for r in self.rows:
            r.passes += 1

    def _open_blocks(self, live: list[int]) -> Tensor:
        """[B, T] which tokens of each row's block are to be filled; none in rows that are finished."""
        masked = torch.zeros(len(self.rows), self.c.block_size, dtype=torch.bool)
        for i in live:
            r = self.rows[i]
            masked[i, max(0, r.pad + len(r.prompt) - r.start) :] = True
        return masked

    def _plan(self, masked: Tensor) -> list[list[int]] | None:
        """Per pass and row, how many tokens to fill; None = as the threshold says."""
        c = self.c
        if c.threshold is not None:
            return None
        share = (c.steps or c.max_new_tokens) / c.max_new_tokens
        rows = []
        for n in masked.sum(1).tolist():
            steps = max(1, math.ceil(n * share - 1e-9))
            rows.append([n // steps + (s < n % steps) for s in range(steps)])
        longest = max(map(len, rows))
        return [[row[s] if s < len(row) else 0 for row in rows] for s in range(longest)]

    def _denoise(self, masked: Tensor, live: list[int], quota: list[int] | None) -> None:
        """One pass: predict every masked token, keep some. Updates `masked` [B, T] in place."""
        block = self._block_slots()
        ids = self.tokens.gather(1, block)
        where = masked.to(self.s.device)
        hidden = self._run_block(ids, block)
        picked = hidden.unflatten(0, (self.copies, len(self.rows)))[:, where]  # [copies, M, H]
        logits = self._head(picked)
        if self.c.guidance:
            logits = logits[1] + (self.c.guidance + 1) * (logits[0] - logits[1])
        else:
            logits = logits[0]
        logits[:, self.s.mask_token_id] = -torch.inf
        drawn, score = self._draw(logits, masked)
        scores = torch.full(masked.shape, -torch.inf, device=self.s.device).masked_scatter(where, score)
        keep = self._keep(scores, where, quota)
        ids = torch.where(keep, ids.masked_scatter(where, drawn), ids)
        self.tokens.scatter_(1, block, ids)
        masked &= ~keep.cpu()
        for i in live:
            self.rows[i].passes += 1

    def _head(self, hidden: Tensor) -> Tensor:
        """float32 logits [copies, M, V] of hidden states [copies, M, H]."""
        with weights_first(self.s.model):
            return self.s.model.lm_head(hidden).float()

    def _draw(self, logits: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each masked place [M], and the score by which tokens are kept."""
        c = self.c
        if c.temperature:
            probs = (logits / c.temperature).softmax(-1)
            uniform = self._uniform(masked)
            probs, order = probs.sort(dim=-1, descending=True, stable=True)
            before = probs.cumsum(-1) - probs
            probs = probs.masked_fill(before >= c.top_p, 0.0)
            reached = probs.cumsum(-1) > uniform[:, None] * probs.sum(-1, keepdim=True)
            drawn = order.gather(1, reached.int().argmax(-1, keepdim=True))[:, 0]
        else:
            drawn = logits.argmax(-1)
        if c.remasking == "random":
            return drawn, self._uniform(masked)
        return drawn, logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0].exp()

    def _uniform(self, masked: Tensor) -> Tensor:
        """[M] uniforms on [0, 1); each row draws a whole block's from its own generator."""
        values = torch.stack([torch.rand(masked.shape[1], generator=r.generator) for r in self.rows])
        return values[masked].to(self.s.device)

    def _keep(self, scores: Tensor, where: Tensor, quota: list[int] | None) -> Tensor:
        """[B, T] tokens to fill now: the best of each row, as many as its quota or above the threshold."""
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        if quota is None:
            return where & ((scores >= (self.c.threshold or 1.0)) | (rank == 0))
        return where & (rank < torch.tensor(quota, device=order.device)[:, None])

    def _close_blocks(self, live: list[int]) -> None:
        """Take the finished blocks over, end rows that are complete, and commit the blocks of the others."""
        c = self.c
        for i in live:
            r = self.rows[i]
            first = max(r.start, r.pad + len(r.prompt))
            r.new += self.tokens[i, first : r.start + c.block_size].tolist()
            r.finish = self._finish(r)
        if any(r.finish is None for r in self.rows):
            block = self._block_slots()
            self._run_block(self.tokens.gather(1, block), block)
        for i in live:
            r = self.rows[i]
            if r.finish is None:
                r.passes += 1
                r.start += c.block_size

    def _finish(self, r: _Row) -> Finish | None:
        ids = r.new[: self.c.max_new_tokens]
        end = next((k for k, token in enumerate(ids) if token in self.s.eos), None)
        if self.c.stop:
            text = self.s.decode(ids[:end])
            if any(stop in text for stop in self.c.stop):
                return "stop"
        if end is not None:
            return "eos"
        return "length" if len(r.new) >= self.c.max_new_tokens else None

    def _block_slots(self) -> Tensor:
        """[B, T] slots of the block at work in each row."""
        start = torch.tensor([r.start for r in self.rows], device=self.s.device)
        return start[:, None] + torch.arange(self.c.block_size, device=self.s.device)

    def _run_block(self, ids: Tensor, block: Tensor) -> Tensor:
        """[copies * B, T, H]: one pass over each row's block, which sees what is committed and itself."""
        first, end = self.rows[0].start, self.rows[0].start + self.c.block_size
        alike = all((r.start, r.pad) == (first, self.rows[0].pad) for r in self.rows)
        if alike and not self.s.static:
            self.cache.point(slice(first, end), slice(self.rows[0].pad, end))
            return self._body(ids, block, None)
        seen = self.slots if self.s.static else max(r.start for r in self.rows) + self.c.block_size
        slot = torch.arange(seen, device=self.s.device)
        shown = (slot >= self.pads[:, None]) & (slot <= block[:, -1:])
        mask = shown[:, None, None, :].expand(-1, -1, block.shape[1], -1)
        self.cache.point(block.repeat(self.copies, 1), slice(0, seen))
        if self.s.static and self.s.device.type == "cuda":
            return self._replay(ids, block, mask)
        return self._body(ids, block, mask)

    def _body(self, ids: Tensor, slot: Tensor, mask: Tensor | None) -> Tensor:
        """Last hidden states [copies * B, tokens, H] of tokens in their slots."""
        if self.copies == 2:
            hidden = torch.where(slot < self.ends[:, None], self.s.mask_token_id, ids)
            ids, slot = torch.cat([ids, hidden]), torch.cat([slot, slot])
            mask = None if mask is None else torch.cat([mask, mask])
        pads = self.pads.repeat(self.copies)[:, None]
        with weights_first(self.s.model):
            return self.s.model.model(
                input_ids=ids,
                position_ids=(slot - pads).clamp_min(0),
                attention_mask={"full_attention": mask},
                past_key_values=self.cache,
                use_cache=False,
            ).last_hidden_state

    def _replay(self, ids: Tensor, block: Tensor, mask: Tensor) -> Tensor:
        """`_body` as a CUDA graph: recorded at the first block, replayed on new contents."""
        if self._graph is None:
            self._inputs = [ids.clone(), block.clone(), mask.contiguous()]
            self.cache.point(block.repeat(self.copies, 1), slice(0, self.slots))
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are chosen and memory is taken before recording
                for _ in range(2):
                    self._body(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.cache.point(self._inputs[1].repeat(self.copies, 1), slice(0, self.slots))
                self._output = self._body(*self._inputs)
        for held, new in zip(self._inputs, (ids, block, mask)):
            held.copy_(new)
        self._graph.replay()
        return self._output

    def _snapshot(self, i: int, *, done: bool = False) -> Snapshot:
        r = self.rows[i]
        if done:
            return Snapshot(i, r.new[: self.c.max_new_tokens], True)
        first = max(r.start, r.pad + len(r.prompt))
        block = self.tokens[i, first : r.start + self.c.block_size].tolist()
        return Snapshot(i, (r.new + block)[: self.c.max_new_tokens], False)


def _up(n: int, size: int) -> int:
    return -(-n // size) * size


def _pad(prompt: Sequence[int], config: SamplerConfig) -> int:
    """Empty slots in front of a prompt."""
    return -len(prompt) % config.block_size if config.block_origin == "prompt" else 0


def check_prompt(prompt: Sequence[int], i: int, config: SamplerConfig, positions: int) -> None:
    """
    Raises:
        UsageError: prompt i (from 0) is empty, or leaves too little room within the model's positions.
    """
    if not prompt:
        raise UsageError(f"prompt {i + 1} is empty; give it at least one token")
    pad = _pad(prompt, config)
    end = _up(pad + len(prompt) + config.max_new_tokens, config.block_size) - pad
    if end > positions:
        raise UsageError(
            f"prompt {i + 1} has {len(prompt)} tokens and may get {config.max_new_tokens} more, in whole "
            f"blocks {end}, but the model has {positions} positions; shorten it, or lower max-new-tokens"
        )
