"""Held-out likelihood while training: the same samples and masks every time, so that values compare."""

from __future__ import annotations

from itertools import islice
from typing import Any

from shards.errors import UsageError
from shards.reader import LogitDataset
from student.evaluate import evaluate

SEED = 0
"""Of the masks: `tide eval`'s default, whose figures over all samples these approach."""


class HeldOut:
    """Bits per byte (`student.evaluate`) of a network on the first held-out samples of a dataset."""

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

    def __call__(self, model: Any) -> float:
        result = evaluate(
            model,
            self.samples,
            mask_token_id=self.manifest.student.mask_token_id,
            block_size=self.manifest.block_size,
            seed=SEED,
        )
        return result.bits_per_byte
