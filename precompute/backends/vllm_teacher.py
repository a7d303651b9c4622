"""A teacher in vLLM: its engine, and the pieces of a part as requests to it.

The engine runs in this process unless `VLLM_ENABLE_V1_MULTIPROCESSING=1` says otherwise. Every call of
`answer` begins with an empty prefix cache, so that what it gives depends on its arguments alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precompute.backends.vllm_checkpoint import Checkpoint, read_checkpoint
from precompute.backends.vllm_plugin import register
from precompute.backends.vllm_requests import Request, from_bytes, in_order, requests_of
from precompute.backends.vllm_version import MINOR, require_combination
from precompute.budget import token_bytes
from precompute.engine import Targets
from precompute.rows import Answers, join
from precompute.teachers.base import TeacherSpec
from precompute.teachers.load import Description
from shards.codec import Codec
from shards.errors import ModelError, UsageError
from shards.row import Target
from student.layout import SHARED_CLEAN, Piece

SEQUENCES = 64
"""Requests that run at once."""
STEP_TOKENS = 8192
"""Of a step, where steps need not be blocks."""
PAGE = 32
"""Tokens of a page of keys and values: a multiple of what kernels ask for, by `page_of` of a block too."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of the engine where it is not set: one process, the runner that this is tested with, no
remarks on standard output, and no reports home."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What is told to the engine."""

    tensor_parallel: int = 1
    """Devices that share the model."""
    cache_gb: float | None = None
    """Gigabytes for keys and values on each of them; None = what `SEQUENCES` of the longest requests need."""


def page_of(block_size: int) -> int:
    """Tokens of a page. A page that ended inside a block would be found again by a request with the same
    tokens up to there and others after it, which the block's keys and values depend on."""
    return math.lcm(PAGE, block_size)


class VllmTeacher:
    """A `precompute.teachers.base.EngineTeacher`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: TeacherSpec,
        *,
        block_size: int,
        longest: int,
        settings: EngineSettings,
    ) -> None:
        """
        Args:
            block_size: of the masks that have blocks.
            longest: tokens of a sample.

        Raises:
            ModelError: vLLM cannot load it.
        """
        self._checkpoint, self._spec, self._settings = checkpoint, spec, settings
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        blocks = spec.attention in (*SHARED_CLEAN, "block-causal")
        page = page_of(block_size) if blocks else PAGE
        longest = -(-longest // page) * page
        shards = min(settings.tensor_parallel, checkpoint.config.num_key_value_heads)
        of_token = checkpoint.cache_bytes * self._dtype.itemsize // shards
        wanted = (SEQUENCES * longest + page) * of_token  # and a page that vLLM keeps to itself
        cache_bytes = wanted if settings.cache_gb is None else int(settings.cache_gb * 1e9)
        self._cache_tokens = cache_bytes // of_token
        if self._cache_tokens < longest + page:
            raise UsageError(
                f"cache-gb {settings.cache_gb:g} holds {self._cache_tokens} tokens, a request may have "
                f"{longest}: give {(longest + page) * of_token / 1e9:.2g} or more, or leave it out"
            )
        how: dict[str, Any] = {"max_num_batched_tokens": max(STEP_TOKENS, longest)}
        if blocks:
            how = {
                "block_size": page,
                "max_num_batched_tokens": SEQUENCES * block_size,  # so that nothing cuts a block
                "long_prefill_token_threshold": block_size,
                "enable_chunked_prefill": True,
                "scheduler_cls": "precompute.backends.vllm_scheduler.BlockScheduler",
                "attention_config": {"use_non_causal": True},
            }
        self._config = TemporaryDirectory(prefix="tide-vllm-")
        config = checkpoint.engine_config(spec.attention, block_size, longest)
        (Path(self._config.name) / "config.json").write_text(json.dumps(config))
        self._llm = self._engine(
            enable_prefix_caching=spec.attention in SHARED_CLEAN,
            kv_cache_memory_bytes=cache_bytes,
            max_model_len=longest,
            **how,
        )

    def _engine(self, **how: Any) -> Any:
        try:
            from vllm import LLM
            from vllm.config import PoolerConfig

            from precompute.backends.vllm_pooler import TASK

            register()
            return LLM(
                str(self._checkpoint.folder),
                hf_config_path=self._config.name,
                runner="pooling",
                pooler_config=PoolerConfig(task=TASK),
                dtype=self._spec.dtype,
                skip_tokenizer_init=True,
                enforce_eager=True,
                async_scheduling=False,
                max_num_seqs=SEQUENCES,
                tensor_parallel_size=self._settings.tensor_parallel,
                use_tqdm_on_load=False,
                **how,
            )
        except Exception as e:  # its processes raise many kinds, plain ones too
            raise ModelError(
                f"{self._checkpoint.folder}: vLLM cannot load it ({_line(e)}); use --backend transformers"
            ) from e

    @property
    def spec(self) -> TeacherSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        from vllm.platforms import current_platform

        return torch.device(current_platform.device_type)

    @property
    def token_bytes(self) -> int:
        return token_bytes(self._checkpoint.config, self._dtype)

    @property
    def backend(self) -> dict[str, Any]:
        return {
            "backend": "vllm",
            "backend_version": MINOR,
            "tensor_parallel": self._settings.tensor_parallel,
            "cache_tokens": self._cache_tokens,
        }

    @property
    def tokens_at_once(self) -> int:
        """Half of what the cache holds, so that clean text is still there when it is needed."""
        return self._cache_tokens // 2

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        return self._head, None

    @cached_property
    def _head(self) -> Tensor:
        return self._checkpoint.head().to(self.device, self._dtype)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self._head).float()

    def answer(
        self, pieces: Sequence[Piece], gold: np.ndarray, targets: Targets
    ) -> tuple[np.ndarray, Target | None]:
        """See `EngineTeacher.answer`.

        Raises:
            ModelError: the engine stopped.
        """
        requests = [requests_of(piece, self._spec.attention) for piece in pieces]
        true = np.split(gold, np.cumsum([len(p.read) for p in pieces])[:-1])
        flat = [(r, true[i]) for i, some in enumerate(requests) for r in some]
        found: dict[int, tuple[np.ndarray, Target | None]] = {}
        try:
            self._llm.reset_prefix_cache()
            for clean in (True, False):
                wave = [k for k, (request, _) in enumerate(flat) if request.clean == clean]
                if wave:
                    found |= zip(wave, self._ask([flat[k] for k in wave], targets))
        except Exception as e:  # as above
            raise ModelError(
                f"{self._spec.name}: vLLM stopped ({_line(e)}); run the same command again"
            ) from e
        places, before, k = [], 0, 0
        for some in requests:
            theirs = [found[k + n] for n in range(len(some))]
            places.append(before + in_order(some, theirs))
            before += sum(len(logp) for logp, _ in theirs)
            k += len(some)
        sets = []
        for _, (logp, target) in sorted(found.items()):
            none = np.zeros(len(logp), dtype=np.int64)
            sets.append(Answers(none, none, none, logp, target))
        answers = join(sets).take(np.concatenate(places))
        return answers.gold_logp, answers.target

    def _ask(
        self, requests: Sequence[tuple[Request, np.ndarray]], targets: Targets
    ) -> list[tuple[np.ndarray, Target | None]]:
        from vllm import PoolingParams

        from precompute.backends.vllm_pooler import TASK, targets_to_json

        kept = targets_to_json(targets)
        params = []
        for request, true in requests:
            gold = np.zeros(len(request.read), dtype=np.int64)
            gold[request.source] = true[request.answers]
            asked = {"read": request.read.tolist(), "gold": gold.tolist(), "targets": kept}
            # A clean text is read anywhere; what begins with it is read past it only.
            fresh = request.clean or self._spec.attention not in SHARED_CLEAN
            params.append(PoolingParams(extra_kwargs=asked, skip_reading_prefix_cache=fresh))
        prompts = [{"prompt_token_ids": request.ids.tolist()} for request, _ in requests]
        outputs = self._llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
        return [from_bytes(o.outputs.data.numpy().tobytes(), targets.codec) for o in outputs]


def load_vllm_teacher(
    found: Description,
    *,
    dtype: torch.dtype,
    device: torch.device,
    codec: Codec,
    block_size: int,
    longest: int,
    settings: EngineSettings | None = None,
) -> VllmTeacher:
    """A frozen teacher in vLLM.

    Args:
        device: that is asked for; which one vLLM runs on, its build decides.
        codec: that its answers are kept in.
        block_size: tokens per block, where the teacher has no size of its own.
        longest: tokens of a sample.

    Raises:
        UsageError: it runs on another device, or a combination that it does not have.
        ModelError: see `read_checkpoint`; vLLM cannot load it.
    """
    checkpoint = read_checkpoint(found.folder)
    require_combination(found.attention, codec, checkpoint.head_size, name=found.name)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise UsageError(
            f"device {device} was asked for, but this vLLM runs on {current_platform.device_type}: leave "
            "--device out, use --backend transformers, or choose another --out"
        )
    return VllmTeacher(
        checkpoint,
        found.spec(dtype),
        block_size=found.family.block_size or block_size,
        longest=longest,
        settings=settings or EngineSettings(),
    )


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join((str(error) or type(error).__name__).split())
