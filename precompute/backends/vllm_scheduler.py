"""Every step of a request is one block: what makes its attention block-causal.

vLLM cuts a long prompt into steps of `long_prefill_token_threshold` tokens, and each step sees all that came
before and itself. Blocks must therefore never be cut, nor run together. Nothing cuts them where as many
blocks fit a step as there are requests; but the threshold is dropped while one request is alone.
"""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler


class BlockScheduler(Scheduler):
    """vLLM's scheduler, for which no request is ever alone."""

    def get_request_counts(self) -> tuple[int, int]:
        """Running and waiting; a lone request counts as two."""
        running, waiting = super().get_request_counts()
        return (running + 1, waiting) if running + waiting == 1 else (running, waiting)
