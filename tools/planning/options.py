"""Options of `tide plan precompute` and `tide plan all`, and the questions they make. Those that `tide
precompute` has too mean the same there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shards.errors import UsageError
from tools.commands.precompute import codec_of
from tools.options import numbers, opt
from tools.planning.devices import Device, device_named
from tools.planning.models import known_folder

if TYPE_CHECKING:
    from tools.planning.question import Question
    from tools.planning.student import StudentQuestion

TEXT, NOISE, TARGETS, DEVICE = "Text", "Noise", "Teacher and targets", "Device"
ASSUMED, STUDENT = "Assumptions", "Student"
NAMES = "LLaDA2.0-mini, WeDLM-8B, Qwen3-0.6B"

Teacher = Annotated[
    str, opt(f"Teacher: model folder (config.json is enough), hub id, or one of {NAMES}.", "DIR|ID|NAME")
]
Student = Annotated[str, opt("Student, likewise; with --corpus both need a tokenizer.", "DIR|ID|NAME")]
Corpus = Annotated[str | None, opt("What tide precompute takes.", "SPEC", TEXT)]
Sample = Annotated[int, opt("Corpus rows to look at.", "N", TEXT)]
Rows = Annotated[
    int | None, opt("Corpus rows in all (default: they are counted; with --lengths, --sample).", "N", TEXT)
]
LengthsOption = Annotated[
    str | None, opt("Instead of a corpus: median tokens of prompt and response, as 74,200.", "N,N", TEXT)
]
Limit = Annotated[int | None, opt("Read only the first N corpus rows (default: all).", "N", TEXT)]
Holdout = Annotated[float, opt("Share of samples kept out of training.", "SHARE", TEXT)]
LossOn = Annotated[str, opt("Tokens that are masked and carry loss.", "last|assistant|all", TEXT)]
StudentLength = Annotated[int, opt("Longest student sample.", "TOKENS", TEXT)]
TeacherLength = Annotated[
    int | None, opt("Longest teacher sample (default: 768 shared, 1024 cross).", "TOKENS", TEXT)
]
Views = Annotated[int, opt("Noisings per sample.", "R", NOISE)]
CompDemo = Annotated[
    bool | None, opt("Both halves of the masked tokens (default: yes; ar: no).", None, NOISE)
]
Timesteps = Annotated[str, opt("Timesteps of a sample's views.", "stratified|iid", NOISE)]
BlockSize = Annotated[int, opt("Tokens per block.", "TOKENS", NOISE)]
Seed = Annotated[int, opt("Decides noise, and the sample.", "S", NOISE)]
KindOption = Annotated[str, opt("Tokenizer pipeline; needed with --lengths.", "auto|shared|cross", TARGETS)]
CodecOption = Annotated[str, opt("How distributions are stored.", "sparse|exact|dense", TARGETS)]
HeadEntries = Annotated[int, opt("Sparse: most tokens kept per position.", "K", TARGETS)]
TailBound = Annotated[float, opt("Sparse: keep fewer once only this mass is left.", "MASS", TARGETS)]
Temperatures = Annotated[str, opt("Sparse: temperatures training may use.", "T,T", TARGETS)]
Sketch = Annotated[int, opt("Sparse: coefficients of the tail's shape (0: none).", "R", TARGETS)]
SharedVocab = Annotated[
    int | None, opt("First N ids are compared (default: those that agree).", "N", TARGETS)
]
TeacherKind = Annotated[str, opt("How the teacher is asked.", "auto|diffusion|ar", TARGETS)]
TeacherAttention = Annotated[str | None, opt("How the teacher attends.", "KIND", TARGETS)]
Dtype = Annotated[str, opt("The teacher's number format.", "float32|bfloat16", TARGETS)]
RowTokens = Annotated[
    int | None, opt("Packed teacher row (default: by device and length).", "TOKENS", TARGETS)
]
Like = Annotated[
    str | None, opt("A dataset made already: its bytes per masked position are taken.", "DIR|URL", TARGETS)
]
DeviceName = Annotated[
    str,
    opt("Device by name, of which the published peak is known; an unknown one lists them.", "NAME", DEVICE),
]
Peak = Annotated[float | None, opt("Its peak, 10^12 FLOP/s (default: the device's).", "N", DEVICE)]
MemoryGib = Annotated[float | None, opt("Its memory (default: the device's).", "GIB", DEVICE)]
Bandwidth = Annotated[
    float | None, opt("Its memory's bandwidth, 10^9 bytes/s (default: the device's).", "N", DEVICE)
]
Gpus = Annotated[int, opt("Of them, sharing the parts.", "N", DEVICE)]
Link = Annotated[
    float | None, opt("Network to push and pull over: adds the hours (default: not asked).", "MBIT/S", DEVICE)
]
Efficiency = Annotated[float, opt("Share of the peak that products reach.", "SHARE", ASSUMED)]
Kept = Annotated[
    float | None, opt("Sparse: entries kept per position (default: as sharp as 9.6 of 64).", "K", ASSUMED)
]
PaddedTo = Annotated[
    int | None, opt("Naive layout: length of every sequence (default: longest).", "TOKENS", ASSUMED)
]
LengthSpread = Annotated[str, opt("Of --lengths: deviations of their logarithms.", "S,S", ASSUMED)]
TeacherShare = Annotated[
    float, opt("Of --lengths, cross: teacher's tokens per token of the student.", "SHARE", ASSUMED)
]
ChunkShare = Annotated[float, opt("Of --lengths, cross: chunks per token.", "SHARE", ASSUMED)]
ContextGb = Annotated[float, opt("CUDA context and workspaces.", "GB", ASSUMED)]
ChunkCopies = Annotated[float, opt("Tensors of a chunk of logits at a time.", "N", ASSUMED)]

COPIED = (
    *("limit", "holdout", "loss_on", "views", "seed", "timesteps", "block_size", "compdemo", "kind", "dtype"),
    *("row_tokens", "shared_vocab_size", "teacher_kind", "teacher_attention"),
)
"""Options that are fields of `PrecomputeConfig`."""


def device_of(given: Mapping[str, Any]) -> Device:
    if given["dtype"] == "float32" and given["peak_tflops"] is None:
        raise UsageError("--dtype float32: the published peaks are those of bfloat16; give --peak-tflops")
    return device_named(
        given["device_name"],
        tflops=given["peak_tflops"],
        gib=given["memory_gib"],
        gb_per_s=given["bandwidth_gbs"],
    )


def question_of(given: Mapping[str, Any], scratch: Path) -> Question:
    """What is asked of stage one, from the options of either command. `scratch`: for configurations of models
    known by name.

    Raises:
        UsageError: an option cannot be what it is (names it).
    """
    from dataclasses import replace

    from precompute.config import PrecomputeConfig
    from precompute.cost import MemoryAssumptions
    from shards.codec import ExactCodec
    from tools.planning.question import Question

    if given["link"] is not None and not given["link"] > 0:
        raise UsageError(f"--link must be positive, got {given['link']:g}")
    names = ("head_entries", "tail_bound", "temperatures", "sketch")
    codec = codec_of(given["codec"], **{name: given[name] for name in names})
    if isinstance(codec, ExactCodec):
        codec = replace(codec, dtype=given["dtype"])
    return Question(
        settings=PrecomputeConfig(
            teacher=known_folder(given["teacher"], scratch),
            student=known_folder(given["student"], scratch),
            corpus=given["corpus"] or "",
            out=scratch,
            codec=codec,
            max_length=given["student_max_length"],
            max_teacher_length=given["teacher_max_length"],
            **{name: given[name] for name in COPIED},
        ),
        device=device_of(given),
        efficiency=given["efficiency"],
        gpus=given["gpus"],
        sample=given["sample"],
        rows=given["rows"],
        lengths=lengths_of(given),
        like=given["like"],
        kept=given["kept"],
        padded_to=given["padded_to"],
        memory=MemoryAssumptions(context_gb=given["context_gb"], chunk_copies=given["chunk_copies"]),
    )


def lengths_of(given: Mapping[str, Any]) -> Any:
    """`precompute.trial.Lengths`, or None without them. Raises: UsageError."""
    from precompute.trial import Lengths

    if given["lengths"] is None:
        return None
    pairs = {flag: numbers(given[flag.replace("-", "_")], flag) for flag in ("lengths", "length-spread")}
    for flag, pair in pairs.items():
        low = 0 if flag == "length-spread" else 1
        if len(pair) != 2 or min(pair) < low:
            raise UsageError(f"--{flag} must be two numbers, prompt,response, of at least {low}, got {pair}")
    for flag in ("teacher_share", "chunk_share"):
        if not given[flag] > 0:
            raise UsageError(f"--{flag.replace('_', '-')} must be positive, got {given[flag]:g}")
    (prompt, response), (prompt_spread, response_spread) = pairs.values()
    return Lengths(
        prompt=prompt,
        response=response,
        prompt_spread=prompt_spread,
        response_spread=response_spread,
        teacher_share=given["teacher_share"],
        chunk_share=min(1.0, given["chunk_share"]),
    )


def student_question_of(given: Mapping[str, Any]) -> StudentQuestion:
    """What is asked of stage two, from the options of `tide plan all`.

    Raises:
        UsageError: an option cannot be what it is (names it).
    """
    from student.memory import Assumptions, Plan
    from tools.planning.student import StudentQuestion

    same = given["student_device"] is None
    device = device_of(given) if same else device_named(given["student_device"])
    share = given["student_efficiency"]
    return StudentQuestion(
        device=device,
        efficiency=given["efficiency"] if share is None else share,
        epochs=given["epochs"],
        plan=Plan(
            batch_tokens=given["batch_tokens"], world=given["student_gpus"], optimizer=given["optimizer"]
        ),
        vram=given["vram"],
        memory=Assumptions(context_gb=given["context_gb"]),
    )
