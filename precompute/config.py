"""Settings of one precompute run: everything `tide precompute` can be told, checked once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from shards.codec import Codec, SparseCodec
from shards.errors import UsageError
from shards.noise import Timesteps
from student.layout import ATTENTIONS, Attention

Kind = Literal["auto", "shared", "cross"]
LossOn = Literal["last", "assistant", "all"]
ContentSearch = Literal["exact", "first"]
TeacherKind = Literal["auto", "diffusion", "ar"]
Backend = Literal["transformers", "vllm"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Number formats a teacher can run in; a name that is not here is an error, never a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecomputeConfig:
    """One run: corpus + teacher -> logit dataset."""

    teacher: str
    """Model folder or hub id."""
    student: str
    """Model folder or hub id; its tokenizer and template alone are used."""
    corpus: str
    """Corpus SPEC: a path, a `datasets` id, `builtin:stdlib`, or a mixture of them (`precompute.mixture`)."""
    out: Path
    """Folder of the logit dataset; an unfinished one of the same configuration is resumed."""
    views: int = 4
    """Noisings per sample."""
    seed: int = 0
    """Decides timesteps, masks, CompDemo halves and the held-out split."""
    codec: Codec = field(default_factory=SparseCodec)
    """How distributions are stored; of no effect on a cross-tokenizer dataset, which stores chunk
    log-probs."""
    sketch_from: str | None = None
    """File or dataset whose basis the sketches have; None = it is fitted to this corpus and teacher."""
    fidelity: int | None = None
    """Training samples of part 0 that are scored densely too, for the manifest; None = none."""
    limit: int | None = None
    """Read only the first rows of the corpus; None = all."""
    shared_vocab_size: int | None = None
    """Leading ids that a shared-tokenizer dataset compares; None = as far as the tokenizers agree (151646 in
    the paper)."""
    kind: Kind = "auto"
    """`shared` or `cross` tokenizer pipeline; `auto` decides by the tokenizers."""
    compdemo: bool | None = None
    """Ask for each half of the masked tokens with the other half shown; None = yes, but not of an
    autoregressive teacher, whose answers do not depend on what is masked."""
    demo_ratio: float = 0.5
    """Expected share of half A."""
    timesteps: Timesteps = "stratified"
    """`stratified` over a sample's views, or `iid`."""
    block_size: int = 32
    """Tokens per block, in each model's own positions."""
    loss_on: LossOn = "last"
    """Which tokens may be masked and carry loss."""
    content_search: ContentSearch = "exact"
    """How contents are found in the rendered chats: where the template put them, or, for parity with the
    reference alone, where a search first finds their text."""
    holdout: float = 0.0
    """Share of the samples kept out of training."""
    max_dropped: float = 0.02
    """Largest share of target tokens without a teacher counterpart before the run stops."""
    teacher_kind: TeacherKind = "auto"
    """`diffusion` shows the teacher noised text, `ar` (autoregressive) the clean text to the left of each
    token; `auto` decides by its checkpoint (`precompute.teachers.load.teacher_kind`)."""
    teacher_attention: Attention | None = None
    """How the teacher's streams attend; None = its family's own way."""
    max_length: int = 512
    """Most student tokens of a sample."""
    max_teacher_length: int | None = None
    """Most teacher tokens of a sample; None = 768 (shared tokenizer) or 1024 (cross tokenizer), as in the
    paper."""
    samples_per_part: int = 256
    """Corpus rows per part: what an interruption can lose at most."""
    row_tokens: int | None = None
    """Teacher tokens per packed row, one row per forward; None = as the dataset in `out` was begun, else
    chosen by device and lengths."""
    head_rows: int = 512
    """Rows of logits that exist at once."""
    dtype: str = "float32"
    """Number format of the teacher: `float32` or `bfloat16`."""
    device: str | None = None
    """Torch device; None = as the dataset in `out` was begun, else cuda where there is one, else cpu."""
    backend: Backend = "transformers"
    """What runs the teacher: `transformers`, or `vllm`, which needs the extra of that name."""
    tensor_parallel: int = 1
    """Devices that share the teacher, of backend vllm."""
    cache_gb: float | None = None
    """Gigabytes for keys and values on each device, of backend vllm; None = what it needs."""
    workers: int | None = None
    """Processes that tokenise ahead of the teacher and encode behind it; None = 0 on a CPU, which the teacher
    needs itself, else 2. Without influence on what is written."""
    part: str = "0/1"
    """`i/n`: do only the parts p with p mod n = i, for workers that cannot see each other's folder, or shall
    not wait for each other."""
    verify_parts: bool = False
    """Read the parts that are on disk, and make those again whose bytes differ from their record; by default
    their sizes are compared."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", get_args(Kind)),
            ("loss_on", get_args(LossOn)),
            ("content_search", get_args(ContentSearch)),
            ("dtype", tuple(DTYPES)),
            ("teacher_kind", get_args(TeacherKind)),
            ("backend", get_args(Backend)),
            ("teacher_attention", (None, *ATTENTIONS)),
        ):
            value = getattr(self, name)
            if value not in choices:
                names = ", ".join(c for c in choices if c)
                raise UsageError(f"{name.replace('_', '-')} must be one of {names}, got {value!r}")
        counts = ("views", "block_size", "max_length", "samples_per_part", "head_rows", "tensor_parallel")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("fidelity", "limit", "row_tokens", "max_teacher_length", "shared_vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.cache_gb is not None and not self.cache_gb > 0:
            raise UsageError(f"cache-gb must be more than 0, got {self.cache_gb:g}")
        if self.backend == "transformers" and (self.tensor_parallel > 1 or self.cache_gb is not None):
            raise UsageError("tensor-parallel and cache-gb are for --backend vllm: add it, or leave them out")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")
        for name in ("holdout", "max_dropped"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(
                    f"{name.replace('_', '-')} must lie between 0 and 1, got {getattr(self, name)}"
                )
        if self.teacher_kind == "ar" and self.compdemo:
            raise UsageError(
                "compdemo shows a teacher half of what is masked, but an autoregressive one (teacher-kind "
                "ar) sees the clean text to its left whatever is masked: leave --compdemo out, or set "
                "--teacher-kind diffusion"
            )
        if self.teacher_kind == "ar" and self.teacher_attention not in (None, "causal"):
            raise UsageError(
                f"teacher-attention {self.teacher_attention} shows a teacher what is to its right, but an "
                "autoregressive one (teacher-kind ar) is causal: leave --teacher-attention out, or set "
                "--teacher-kind diffusion"
            )
        if self.sketch_from is not None and not (isinstance(self.codec, SparseCodec) and self.codec.sketch):
            raise UsageError("sketch-from needs a sparse codec with a sketch: add --sketch R")
        self.worker()

    def worker(self) -> tuple[int, int]:
        """(i, n) of `part`.

        Raises:
            UsageError: not of the form i/n with 0 <= i < n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        i, n = (int(match[1]), int(match[2])) if match else (0, 0)
        if i >= n:
            raise UsageError(f"part must be i/n with 0 <= i < n, such as 0/4, got {self.part!r}")
        return i, n
