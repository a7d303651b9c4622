"""`tide walk`, first half: one sample from its message to the teacher's answers, made again with the code
that made the dataset, and compared with what the dataset stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from precompute.config import DTYPES, PrecomputeConfig
from precompute.corpus import open_corpus
from precompute.engine import Targets, make_part
from precompute.inputs import Asking, as_read, make_jobs, questions
from precompute.parts import cut
from precompute.prepare import Preparer, sample_id_of
from precompute.runner import make_preparer
from precompute.sample import ChunkSpans, Conversation, Sample
from precompute.teachers.base import Teacher
from precompute.teachers.load import load_teacher
from shards.codec import SparseCodec
from shards.errors import UsageError
from shards.manifest import Manifest
from shards.noise import Plan
from shards.row import ChunkTargets, ExactTarget, PositionTargets, Row, SparseTarget
from student.layout import ATTENTIONS, SHARED_CLEAN
from tools.walking.steps import Step, excerpt, shaped, share, spans, texts

SHOWN = 6
"""Tokens or chunks of which the texts are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a dataset was made of, where it is at hand: model folders or hub ids, a corpus SPEC."""

    corpus: str | None
    student: str | None
    teacher: str | None
    device: str = "cpu"


def settings_of_dataset(manifest: Manifest, sources: Sources) -> PrecomputeConfig:
    """The settings that make this dataset's samples again."""
    c = manifest.config
    return PrecomputeConfig(
        teacher=sources.teacher or "",
        student=sources.student or "",
        corpus=sources.corpus or "",
        out=Path(),  # nothing is written
        views=manifest.noise.views,
        seed=manifest.noise.seed,
        kind=manifest.kind,
        compdemo=manifest.noise.compdemo,
        timesteps=manifest.noise.timesteps,
        block_size=manifest.block_size,
        loss_on=c["loss_on"],
        content_search=c["content_search"],
        holdout=c["holdout"],
        max_length=manifest.student.max_length,
        max_teacher_length=manifest.teacher["max_length"],
        samples_per_part=c["samples_per_part"],
        dtype=manifest.teacher["dtype"],
        device=sources.device,
    )


def asking_of(manifest: Manifest) -> Asking:
    """How the dataset's teacher was asked."""
    teacher = manifest.teacher
    if teacher["attention"] not in ATTENTIONS:
        raise UsageError(f"teacher attention {teacher['attention']!r} is not one this tide knows")
    return Asking(
        mask_id=teacher.get("mask_token_id"),
        attention=teacher["attention"],
        block_size=teacher["block_size"] or manifest.block_size,
        shifted=teacher["shifted"],
        row_tokens=manifest.config["compute"]["row_tokens"],
        compdemo=manifest.noise.compdemo,
        bos_id=teacher.get("bos_token_id"),
    )


def find_conversation(config: PrecomputeConfig, sample_id: str, part: int) -> Conversation:
    """The corpus row that a sample was made of, looked for in the corpus rows of its part.

    Raises:
        UsageError: it is not there: another corpus, or another version of it. CorpusError: see `open_corpus`.
    """
    for work in cut(open_corpus(config.corpus), config.samples_per_part):
        if work.part == part:
            for conversation in work.conversations:
                if sample_id_of(conversation) == sample_id:
                    return conversation
            break
    raise UsageError(
        f"--corpus {config.corpus}: its part {part} has no row whose sample id is {sample_id}; give the "
        "corpus that the dataset was made of"
    )


def teacher_steps(manifest: Manifest, row: Row, part: int, sources: Sources) -> Iterator[Step]:
    """Message, tokens, alignment, noise, questions, answers.

    Args:
        row: the stored view.
        part: the dataset's part that holds it.

    Raises:
        UsageError: the corpus, the tokenizers or the teacher are not those of the dataset.
        CorpusError, ModelError: one of them cannot be opened.
    """
    titles = (
        ("message", "precompute/corpus.py"),
        ("tokenise", "precompute/prepare.py, precompute/templates.py"),
        ("align", "shards/align.py (paper: CALM's chunks)"),
    )
    missing = [n for n in ("corpus", "student", "teacher") if getattr(sources, n) is None]
    if missing:
        why = f"give {', '.join('--' + n for n in missing)}: the dataset does not say where to find them"
        for title, where in titles:
            yield Step(title=title, where=where, missing=why)
        yield noise_step(manifest, row)
        for title, where in (
            ("teacher's questions", "precompute/inputs.py, student/layout.py"),
            ("frozen teacher", "precompute/engine.py, precompute/reduce.py"),
        ):
            yield Step(title=title, where=where, missing=why)
        return
    config = settings_of_dataset(manifest, sources)
    conversation = find_conversation(config, row.sample_id, part)
    preparer = make_preparer(config)
    sample = preparer.prepare(conversation)
    if not isinstance(sample, Sample):
        raise UsageError(f"sample {row.sample_id}: {sample.reason}: not the tokenizers of the dataset")
    asking = asking_of(manifest)
    sample = as_read(sample, asking)
    if not np.array_equal(sample.student_ids, row.input_ids):
        raise UsageError(
            f"--student {sources.student}: gives sample {row.sample_id} other tokens than the dataset has; "
            "give the student that it was made for"
        )
    yield message_step(conversation, titles[0])
    yield token_step(sample, preparer, titles[1])
    yield align_step(sample, preparer, titles[2])
    yield noise_step(manifest, row)
    yield question_step(sample, manifest, row, asking)
    teacher = load_teacher(
        config.teacher,
        kind="ar" if asking.mask_id is None else "diffusion",
        attention=asking.attention,
        dtype=DTYPES[config.dtype],
        device=sources.device,
    )
    yield answer_step(teacher, sample, manifest, row, asking)


def message_step(conversation: Conversation, titled: tuple[str, str]) -> Step:
    facts: dict[str, Any] = {"corpus row": f"{conversation.source}, row {conversation.index}"}
    if conversation.group:
        facts["group"] = conversation.group
    for i, message in enumerate(conversation.messages):
        facts[f"{i} {message.role}"] = excerpt(message.content)
    return Step(title=titled[0], where=titled[1], facts=facts)


def token_step(sample: Sample, preparer: Preparer, titled: tuple[str, str]) -> Step:
    student, teacher = (side.tokenizer.decode for side in (preparer.student, preparer.teacher))
    length = len(sample.student_ids)
    return Step(
        title=titled[0],
        where=titled[1],
        facts={
            "sample id": sample.sample_id,
            "split": sample.split,
            "student's text": excerpt(sample.text),
            "student ids [L]": shaped(sample.student_ids, f"{sample.real_length} real, the rest EOS"),
            "first of them": " | ".join(texts(sample.student_ids[:SHOWN], student)),
            "maskable": f"{share(int(sample.maskable.sum()), length)}: {spans(sample.maskable)}",
            "content bytes under them": sample.content_bytes,
            "teacher ids [L']": shaped(sample.teacher_ids),
            "first of these": " | ".join(texts(sample.teacher_ids[:SHOWN], teacher)),
        },
    )


def align_step(sample: Sample, preparer: Preparer, titled: tuple[str, str]) -> Step:
    aligned = sample.alignment
    lost = ", ".join(f"{n} {reason}" for reason, n in sample.dropped.items()) or "none"
    facts: dict[str, Any]
    if isinstance(aligned, ChunkSpans):
        facts = {"chunks [C]": len(aligned.student_start)}
        student, teacher = (side.tokenizer.decode for side in (preparer.student, preparer.teacher))
        for c in range(min(SHOWN, len(aligned.student_start))):
            s, t = int(aligned.student_start[c]), int(aligned.teacher_start[c])
            mine = sample.student_ids[s : s + int(aligned.student_length[c])]
            theirs = sample.teacher_ids[t : t + int(aligned.teacher_length[c])]
            facts[f"chunk {c}"] = (
                f"student {s}: {' | '.join(texts(mine, student))}   teacher {t}: "
                f"{' | '.join(texts(theirs, teacher))}"
            )
    else:
        shift = aligned.teacher - aligned.student
        facts = {
            "pairs": shaped(aligned.student, "student positions with a teacher counterpart"),
            "teacher - student position": f"{shift.min()} to {shift.max()}",
        }
    return Step(
        title=titled[0], where=titled[1], facts={**facts, "maskable tokens without counterpart": lost}
    )


def noise_step(manifest: Manifest, row: Row) -> Step:
    """The stored noise; the reader has drawn it again from (seed, sample id, view) and compared."""
    noise, masked = manifest.noise, int(row.masked.sum())
    facts: dict[str, Any] = {
        "keyed by": f"seed {noise.seed}, sample {row.sample_id}, view {row.view} of {noise.views}",
        "timestep t": row.t,
        "CE weight 1/t": 1 / row.t,
        "masked M": f"{share(masked, int(row.maskable.sum()))} maskable tokens: {spans(row.masked)}",
        "masked as a whole": f"a {noise.unit}",
    }
    half = row.positions.half_a if row.positions is not None else None
    unit = "positions"
    if row.chunks is not None:
        half, unit = row.chunks.half_a[row.chunks.masked], "masked chunks"
    if half is not None:
        facts["CompDemo"] = (
            f"half A {share(int(half.sum()), len(half))} {unit}, half B the rest"
            if noise.compdemo
            else "off: one pass hides all of M"
        )
    facts["source"] = (
        "philox: drawn again here, equal" if manifest.noise_source == "philox" else "explicit: as stored"
    )
    return Step(title="noise plan", where="shards/noise.py (paper: masking, CompDemo)", facts=facts)


def stored_plan(row: Row) -> Plan:
    """The noise plan that a row carries, wherever it came from."""
    half_a, none = np.zeros_like(row.masked), np.zeros(0, dtype=bool)
    if row.positions is not None:
        half_a[row.positions.positions] = row.positions.half_a
    chunks = (none, none, none)
    if row.chunks is not None:
        chunks = (row.chunks.masked, row.chunks.active, row.chunks.half_a)
    return Plan(np.float32(row.t), row.masked, half_a, *chunks)


def question_step(sample: Sample, manifest: Manifest, row: Row, asking: Asking) -> Step:
    plan = stored_plan(row)
    asked = questions(sample, row.view, plan, compdemo=asking.compdemo)
    jobs = make_jobs(sample, [plan], asking)
    padded = len(asked) * manifest.teacher["max_length"]
    if asking.attention in SHARED_CLEAN:
        padded *= 2
    facts: dict[str, Any] = {
        f"pass {i + 1}": (
            "shows the clean text to the left"
            if asking.mask_id is None
            else f"hides {len(q.hidden)} teacher tokens"
        )
        + f", asks for {len(q.asked)}"
        for i, q in enumerate(asked)
    }
    facts |= {
        "attention": asking.attention + (", read at the left neighbour" if asking.shifted else ""),
        "packed tokens [P]": ", ".join(str(len(j.piece)) for j in jobs) or "0: nothing is masked",
        "read [Q]": sum(len(j.gold) for j in jobs),
        "the padded layout would run": f"{padded:,} tokens",
    }
    return Step(
        title="teacher's questions",
        where="precompute/inputs.py, student/layout.py (paper: CompDemo)",
        facts=facts,
    )


def answer_step(teacher: Teacher, sample: Sample, manifest: Manifest, row: Row, asking: Asking) -> Step:
    codec = manifest.codec
    if isinstance(codec, SparseCodec):
        codec = replace(codec, sketch=0)  # compared are ids and log-probs, which a sketch does not change
    targets = Targets(
        codec=None if manifest.kind == "cross" else codec,
        vocab_size=manifest.shared_vocab_size or teacher.spec.vocab_size,
        head_rows=manifest.config["compute"]["head_rows"],
    )
    made, _ = make_part(teacher, [sample], [[stored_plan(row)]], asking=asking, targets=targets)
    asked = int(row.masked.sum())
    facts: dict[str, Any] = {
        "teacher": f"{teacher.spec.name}, {teacher.spec.architecture}, {teacher.spec.dtype}",
        "weights": "those of the dataset"
        if teacher.spec.weights_hash == manifest.teacher["weights_hash"]
        else f"OTHERS: {teacher.spec.weights_hash[:12]}, the dataset's are "
        f"{manifest.teacher['weights_hash'][:12]}",
        "logits": f"[Q, {teacher.spec.vocab_size}] float32, {targets.head_rows} rows at a time, never kept",
    }
    if not asked:
        facts["answers"] = "none: this view masks nothing"
    elif row.chunks is not None and made[0].chunks is not None:
        facts |= _chunk_facts(made[0].chunks, row.chunks)
    elif row.positions is not None and made[0].positions is not None:
        facts |= _position_facts(made[0].positions, row.positions)
    return Step(title="frozen teacher", where="precompute/engine.py, precompute/reduce.py", facts=facts)


def _chunk_facts(made: ChunkTargets, stored: ChunkTargets) -> dict[str, Any]:
    worst = float(np.abs(made.logp - stored.logp).max(initial=0.0))
    return {
        "chunk log-probs [A]": shaped(made.logp, "sums over each active chunk's teacher tokens"),
        "worst difference to the stored": f"{worst:.2g} nats",
    }


def _position_facts(made: PositionTargets, stored: PositionTargets) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "gold log-probs [N]": shaped(made.gold_logp),
        "worst difference to the stored": f"{np.nanmax(np.abs(made.gold_logp - stored.gold_logp)):.2g} nats",
    }
    ours, theirs = made.target, stored.target
    if isinstance(ours, SparseTarget) and isinstance(theirs, SparseTarget):
        same = np.array_equal(ours.counts, theirs.counts) and np.array_equal(ours.ids, theirs.ids)
        facts["kept entries [K]"] = (
            f"{len(ours.ids):,}, {len(ours.ids) / len(ours.counts):.1f} a position; ids "
            + ("equal to the stored" if same else "NOT all those stored")
        )
        if same:
            worst = float(np.abs(ours.logp - theirs.logp).max(initial=0.0))
            facts["worst difference of kept log-probs"] = f"{worst:.2g} nats, of which most is quantisation"
        facts["tails [N, T]"] = shaped(ours.tails, "log of the mass not kept, at every declared temperature")
    elif isinstance(ours, ExactTarget) and isinstance(theirs, ExactTarget):
        facts["hidden states [N, H]"] = shaped(ours.hidden)
    return facts
