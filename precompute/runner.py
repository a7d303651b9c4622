"""A run: corpus rows in, parts of a logit dataset out.

Work is cut into parts (`precompute.parts`). A part's bytes depend on the corpus, the configuration and the
part alone, so an interrupted run goes on where it was, any part may be made again, and any number of runs on
one folder share the work. What surrounds the model goes on beside it (`precompute.loop`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from precompute.budget import default_row_tokens, rows_at_once
from precompute.busy import Busy
from precompute.config import DTYPES, PrecomputeConfig
from precompute.corpus import Corpus, open_corpus
from precompute.drops import DropLimit
from precompute.engine import Pace, Targets, ask_all
from precompute.fidelity import Coder, measured
from precompute.identity import manifest_config, shared_size
from precompute.inputs import Asking
from precompute.loop import Progress, make_parts
from precompute.parts import Range, cut, unfinished
from precompute.pipeline import WORKERS, Workers
from precompute.prepare import PrepareConfig, Preparer
from precompute.states import calibration, first_samples, state_rows
from precompute.tables import Coding, make_coding
from precompute.teachers.base import Teacher
from precompute.teachers.load import load_teacher, load_teacher_tokenizer
from precompute.tokens import infer_kind
from shards.agreement import recorded_config
from shards.codec import table_of
from shards.errors import ConfigMismatch, CorpusError, TideError, UsageError
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.writer import DatasetWriter
from student.tokenizer import load_tokenizer


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
    device = choose_device(config)
    corpus = open_corpus(config.corpus, limit=config.limit)
    ranges = cut(corpus, config.samples_per_part)
    first = next(ranges, None)  # a corpus that cannot be read is found out before a teacher is loaded
    if first is None:
        raise CorpusError(f"{config.corpus}: no rows to use")
    preparer = make_preparer(config)
    count = WORKERS.get(device.type, WORKERS["cuda"]) if config.workers is None else config.workers
    with Workers(count, preparer) as workers:
        teacher = load_teacher(
            config.teacher, attention=config.teacher_attention, dtype=DTYPES[config.dtype], device=device
        )
        parts = chain([first], ranges)
        return make_dataset(config, corpus, parts, preparer, teacher, workers, tell, busy or Busy())


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
    spec, kind = teacher.spec, preparer.config.kind
    noise = NoiseConfig(
        seed=config.seed,
        views=config.views,
        timesteps=config.timesteps,
        unit="chunk" if kind == "cross" else "token",
        compdemo=config.compdemo,
        demo_ratio=config.demo_ratio,
    )
    first = next(ranges)
    ranges = chain([first], ranges)
    block_size = spec.block_size or config.block_size
    row_tokens = config.row_tokens or default_row_tokens(
        preparer.config.teacher_length,
        streams=config.views * (2 if config.compdemo else 1),
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
        compdemo=config.compdemo,
    )
    coding = Coding(config.codec)
    if kind == "shared":
        coding = make_coding(
            config,
            teacher,
            vocab_size=shared_size(config, preparer, spec),
            states=lambda: calibration(teacher, first, preparer, noise, asking, progress),
        )
    elif config.fidelity or table_of(config.codec):
        raise UsageError(
            "a cross-tokenizer dataset stores chunk log-probs, not distributions: leave out --fidelity, "
            "--sketch and --codec exact"
        )
    identity = manifest_config(
        config,
        corpus=corpus,
        preparer=preparer,
        noise=noise,
        spec=spec,
        row_tokens=row_tokens,
        device=teacher.device,
        coding=coding.config(),
    )
    targets = Targets(
        codec=None if kind == "cross" else coding.codec,
        vocab_size=identity["shared_vocab_size"] or spec.vocab_size,
        head_rows=config.head_rows,
        sketch=coding.sketch,
    )
    i, n = config.worker()
    limit = DropLimit(corpus, config.max_dropped)
    begun = ["compute.threads", *([] if config.row_tokens else ["compute.row_tokens"])]
    with DatasetWriter(config.out, kind, identity, take_over=begun, verify=config.verify_parts) as writer:
        compute = writer.config["compute"]
        asking = replace(asking, row_tokens=compute["row_tokens"])
        at_once = rows_at_once(asking.row_tokens, device=teacher.device, token_bytes=teacher.token_bytes)
        pace = Pace(rows=at_once, head_rows=config.head_rows)

        parts = (
            (work, claim, workers.prepare(work.conversations, noise, asking) if claim else None)
            for work, claim in unfinished(ranges, writer, mine=lambda part: part % n == i)
        )
        ask = partial(ask_all, teacher, asking=asking, targets=targets, pace=pace)
        try:
            with busy.loop, torch_threads(compute["threads"]):
                make_parts(config, parts, limit, ask, writer, workers, progress, busy)
        except KeyboardInterrupt as e:
            done = _listed(writer.finished())
            raise Interrupted(
                f"interrupted; finished parts in {config.out}: {done}; the same command goes on from there"
            ) from e
        if not writer.finished():
            raise UsageError(f"part {config.part}: the corpus has no part for this worker; use fewer workers")
        fidelity = None
        if config.fidelity and (writer.fidelity or {}).get("asked") != config.fidelity:
            progress(0, config.limit, "measuring fidelity")
            coder = Coder(
                codec=coding.codec,
                targets=targets,
                table=coding.table,
                head=lambda hidden: teacher.head(hidden.to(DTYPES[config.dtype])),
                vocab_size=writer.settings.student.vocab_size,
                device=teacher.device,
            )
            with torch_threads(compute["threads"]):
                samples = first_samples(first, preparer, config.fidelity, shifted=spec.shifted)
                states = partial(state_rows, teacher, samples, noise, asking)
                fidelity = measured(config.out, config.fidelity, states, coder)
        return writer.finish(fidelity=fidelity)


def _listed(parts: Collection[int], most: int = 8) -> str:
    shown = ", ".join(map(str, sorted(parts)[:most])) or "none"
    return f"{shown}, ... ({len(parts)} in all)" if len(parts) > most else shown
