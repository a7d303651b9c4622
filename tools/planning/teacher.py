"""What stage one would cost: the teacher's pass in two layouts, its memory, the shards it would write.

Everything is counted on a sample that the run's own code has laid out (`precompute.trial`), and scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from precompute.budget import default_row_tokens, rows_at_once, token_bytes
from precompute.config import DTYPES
from precompute.corpus import open_corpus
from precompute.cost import (
    Cost,
    Network,
    TeacherMemory,
    packed_cost,
    padded_cost,
    teacher_memory,
)
from precompute.inputs import Asking, Job, make_jobs, questions
from precompute.prepare import PrepareConfig
from precompute.ready import Prepared, prepare
from precompute.runner import make_preparer, with_teacher_kind
from precompute.teachers import dense, llada2
from precompute.teachers.checkpoint import empty_model
from precompute.teachers.load import WITHOUT_WEIGHTS, Description, describe_teacher, teacher_folder
from precompute.tokens import shared_vocab_size
from precompute.trial import assumed_rows, drawn, invented, lay_out_all
from shards.codec import SparseCodec
from shards.errors import CorpusError, UsageError
from shards.manifest import Manifest
from shards.noise import NoiseConfig
from shards.realistic import SPREAD, mean_kept
from shards.row import Row
from shards.schema import Kind
from shards.size import Size, size_like, size_of
from student.layout import group
from student.memory import Shape
from student.model import read_config
from tools.planning.devices import Device
from tools.planning.question import Question

SIZED_POSITIONS = 20_000
"""Distilled positions that are encoded to see how large rows are."""


class TeacherPlan:
    """The answer, piece by piece; what is dear is made when it is asked for.

    Raises (all of it): ModelError, CorpusError, UsageError, ShardError, as `tide precompute` would.
    """

    def __init__(self, question: Question, progress: Callable[[float, float | None, str], None]) -> None:
        progress(0, None, "reading models")
        settings = question.settings
        folder, _ = teacher_folder(settings.teacher, WITHOUT_WEIGHTS)
        settings = with_teacher_kind(replace(settings, teacher=str(folder)))
        self.question, self.settings = question, settings
        self.ar = settings.teacher_kind == "ar"
        self.opened: Description = describe_teacher(
            folder, kind="ar" if self.ar else "diffusion", attention=settings.teacher_attention
        )
        self.student = Shape.of(read_config(settings.student))
        self.network = Network.of(self.opened.config)
        self.preparer = None if question.lengths else make_preparer(settings)
        self.how = self.preparer.config if self.preparer else self._without_tokenizers()
        self.dtype = DTYPES[settings.dtype]
        self.parameters = parameters_of(self.opened)
        self.ready, self.share, self.rows = self._prepared(progress)

    def _without_tokenizers(self) -> PrepareConfig:
        s = self.settings
        return PrepareConfig(
            kind="cross" if s.kind == "cross" else "shared",
            block_size=s.block_size,
            student_max_length=s.max_length,
            teacher_max_length=s.max_teacher_length,
            loss_on=s.loss_on,
            holdout=s.holdout,
            seed=s.seed,
        )

    @property
    def kind(self) -> Kind:
        return self.how.kind

    @property
    def compdemo(self) -> bool:
        return not self.ar if self.settings.compdemo is None else self.settings.compdemo

    @property
    def noise(self) -> NoiseConfig:
        return NoiseConfig(
            seed=self.settings.seed,
            views=self.settings.views,
            timesteps=self.settings.timesteps,
            unit="chunk" if self.kind == "cross" else "token",
            compdemo=self.compdemo,
            demo_ratio=self.settings.demo_ratio,
        )

    @cached_property
    def row_tokens(self) -> int:
        return self.settings.row_tokens or default_row_tokens(
            self.how.teacher_length,
            streams=1 if self.ar else self.settings.views * (2 if self.compdemo else 1),
            attention=self.opened.attention,
            block_size=self.block_size,
            **self._room,
        )

    @property
    def block_size(self) -> int:
        return self.opened.family.block_size or self.settings.block_size

    @property
    def _room(self) -> dict[str, Any]:
        """What decides how much runs at once."""
        free = self.question.device.gib * 2**30 - self.question.memory.context_gb * 1e9 - self.weight_bytes
        return {
            "device": torch.device(self.question.device.kind),
            "token_bytes": token_bytes(self.opened.config, self.dtype),
            "free_bytes": max(0, int(free)),
        }

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @cached_property
    def asking(self) -> Asking:
        return Asking(
            mask_id=self.opened.mask_token_id,
            attention=self.opened.attention,
            block_size=self.block_size,
            shifted=self.opened.family.shifted,
            row_tokens=self.row_tokens,
            compdemo=self.compdemo,
            bos_id=self.opened.bos_token_id,
        )

    def _prepared(self, progress: Callable[..., None]) -> tuple[Prepared, float, int]:
        """The sample, how many samples a corpus row gives, and corpus rows in all."""
        q = self.question
        if q.lengths is not None:
            vocab = min(self.student.vocab, self.network.vocab)
            samples = invented(q.lengths, q.sample, self.how, vocab_size=vocab)
            return lay_out_all(samples, self.noise, self.asking), 1.0, q.rows or q.sample
        progress(0, None, "reading the corpus")
        assert self.preparer is not None
        conversations, rows = drawn(
            open_corpus(self.settings.corpus, limit=self.settings.limit), q.sample, rows=q.rows
        )
        progress(0, len(conversations), "tokenising the sample")
        ready = prepare(conversations, self.preparer, self.noise, self.asking)
        if not ready.samples:
            why = "; ".join(f"{n} {reason}" for reason, n in ready.dropped.most_common(2))
            raise CorpusError(
                f"{self.settings.corpus}: none of {len(conversations)} rows looked at gives a sample ({why})"
            )
        return ready, len(ready.samples) / len(conversations), rows

    @cached_property
    def samples(self) -> int:
        """Of the whole corpus."""
        return max(1, round(self.rows * self.share))

    @property
    def parts(self) -> int:
        return math.ceil(self.rows / self.settings.samples_per_part)

    @property
    def views(self) -> int:
        """Of the whole dataset."""
        return self.samples * self.settings.views

    def scaled(self, count: float) -> float:
        """A count of the sample, over the whole corpus."""
        return count * self.samples / len(self.ready.samples)

    @property
    def at_once(self) -> int:
        """Packed rows of one forward."""
        return rows_at_once(self.row_tokens, **self._room)

    def cost_of(self, jobs: list[Job]) -> Cost:
        """Of the packed engine."""
        rows = list(group((len(j.piece) for j in jobs), self.row_tokens))
        forwards = (
            [jobs[i].piece for row in rows[start : start + self.at_once] for i in row]
            for start in range(0, len(rows), self.at_once)
        )
        return packed_cost(self.network, forwards, self.opened.attention, self.question.device.counting)

    @cached_property
    def engine(self) -> Cost:
        """Of the sample."""
        return self.cost_of(self.ready.jobs)

    @cached_property
    def one_view(self) -> Cost:
        """Of the sample with one view each, as a step of online training would ask for it."""
        plans = ([of[i % len(of)]] for i, of in enumerate(self.ready.plans))
        return self.cost_of(
            [j for s, p in zip(self.ready.samples, plans) for j in make_jobs(s, p, self.asking)]
        )

    @property
    def padded_to(self) -> int:
        return self.question.padded_to or self.how.teacher_length

    @cached_property
    def naive(self) -> Cost:
        """Of the sample, every view in padded sequences, one for each half; of an autoregressive teacher one
        for each sample."""
        passes = sum(
            len(questions(sample, 0, plan, compdemo=self.compdemo))
            for sample, plans in zip(self.ready.samples, self.ready.plans)
            for plan in (plans[:1] if self.ar else plans)
        )
        return padded_cost(self.network, [self.padded_to] * passes, self.opened.attention)

    def hours(self, flops: float, forwards: float = 0.0, *, device: Device | None = None) -> float:
        """GPU-hours: of products at the efficiency, or of reading the weights for so many forwards, whichever
        is more."""
        on = device or self.question.device
        products = flops / (on.tflops * 1e12 * self.question.efficiency)
        return max(products, forwards * self.weight_bytes / (on.gb_per_s * 1e9)) / 3600

    @property
    def engine_hours(self) -> float:
        """GPU-hours of the whole corpus."""
        forwards = math.ceil(self.scaled(self.engine.tokens) / (self.row_tokens * self.at_once))
        return self.hours(self.scaled(self.engine.flops), forwards)

    @property
    def naive_hours(self) -> float:
        return self.hours(self.scaled(self.naive.flops))

    @cached_property
    def memory(self) -> TeacherMemory:
        tokens = self.row_tokens * self.at_once
        return teacher_memory(
            self.opened.config,
            parameters=self.parameters,
            dtype=self.dtype,
            forward_tokens=tokens,
            reads=math.ceil(tokens * self.engine.head_positions / max(1, self.engine.tokens)),
            head_rows=self.settings.head_rows,
            assumed=self.question.memory,
        )

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.question.device.gib * 2**30

    @property
    def row_activations(self) -> float:
        """Bytes that one packed row adds."""
        return float(self.row_tokens * token_bytes(self.opened.config, self.dtype))

    @cached_property
    def target_vocab(self) -> int:
        """Leading ids that distributions are over."""
        most = min(self.network.vocab, self.student.vocab)
        if self.preparer is not None:
            tokenizers = self.preparer.student.tokenizer, self.preparer.teacher.tokenizer
            most = min(self.network.vocab, shared_vocab_size(*tokenizers))
        return self.settings.shared_vocab_size or most

    @property
    def codec_name(self) -> str | None:
        """None across tokenizers, where chunk log-probs are stored."""
        return None if self.kind == "cross" else self.settings.codec.name

    @property
    def kept(self) -> float | None:
        """Assumed entries per position; None where nothing is assumed."""
        codec = self.settings.codec
        if self.kind == "cross" or self.question.like or not isinstance(codec, SparseCodec):
            return None
        return mean_kept(codec, SPREAD) if self.question.kept is None else self.question.kept

    @cached_property
    def invented_rows(self) -> list[list[Row]]:
        """The sample's rows with targets of the size of real ones, up to `SIZED_POSITIONS`."""
        jobs, end, positions = [], 0, 0
        for job in self.ready.jobs:
            if positions > SIZED_POSITIONS and job.sample >= end:
                break
            jobs.append(job)
            positions, end = positions + len(job.view), job.sample + 1
        some = replace(self.ready, samples=self.ready.samples[:end], plans=self.ready.plans[:end], jobs=jobs)
        codec = None if self.kind == "cross" else self.settings.codec
        return assumed_rows(some, codec, vocab_size=self.target_vocab, kept=self.question.kept)

    @cached_property
    def size(self) -> Size:
        masked = self.scaled(sum(int(p.masked.sum()) for plans in self.ready.plans for p in plans))
        if self.question.like:
            manifest = Manifest.load(self.question.like)
            if manifest.kind != self.kind:
                raise UsageError(
                    f"--like {self.question.like} is a dataset of kind {manifest.kind}, the plan is of kind "
                    f"{self.kind}: name one of that kind, or leave it out"
                )
            return size_like(manifest, views=self.views, masked=masked, parts=self.parts)
        tokens = 0 if self.preparer is None else len(self.preparer.student.tokenizer)
        found = size_of(
            self.invented_rows,
            kind=self.kind,
            codec=self.settings.codec,
            vocab_size=max(self.student.vocab, tokens),
            shared_vocab_size=self.target_vocab if self.kind == "shared" else None,
            width=self.network.hidden,
            all_samples=self.samples,
            parts=self.parts,
        )
        return replace(found, masked=masked)


def parameters_of(opened: Description) -> int:
    """Of a teacher's model, from its configuration."""
    moe = opened.family.structure == "llada2"
    model_class = llada2.Glm4MoeForCausalLM if moe else dense.CLASSES[opened.family.structure][1]
    return sum(p.numel() for p in empty_model(model_class, opened.config).parameters())
