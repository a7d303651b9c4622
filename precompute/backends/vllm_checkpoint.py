"""A teacher's folder as vLLM reads it: the library's configuration, and the published tensors under the
library's names.

vLLM follows transformers in both, so that what `precompute.teachers` knows of each family serves here too.
Its models take experts one by one, as LLaDA2 publishes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from precompute.teachers import dense, llada2
from precompute.teachers.checkpoint import Entry, check_names, tensor_files
from precompute.teachers.families import family_of
from precompute.teachers.load import read_config
from student.layout import Attention

SECTION = "tide_engine"
"""Key of the written configuration that tells the model's classes how to attend."""
ARCHITECTURES = {"qwen2": "TideQwen2", "qwen3": "TideQwen3", "llama": "TideLlama", "llada2": "TideLLaDA2"}
"""Structure -> name of the class of `precompute.backends.vllm_models`."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder's weights are."""

    folder: Path
    structure: str
    config: Any
    """The library's configuration."""
    entries: Sequence[Entry]
    tied: Mapping[str, str]
    """Published head -> published embeddings, where they are one."""

    @property
    def head_size(self) -> int:
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def cache_bytes(self) -> int:
        """Of keys and values of a token, for each byte of the number format."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.head_size

    def engine_config(self, attention: Attention, block_size: int, longest: int) -> dict[str, Any]:
        """config.json for vLLM. Which tokens see which is decided there as here: windows are for long texts.

        Args:
            longest: tokens of a request.
        """
        windows = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
        settings = self.config.to_dict() | windows
        if isinstance(kinds := getattr(self.config, "layer_types", None), list):
            settings["layer_types"] = ["full_attention"] * len(kinds)
        return settings | {
            "architectures": [ARCHITECTURES[self.structure]],
            "max_position_embeddings": max(longest, self.config.max_position_embeddings),
            "is_causal": attention != "bidirectional",
            SECTION: {"attention": attention, "block_size": block_size},
        }

    def named(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Published tensors under the names of vLLM's classes; spare ones are left out, and a tied head is
        a tensor of its own."""
        takes = {name: entry for entry in self.entries for name in entry.theirs}
        heads = set(self.tied.values())
        for name, tensor in tensors:
            if name not in takes:
                continue
            entry = takes[name]
            if entry.parts:
                yield name, tensor
                continue
            yield from zip(entry.ours, entry.to_ours([tensor]), strict=True)
            if name in heads:
                yield dense.HEAD, tensor

    def head(self) -> Tensor:
        """[V, H]: the weight of the LM head, as it is stored."""
        published = {ours: e.theirs[0] for e in self.entries for ours in e.ours}
        name = published.get(dense.HEAD) or next(iter(self.tied.values()))
        with safe_open(tensor_files(self.folder)[name], framework="pt") as f:
            return f.get_tensor(name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a teacher's folder holds, its weights' names checked.

    Raises:
        ModelError: not a teacher's configuration; tensors are missing or left over.
    """
    published = read_config(folder)
    name = str(folder / "config.json")
    family = family_of(published, name)
    if family.structure == "llada2":
        config: Any = llada2.glm_config(published, name)
        entries, tied = llada2.weight_map(config), llada2.TIED
    else:
        config = dense.dense_config(published, family, name)
        entries, tied = dense.weight_map(config, family), dense.tied_names(family)
    tied = tied if config.tie_word_embeddings else {}
    check_names(folder, entries, tied, family.structure)
    return Checkpoint(folder, family.structure, config, entries, tied)
