"""What decides a dataset's bytes, as the manifest keeps it: models, tokenizers, templates, corpus, noise,
codec, machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from precompute.config import PrecomputeConfig
from precompute.corpus import Corpus
from precompute.prepare import Preparer
from precompute.teachers.base import TeacherSpec
from precompute.tokens import shared_vocab_size, template_hash
from shards.errors import UsageError
from shards.noise import NoiseConfig
from shards.settings import StudentInfo
from student.tokenizer import tokenizer_hash

SMALLEST_SHARED = 0.5
"""A shared vocabulary below this share of the student's is a mistake, not a choice."""


def manifest_config(
    config: PrecomputeConfig,
    *,
    source: dict[str, Any],
    preparer: Preparer,
    noise: NoiseConfig,
    spec: TeacherSpec,
    row_tokens: int,
    device: torch.device,
    backend: dict[str, Any],
    coding: dict[str, Any],
) -> dict[str, Any]:
    """JSON values only. Whatever may change between two runs that go on with one another (limit, part, the
    share that may be dropped, where folders lie) is left out.

    Args:
        source: `source_of` the corpus.
        backend: what runs the teacher, under the key `backend`, and its own settings.
        coding: `precompute.tables.Coding.config`.
    """
    student, teacher = preparer.student.tokenizer, preparer.teacher.tokenizer
    info = StudentInfo(
        tokenizer_hash=tokenizer_hash(student),
        vocab_size=len(student),
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
        pad_token_id=student.pad_token_id,
        template_hash=template_hash(preparer.student_template),
        max_length=preparer.config.student_length,
    )
    return {
        "student": asdict(info),
        "teacher": {
            **spec.to_json(),
            "tokenizer_hash": tokenizer_hash(teacher),
            "template_hash": template_hash(preparer.teacher_template),
            "max_length": preparer.config.teacher_length,
        },
        "noise": {**asdict(noise), "source": "philox"},
        **coding,
        "block_size": config.block_size,
        "shared_vocab_size": None if preparer.config.kind == "cross" else shared_size(config, preparer, spec),
        "loss_on": config.loss_on,
        "content_search": config.content_search,
        "holdout": config.holdout,
        "source": source,
        "samples_per_part": config.samples_per_part,
        "compute": {
            **backend,
            "device": device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "row_tokens": row_tokens,
            "head_rows": config.head_rows,
        },
    }


def source_of(corpus: Corpus) -> dict[str, Any]:
    """What names a corpus, on every machine."""
    return {"spec": corpus.name, "fingerprint": corpus.fingerprint, "licence": corpus.licence}


def shared_size(config: PrecomputeConfig, preparer: Preparer, spec: TeacherSpec) -> int:
    """Leading ids that both sides' distributions are normalised over: as told, else as the tokenizers agree.

    Raises:
        UsageError: more than one side has, or so few that the tokenizers hardly agree.
    """
    student, teacher = preparer.student.tokenizer, preparer.teacher.tokenizer
    most = min(len(student), spec.vocab_size)
    if config.shared_vocab_size is not None:
        if config.shared_vocab_size > most:
            raise UsageError(
                f"shared-vocab-size must be at most {most}, which both sides have (student {len(student)}, "
                f"teacher {spec.vocab_size}), got {config.shared_vocab_size}"
            )
        return config.shared_vocab_size
    size = min(most, shared_vocab_size(student, teacher))
    if size < SMALLEST_SHARED * len(student):
        raise UsageError(
            f"only the first {size} of {len(student)} ids are the same ordinary tokens in both tokenizers "
            "(a mask token among the first ids?): set shared-vocab-size, or use kind cross"
        )
    return size
