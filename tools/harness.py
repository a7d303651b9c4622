"""A student as a model of lm-evaluation-harness, under the name `tide`; needs the extra `tide[lm-eval]`.

Generation goes through the block-diffusion sampler. Likelihoods are lower bounds (`student.elbo`), estimated
with `draws` masks from a fixed seed: fit for choosing among answers, not to be read beside an autoregressive
model's exact ones. As lm-evaluation-harness's own command, with the model registered:

    python -m tools.harness --model tide --model_args pretrained=DIR,draws=64 --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from shards.errors import TideError, UsageError
from student.elbo import Continuation, log_likelihood_bounds
from student.generate import block_size_of, chat_text, load_sampler, raw_ids
from student.sampler_config import SamplerConfig


@register_model("tide")
class TideLM(LM):
    """Answers lm-evaluation-harness's three kinds of request.

    Args:
        pretrained: model or run folder, or hub id, of a block-diffusion student.
        device, dtype: see `student.generate.load_sampler`; the dtype by name.
        batch_size: prompts generated together.
        block_size: tokens per block; None = as trained.
        steps: denoising passes for a request's tokens, at most one each; None = one each.
        draws: masks per likelihood.
        seed: of the masks, and of sampling where a task samples.
        max_gen_toks: new tokens where a task does not say.
        think: leave the chat template's thinking block open instead of empty.
        report: called with (title, done, total).
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        block_size: int | None = None,
        block_origin: str = "sequence",
        steps: int | None = None,
        threshold: float | None = None,
        guidance: float = 0.0,
        draws: int = 32,
        seed: int = 0,
        max_gen_toks: int = 256,
        think: bool = False,
        report: Callable[[str, int, int], None] = lambda title, done, total: None,
    ) -> None:
        super().__init__()
        if dtype not in (None, "auto", "float32", "bfloat16"):
            raise UsageError(f"dtype must be float32 or bfloat16, got {dtype!r}")
        if draws < 1:
            raise UsageError(f"draws must be at least 1, got {draws}")
        number = getattr(torch, dtype) if dtype not in (None, "auto") else None
        # lm-evaluation-harness's command says cuda:0 where nothing else was asked for.
        where = None if device == "cuda:0" else device
        self.sampler, self.tokenizer = load_sampler(pretrained, dtype=number, device=where)
        self.pretrained = pretrained
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.think, self.draws, self.seed, self.max_gen_toks = think, draws, seed, max_gen_toks
        self.report = report
        self.sampling: dict[str, Any] = {
            "block_size": block_size_of(self.sampler) if block_size is None else block_size,
            "block_origin": block_origin,
            "threshold": threshold,
            "guidance": guidance,
            "seed": seed,
        }
        self.steps = steps
        SamplerConfig(**self.sampling, steps=None if steps is None else min(steps, 256))  # may refuse
        self.cut = 0
        """Prompts and contexts that lost tokens on the left, for want of positions."""

    @property
    def max_length(self) -> int:
        """Positions, in whole blocks."""
        size = self.sampling["block_size"]
        return self.sampler.model.config.max_position_embeddings // size * size

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-evaluation-harness puts into its results."""
        model = self.sampler.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.dtype),
            "draws": self.draws,
            **self.sampling,
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, by which lm-evaluation-harness tells its caches apart."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return chat_text(
            self.tokenizer, chat_history, think=self.think, continue_last=not add_generation_prompt
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Prompts with equal settings run together, the longest first."""
        groups: dict[SamplerConfig, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[self._config(dict(request.args[1]))].append(i)
        answers = [""] * len(requests)
        done = 0
        for config, members in groups.items():
            prompts = {i: self._prompt(requests[i].args[0], config) for i in members}
            members.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                for i, c in zip(some, self.sampler.generate([prompts[i] for i in some], config)):
                    answers[i] = c.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, c.text)
                done += len(some)
                self.report("generating", done, len(requests))
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(bound in nats, whether greedy sampling writes the continuation).

        The latter is worked out where a document asks for one continuation; choices among several get False:
        their scores are all that is read.
        """
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds(pairs)
        documents = Counter((r.task_name, r.doc_id) for r in requests)
        alone = [i for i, r in enumerate(requests) if documents[r.task_name, r.doc_id] == 1]
        greedy = dict(zip(alone, self._greedy([pairs[i] for i in alone])))
        answers = [(float(x), greedy.get(i, False)) for i, x in enumerate(bounds)]
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Bound of a whole text. Beyond the model's positions, in windows that see half of theirs before."""
        texts, windows = [], []
        half = max(1, self.max_length // 2)
        for n, request in enumerate(requests):
            tokens = self._encode(request.args[0])
            cuts = [0, *range(self.max_length, len(tokens), half), len(tokens)] if tokens else []
            for start, end in pairwise(cuts):
                windows.append(Continuation(tokens[max(0, end - self.max_length) : start], tokens[start:end]))
                texts.append(n)
        totals = [0.0] * len(requests)
        for n, bound in zip(texts, self._bounds(windows)):
            totals[n] += float(bound)
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _config(self, asked: dict[str, Any]) -> SamplerConfig:
        """A request's settings, where it has some, over those of this model."""
        given = normalize_gen_kwargs(asked, self.max_gen_toks)
        new, steps = int(given["max_gen_toks"]), given.get("steps", self.steps)
        threshold = self.sampling["threshold"]
        return SamplerConfig(
            **self.sampling,
            max_new_tokens=new,
            steps=None if steps is None or threshold is not None else min(int(steps), new),
            temperature=float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0)),
            top_p=float(given.get("top_p", 1.0)),
            stop=tuple(filter(None, given["until"])),
        )

    def _prompt(self, text: str, config: SamplerConfig) -> list[int]:
        # A block may begin before the prompt's end, and with origin `prompt` before its start.
        room = self.max_length - config.max_new_tokens - config.block_size
        return self._last(self._encode(text) or [self.tokenizer.eos_token_id], max(1, room))

    def _pair(self, context: str, continuation: str) -> Continuation:
        """Tokens of the two together; spaces at the context's end belong to the continuation's first one."""
        end = len(context.rstrip())
        before = self._encode(context[:end])
        tokens = self._encode(context + continuation)[len(before) :]
        tokens = self._last(tokens, self.max_length)
        room = self.max_length - len(tokens)
        return Continuation(self._last(before, room) if room else [], tokens)

    def _encode(self, text: str) -> list[int]:
        """Nothing is added: templates bring their own special tokens, plain text has none in training."""
        return raw_ids(self.tokenizer, text)

    def _last(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) <= room:
            return tokens
        self.cut += 1
        return tokens[len(tokens) - room :]

    def _bounds(self, pairs: Sequence[Continuation]) -> Any:
        return log_likelihood_bounds(
            self.sampler.model,
            pairs,
            mask_token_id=self.sampler.mask_token_id,
            block_size=self.sampling["block_size"],
            draws=self.draws,
            seed=self.seed,
            progress=lambda done: self.report("likelihoods", done, len(pairs)),
        )

    def _greedy(self, pairs: Sequence[Continuation]) -> list[bool]:
        """Whether greedy sampling, a token a pass, writes each continuation."""
        answers = [False] * len(pairs)
        alike: dict[int, list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            if pair.tokens and pair.context and len(pair.context) + len(pair.tokens) <= self.max_length:
                alike[len(pair.tokens)].append(i)
        for n, members in alike.items():
            config = SamplerConfig(**{**self.sampling, "threshold": None}, max_new_tokens=n)
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                done = self.sampler.generate([pairs[i].context for i in some], config)
                for i, completion in zip(some, done):
                    answers[i] = completion.ids == list(pairs[i].tokens)
        return answers


def main() -> None:
    """lm-evaluation-harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except TideError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
