"""Texts that a student writes while it is trained, for the same held-out prompts every time.

Greedy, by `student.sampler`, before the first step, every so many steps and after the last, by one rank. It
draws nothing from the generators that training uses and leaves mode and attention as they were: a run ends
with the same weights, bit for bit, with samples and without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from shards.errors import UsageError
from shards.reader import LogitDataset
from student.adapters import plain
from student.callbacks import due
from student.config import SAMPLES
from student.generate import make_sampler
from student.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from student.loop import TideTrainer

SEED = 0
"""Of the sampler; a greedy one draws nothing, and would draw from a generator of its own."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a held-out sample, up to its first maskable token, and what follows there."""

    sample_id: str
    ids: list[int]
    text: str
    answer: str
    """The sample's own text, cut where a completion would be."""


def held_out_prompts(
    dataset: LogitDataset, tokenizer: Any, *, count: int, tokens: int, positions: int
) -> list[Prompt]:
    """The first `count` held-out samples that a student can be asked to write again.

    Args:
        tokens: of a completion, at most; `positions`: of the student.

    Raises:
        UsageError: there is no such sample.
    """

    def decode(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def usable() -> Iterator[Prompt]:
        block = dataset.manifest.block_size
        for row in dataset.samples("heldout"):
            at = int(row.maskable.argmax())
            if at and -(-(at + tokens) // block) * block <= positions:
                ids = row.input_ids
                answer = decode(ids[at : min(at + tokens, row.real_length)])
                yield Prompt(row.sample_id, ids[:at].tolist(), decode(ids[:at]), answer)

    found = list(islice(usable(), count))
    if not found:
        raise UsageError(
            f"{dataset.path} holds no held-out sample whose prompt leaves room for sample_tokens {tokens}: "
            "lower it, leave sample_every out, or precompute with --holdout above 0"
        )
    return found


class WriteSamples(TrainerCallback):
    """Completes the prompts on the main rank and adds the texts to the run's `samples.jsonl`.

    On a step with a checkpoint its lines come first, so that a resumed run writes the same ones.
    """

    def __init__(self, trainer: TideTrainer, prompts: Sequence[Prompt]) -> None:
        self.trainer, self.prompts = trainer, prompts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            self._write(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.trainer.config
        if due(state.global_step, config.sample_every, last=state.global_step >= config.steps):
            self._write(state.global_step)

    def _write(self, step: int) -> None:
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        with trainer.off_the_clock():
            trainer.tell(f"writing {len(self.prompts)} samples")
            network = plain(trainer.accelerator.unwrap_model(trainer.model))
            how = SamplerConfig(
                max_new_tokens=trainer.config.sample_tokens, block_size=trainer.block_size, seed=SEED
            )
            with as_sampled(network):
                sampler = make_sampler(network, trainer.processing_class, static=False)
                done = sampler.generate([p.ids for p in self.prompts], how)
            with (trainer.out / SAMPLES).open("a", encoding="utf-8") as f:
                for prompt, completion in zip(self.prompts, done, strict=True):
                    line = {
                        "step": step,
                        "sample_id": prompt.sample_id,
                        "prompt": prompt.text,
                        "answer": prompt.answer,
                        "text": completion.text,
                        "finish": completion.finish,
                    }
                    f.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextmanager
def as_sampled(network: Any) -> Iterator[None]:
    """A network in training as the sampler needs it: evaluation mode, SDPA; as it was afterwards."""
    attention, training = network.config._attn_implementation, network.training
    network.config._attn_implementation = "sdpa"
    network.eval()
    try:
        yield
    finally:
        network.config._attn_implementation = attention
        network.train(training)
