"""Block-diffusion sampling: block after block, each denoised in place against the keys of those before it.

A block starts as masks (after the prompt's tail, where it has one) and is filled over several passes, in any
order, most confident tokens first. One commit pass over the finished block writes its keys and values for
good; the prefix is never run again and never copied (BD3LM section 3.3; TIDE paper, Table 3).

Slots: token i of a row sits in slot i + pad, blocks are slots // block_size. With origin `sequence` pad is 0:
blocks count from the sequence start, as in training, and the first one may hold the prompt's tail. With
origin `prompt` the pad in front of a row makes a block end with its prompt.

Shape suffixes: B sequences, S slots, T tokens of a block, M masked tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from student.sampler_config import Completion, SamplerConfig, Snapshot
from student.sampler_run import SamplerRun, check_prompt

__all__ = ["BlockSampler", "Completion", "SamplerConfig", "Snapshot"]


class BlockSampler:
    """Samples from a block-diffusion student.

    Args:
        model: an `a2d-qwen3` student, in evaluation mode, with SDPA attention.
        mask_token_id: what a hidden token shows; never drawn.
        eos_token_ids: tokens that end a completion.
        decode: token ids to text.
        static: keep every shape fixed and show each pass all slots under a mask; on CUDA the pass is then
            recorded once and replayed as a graph. None = on CUDA.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int,
        eos_token_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        static: bool | None = None,
    ) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.eos = frozenset(eos_token_ids)
        self.decode = decode
        self.device = next(model.parameters()).device
        self.static = self.device.type == "cuda" if static is None else static

    def check(self, prompts: Sequence[Sequence[int]], config: SamplerConfig) -> None:
        """Refuse, before any is run, prompts that `generate` would refuse. Raises: see there."""
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, i, config, self.model.config.max_position_embeddings)

    def generate(self, prompts: Sequence[Sequence[int]], config: SamplerConfig) -> list[Completion]:
        """Complete prompts (token ids) together. Greedy results do not depend on what else is in the batch.

        Raises:
            UsageError: an empty prompt, or one that leaves no room within the model's positions.
        """
        run = SamplerRun(self, prompts, config)
        for _ in run.snapshots(watched=False):
            pass
        return run.completions()

    def watch(self, prompt: Sequence[int], config: SamplerConfig) -> Watched:
        """Complete one prompt; iterate for a snapshot after every pass. Raises: see `generate`."""
        return Watched(SamplerRun(self, [prompt], config))


class Watched:
    """A completion in the making: its snapshots, then the result."""

    def __init__(self, run: SamplerRun) -> None:
        self._run = run

    def __iter__(self) -> Iterator[Snapshot]:
        return self._run.snapshots(watched=True)

    @property
    def completion(self) -> Completion:
        """What was written; whole once the snapshots have ended."""
        return self._run.completions()[0]
