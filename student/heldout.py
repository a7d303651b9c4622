"""Held-out likelihood while training: the same samples and masks every time, so that values compare."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from shards.errors import UsageError
from shards.reader import LogitDataset
from student.evaluate import EvalResult, evaluate

SEED = 0
"""Of the masks: `tide eval`'s default, whose figures over all samples these approach."""


class HeldOut:
    """Likelihood (`student.evaluate`) of the first held-out samples of a dataset under a network."""

    def __init__(self, dataset: LogitDataset, limit: int) -> None:
        """
        Raises:
            UsageError: the dataset holds no held-out samples.
        """
        self.samples = list(islice(dataset.samples("heldout"), limit))
        self.manifest = dataset.manifest
        if not self.samples:
            raise UsageError(
                f"{dataset.path} holds no held-out samples to evaluate on: leave eval_every out, or "
                "precompute with --holdout above 0"
            )

    def __call__(self, model: Any, progress: Callable[[int], None] | None = None) -> EvalResult:
        """`progress`: called with the number of samples done so far."""
        return evaluate(
            model,
            self.samples,
            mask_token_id=self.manifest.student.mask_token_id,
            block_size=self.manifest.block_size,
            seed=SEED,
            progress=progress,
        )
