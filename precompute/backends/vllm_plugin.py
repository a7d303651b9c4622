"""Tells vLLM which classes are the teachers': the entry point `vllm.general_plugins` of the project, by which
each of its processes calls `register`.

It runs whenever vLLM starts in an environment that has tide, so it imports nothing of it.
"""

from __future__ import annotations

from precompute.backends.vllm_checkpoint import ARCHITECTURES


def register() -> None:
    """Name the classes; vLLM imports the one that a configuration asks for."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"precompute.backends.vllm_models:{name}")
