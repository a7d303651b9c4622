"""A run: corpus rows in, parts of a logit dataset out.

Work is cut into parts (`precompute.parts`). A part's bytes depend on the corpus, the configuration and the
part alone, so an interrupted run goes on where it was, any part may be made again, and any number of runs on
one folder share the work. What surrounds the model goes on beside it (`precompute.loop`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from precompute.backends.vllm_version import require_vllm
from precompute.busy import Busy
from precompute.config import DTYPES, PrecomputeConfig
from precompute.corpus import Corpus, open_corpus
from precompute.drops import DropLimit
from precompute.fidelity import measured_once
from precompute.identity import source_of
from precompute.loop import Progress, make_parts
from precompute.parts import Range, begun, unfinished
from precompute.pipeline import WORKERS, Workers
from precompute.prepare import PrepareConfig, Preparer
from precompute.recipe import asker, decide, fidelity_of, taken_over
from precompute.teachers.base import Teacher, TeacherKind
from precompute.teachers.load import describe_teacher, load_teacher, load_teacher_tokenizer, teacher_kind
from precompute.tokens import infer_kind
from shards.agreement import recorded_config
from shards.errors import ConfigMismatch, TideError, UsageError
from shards.manifest import Manifest
from shards.writer import DatasetWriter
from student.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class Interrupted(TideError):
    """Ctrl-C: what is done stays done."""

    exit_code = 130


def make_preparer(config: PrecomputeConfig) -> Preparer:
    """Tokenizers and templates of both models, and the pipeline that they mean."""
    student = load_tokenizer(config.student)
    teacher = load_teacher_tokenizer(config.teacher)
    return Preparer(
        student,
        teacher,
        PrepareConfig(
            kind=infer_kind(student, teacher) if config.kind == "auto" else config.kind,
            block_size=config.block_size,
            student_max_length=config.max_length,
            teacher_max_length=config.max_teacher_length,
            loss_on=config.loss_on,
            content_search=config.content_search,
            holdout=config.holdout,
            seed=config.seed,
        ),
    )


def with_teacher_kind(config: PrecomputeConfig) -> PrecomputeConfig:
    """The settings with the teacher's kind decided; says so where a checkpoint is found to be autoregressive.

    Raises:
        ModelError: see `teacher_kind`. UsageError: a setting that an autoregressive teacher cannot have.
    """
    if config.teacher_kind != "auto":
        return config
    config = replace(config, teacher_kind=teacher_kind(config.teacher))
    if config.teacher_kind == "ar":
        logger.info(
            "%s is an autoregressive teacher (no mask token): it sees clean text, once for all views; "
            "--teacher-kind diffusion asks it as a diffusion model",
            config.teacher,
        )
    return config


def choose_device(config: PrecomputeConfig) -> torch.device:
    """As told; else as the dataset in `out` was begun; else cuda where there is one.

    Raises:
        ConfigMismatch: the dataset was begun on a device that this machine lacks.
    """
    if config.device:
        return torch.device(config.device)
    cuda = torch.cuda.is_available()
    begun = (recorded_config(config.out) or {}).get("compute", {}).get("device")
    if begun == "cuda" and not cuda:
        raise ConfigMismatch(
            f"{config.out} was made with other settings (compute.device: cuda -> cpu, there is no cuda "
            "device here): go on where there is one, or choose another --out"
        )
    return torch.device(begun or ("cuda" if cuda else "cpu"))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads on a CPU; None = as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def precompute(
    config: PrecomputeConfig, progress: Progress | None = None, *, busy: Busy | None = None
) -> Manifest:
    """Make a logit dataset, or what is left of it to make; returns its manifest.

    Several calls on one folder, in any number of processes and machines, share the parts; each returns when
    all of its parts are done. A folder that has a dataset decides the device, the thread count and
    `row_tokens` of what is added to it, where `config` does not.

    Args:
        busy: told where the time went.

    Raises:
        CorpusError: nothing usable in the corpus, or more of it dropped than `max_dropped`.
        ModelError: a model folder that cannot be used, or a teacher whose output is not finite.
        ConfigMismatch: `out` holds a dataset made with other settings.
        ShardError: `out` cannot be written (disk full, folder gone, ...); the same call goes on afterwards.
        Interrupted: Ctrl-C; the same call goes on where it was.
        TideError: a worker process was killed; the same call goes on where it was.
    """
    tell = progress or (lambda done, total, message: None)
    tell(0, config.limit, "loading models")
    if config.backend == "vllm":
        require_vllm()
    device = choose_device(config)
    corpus = open_corpus(config.corpus, limit=config.limit)
    ranges = begun(corpus, config.samples_per_part)  # what cannot be read is found out before a teacher loads
    preparer = make_preparer(config)
    config = with_teacher_kind(config)
    with Workers(worker_count(config, device), preparer) as workers:
        teacher = open_teacher(config, preparer, device)
        return make_dataset(config, corpus, ranges, preparer, teacher, workers, tell, busy or Busy())


def worker_count(config: PrecomputeConfig, device: torch.device) -> int:
    """Processes beside a model on this device."""
    return WORKERS.get(device.type, WORKERS["cuda"]) if config.workers is None else config.workers


def open_teacher(config: PrecomputeConfig, preparer: Preparer, device: torch.device) -> Teacher:
    """The teacher of settings `with_teacher_kind`, in their backend.

    Raises:
        UsageError: the backend is not here, or lacks something. ModelError: a folder that cannot be used.
    """
    kind: TeacherKind = "ar" if config.teacher_kind == "ar" else "diffusion"
    dtype, attention = DTYPES[config.dtype], config.teacher_attention
    if config.backend == "transformers":
        return load_teacher(config.teacher, kind=kind, attention=attention, dtype=dtype, device=device)
    require_vllm()
    from precompute.backends.vllm_teacher import EngineSettings, load_vllm_teacher

    return load_vllm_teacher(
        describe_teacher(config.teacher, kind=kind, attention=attention),
        dtype=dtype,
        device=device,
        codec=config.codec,
        block_size=config.block_size,
        longest=preparer.config.teacher_length + 1,  # and a BOS token
        settings=EngineSettings(tensor_parallel=config.tensor_parallel, cache_gb=config.cache_gb),
    )


def make_dataset(
    config: PrecomputeConfig,
    corpus: Corpus,
    ranges: Iterator[Range],
    preparer: Preparer,
    teacher: Teacher,
    workers: Workers,
    progress: Progress,
    busy: Busy,
) -> Manifest:
    """`precompute`, its corpus and models at hand."""
    first = next(ranges)
    ranges = chain([first], ranges)
    recipe = decide(config, source_of(corpus), first, preparer, teacher, progress)
    i, n = config.worker()
    limit = DropLimit(corpus, config.max_dropped)
    with DatasetWriter(
        config.out, recipe.kind, recipe.identity, take_over=taken_over(config), verify=config.verify_parts
    ) as writer:
        compute = writer.config["compute"]
        asking, ask = asker(config, recipe, teacher, compute["row_tokens"])
        parts = (
            (work, claim, workers.prepare(work.conversations, recipe.noise, asking) if claim else None)
            for work, claim in unfinished(ranges, writer, mine=lambda part: part % n == i)
        )
        try:
            with busy.loop, torch_threads(compute["threads"]):
                make_parts(config, parts, limit, ask, writer, workers, progress, busy)
        except KeyboardInterrupt as e:
            raise interrupted(writer) from e

        def measured() -> dict[str, Any]:
            with torch_threads(compute["threads"]):
                return fidelity_of(config, recipe, asking, first, preparer, teacher)

        return finish(config, writer, measured, progress)


def finish(
    config: PrecomputeConfig,
    writer: DatasetWriter,
    measured: Callable[[], dict[str, Any]],
    progress: Progress,
) -> Manifest:
    """All parts are made: publish the manifest, its fidelity `measured` first where it is asked for.

    Raises:
        UsageError: there was no part to make.
    """
    if not writer.finished():
        raise UsageError(f"part {config.part}: the corpus has no part for this worker; use fewer workers")
    fidelity = None
    if config.fidelity and (writer.fidelity or {}).get("asked") != config.fidelity:
        progress(0, config.limit, "measuring fidelity")
        fidelity = measured_once(config.out, config.fidelity, measured)
    return writer.finish(fidelity=fidelity)


def interrupted(writer: DatasetWriter) -> Interrupted:
    """Ctrl-C while parts were made."""
    done = _listed(writer.finished())
    return Interrupted(
        f"interrupted; finished parts in {writer.out}: {done}; the same command goes on from there"
    )


def _listed(parts: Collection[int], most: int = 8) -> str:
    shown = ", ".join(map(str, sorted(parts)[:most])) or "none"
    return f"{shown}, ... ({len(parts)} in all)" if len(parts) > most else shown
