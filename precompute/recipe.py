"""What one configuration and two models make of a corpus: the dataset's identity, and how its teacher is
asked. The same in every process that makes parts of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from precompute.budget import default_row_tokens, rows_at_once
from precompute.config import DTYPES, PrecomputeConfig
from precompute.engine import Pace, Targets, ask_all
from precompute.fidelity import Coder, measure
from precompute.identity import manifest_config, shared_size
from precompute.inputs import Asking
from precompute.loop import Progress
from precompute.parts import Range
from precompute.prepare import Preparer
from precompute.rows import Answers
from precompute.states import calibration, first_samples, state_rows
from precompute.tables import Coding, Keep, make_coding
from precompute.teachers.base import EngineTeacher, Teacher
from shards.codec import table_of
from shards.errors import UsageError
from shards.noise import NoiseConfig
from shards.schema import Kind


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a dataset's parts are made: what follows from its configuration, its models, and, where a sketch is
    fitted, its first part."""

    kind: Kind
    noise: NoiseConfig
    asking: Asking
    coding: Coding
    targets: Targets
    identity: dict[str, Any]
    """`precompute.identity.manifest_config`."""


def decide(
    config: PrecomputeConfig,
    source: dict[str, Any],
    first: Range,
    preparer: Preparer,
    teacher: Teacher,
    progress: Progress,
    *,
    keep: Keep | None = None,
) -> Recipe:
    """
    Args:
        source: `precompute.identity.source_of` the corpus.
        first: its part 0.
        keep: see `precompute.tables.make_coding`.

    Raises:
        UsageError: settings that do not go with these models. Others: see `make_coding`.
    """
    spec, kind = teacher.spec, preparer.config.kind
    autoregressive = spec.kind == "ar"
    compdemo = not autoregressive if config.compdemo is None else config.compdemo
    noise = NoiseConfig(
        seed=config.seed,
        views=config.views,
        timesteps=config.timesteps,
        unit="chunk" if kind == "cross" else "token",
        compdemo=compdemo,
        demo_ratio=config.demo_ratio,
    )
    block_size = spec.block_size or config.block_size
    row_tokens = config.row_tokens or default_row_tokens(
        preparer.config.teacher_length,
        streams=1 if autoregressive else config.views * (2 if compdemo else 1),
        attention=spec.attention,
        block_size=block_size,
        device=teacher.device,
        token_bytes=teacher.token_bytes,
    )
    asking = Asking(
        mask_id=spec.mask_token_id,
        attention=spec.attention,
        block_size=block_size,
        shifted=spec.shifted,
        row_tokens=row_tokens,
        compdemo=compdemo,
        bos_id=spec.bos_token_id,
    )
    coding = Coding(config.codec)
    if kind == "shared":
        coding = make_coding(
            config,
            teacher,
            vocab_size=shared_size(config, preparer, spec),
            states=lambda: calibration(teacher, first, preparer, noise, asking, progress),
            keep=keep,
        )
    elif config.fidelity or table_of(config.codec):
        raise UsageError(
            "a cross-tokenizer dataset stores chunk log-probs, not distributions: leave out --fidelity, "
            "--sketch and --codec exact"
        )
    identity = manifest_config(
        config,
        source=source,
        preparer=preparer,
        noise=noise,
        spec=spec,
        row_tokens=row_tokens,
        device=teacher.device,
        backend=teacher.backend if isinstance(teacher, EngineTeacher) else {"backend": "transformers"},
        coding=coding.config(),
    )
    targets = Targets(
        codec=None if kind == "cross" else coding.codec,
        vocab_size=identity["shared_vocab_size"] or spec.vocab_size,
        head_rows=config.head_rows,
        sketch=coding.sketch,
    )
    return Recipe(kind, noise, asking, coding, targets, identity)


def taken_over(config: PrecomputeConfig) -> list[str]:
    """Settings of the machine of which a dataset that is there decides."""
    return ["compute.threads", *([] if config.row_tokens else ["compute.row_tokens"])]


def asker(
    config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, row_tokens: int
) -> tuple[Asking, Callable[..., list[Answers]]]:
    """How a dataset of this row length is asked for, and what asks: `precompute.engine.ask_all`, but for
    samples, jobs and progress."""
    asking = replace(recipe.asking, row_tokens=row_tokens)
    if isinstance(teacher, EngineTeacher):
        at_once = max(1, teacher.tokens_at_once // row_tokens)
    else:
        at_once = rows_at_once(row_tokens, device=teacher.device, token_bytes=teacher.token_bytes)
    pace = Pace(rows=at_once, head_rows=config.head_rows)
    return asking, partial(ask_all, teacher, asking=asking, targets=recipe.targets, pace=pace)


def fidelity_of(
    config: PrecomputeConfig,
    recipe: Recipe,
    asking: Asking,
    first: Range,
    preparer: Preparer,
    teacher: Teacher,
) -> dict[str, Any]:
    """`precompute.fidelity.measure`, on so many samples of part 0 as `config` asks for."""
    coder = Coder(
        codec=recipe.coding.codec,
        targets=recipe.targets,
        table=recipe.coding.table,
        head=lambda hidden: teacher.head(hidden.to(DTYPES[config.dtype])),
        vocab_size=recipe.identity["student"]["vocab_size"],
        device=teacher.device,
    )
    samples = first_samples(first, preparer, config.fidelity or 0, asking)
    return measure(state_rows(teacher, samples, recipe.noise, asking), coder)
