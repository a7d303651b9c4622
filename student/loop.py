"""The training loop: transformers' Trainer with our loss, our data order and our record of where it stands.

Everything else (mixed precision, DDP, FSDP, DeepSpeed, optimisers, reporting, hub push) is the library's.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from shards.errors import TideError
from student.attention import attention_mask
from student.batch import collate
from student.checkpoint import RunState, prune, save_state
from student.config import TrainConfig, training_arguments
from student.loader import BatchStream, RowSource
from student.model import without_progress_bar
from student.objective import REGISTRY, Objective
from student.tensors import Batch, to_device

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""

METRICS = "metrics.jsonl"
FLEX_TILE = 128
"""FlexAttention's masks come in tiles of this many tokens; whole tiles mean fewer shapes to compile."""


class TideTrainer(Trainer):
    """Trains a student on batches of a logit dataset.

    The loss of a micro-batch is its share of the global batch's loss (`Batch.counts`): shares are summed,
    never averaged, over micro-batches and ranks.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objective: Objective,
        config: TrainConfig,
        source: RowSource,
        out: Path,
        *,
        block_size: int,
        mask_token_id: int,
        shared_vocab_size: int | None = None,
        temperatures: tuple[float, ...] = (),
        run: dict[str, Any] | None = None,
        start: RunState | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            source: endless row stream, opened at a state.
            run: what the run is, kept in every checkpoint (`student.checkpoint.run_identity`).
            start: the checkpoint state to go on from; `train` then needs the same checkpoint's folder.
            should_stop: asked after every step; True saves a checkpoint and ends training.
        """
        config = config.resolved()
        args = training_arguments(config, out)
        if args.n_gpu > 1:
            args._n_gpu = 1  # one process per GPU (torchrun); DataParallel cannot split packed batches
        use_cache = model.config.use_cache
        super().__init__(model=model, args=args, processing_class=tokenizer, train_dataset=None)
        model.config.use_cache = use_cache  # the library turns it off in the saved config too
        self.remove_callback(PrinterCallback)
        self.add_callback(_EachStep(self))
        self.objective, self.config, self.out = objective, config, out
        self.run = run or {}
        self.progress, self.should_stop = progress, should_stop
        self.window: Counter[str] = Counter(start.window if start else {})
        self.losses: list[tuple[str, Tensor]] = []
        self.stream: dict[str, Any] = dict(start.stream) if start else {}
        self.last: dict[str, float] = {}
        self.saved: Path | None = out / f"checkpoint-{start.step}" if start else None
        self.first_step = start.step if start else 0
        self.tokens = 0
        self.clock = self.began = time.perf_counter()
        flex = model.config._attn_implementation == "flex_attention"
        self.batches = BatchStream(
            source,
            functools.partial(
                collate,
                block_size=block_size,
                mask_token_id=mask_token_id,
                row_tokens=config.row_tokens or 0,
                shared_vocab_size=shared_vocab_size,
                temperatures=temperatures,
                width_multiple=FLEX_TILE if flex else 1,
            ),
            batch_tokens=config.batch_tokens,
            block_size=block_size,
            rank=args.process_index,
            world=args.world_size,
            accumulation=config.accumulation,
            max_positions=model.config.max_position_embeddings,
            start=start.stream if start else None,
        )

    # data

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return self.batches.loader()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int]:
        """The micro-batches of a step; a count tells the library that the loss is normalised already."""
        parts = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        if len(parts) < num_batches:
            raise ValueError("the row stream ended; it must be endless")
        counts = parts[0].counts
        self.stream = parts[-1].state
        self.tokens += counts.tokens
        self.window.update(
            tokens=counts.tokens, views=counts.views, empty_batches=int(not counts.masked), steps=1
        )
        return parts, counts.masked

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the library's estimate knows no packed batches; tokens are counted instead

    # loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the global loss, times the ranks, whose gradients get averaged.

        Raises:
            TideError: the loss is not finite (names step, terms and rows).
        """
        batch: Batch = inputs
        mask = attention_mask("staircase", batch.at, self.model)
        out = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=mask,
            read=batch.read,
            use_cache=False,
        )
        loss = self.objective(out.logits, batch, self.state.global_step / self.config.steps)
        if not torch.isfinite(loss.total):
            self._refuse(batch, loss.terms)
        self.losses.append(("loss", loss.total.detach()))
        self.losses.extend(loss.terms.items())
        total = loss.total * self.accelerator.num_processes
        return (total, out) if return_outputs else total

    def _refuse(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        shown = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
        rows = ", ".join(batch.rows[:8]) + (f" and {len(batch.rows) - 8} more" if len(batch.rows) > 8 else "")
        kept = f"the last checkpoint is {self.saved}" if self.saved else "no checkpoint was saved yet"
        raise TideError(
            f"step {self.state.global_step + 1}: the loss is not finite ({shown}) on rows {rows}; stopped "
            f"before the optimiser step, {kept}; lower the learning rate, or look at these rows "
            "(sample id/view) in the dataset"
        )

    # records

    def collect(self) -> None:
        """Move what accumulated on the device into `window`, summed over ranks; all ranks must call it."""
        sums: dict[str, Tensor] = {}
        for name, value in self.losses:
            sums[name] = sums[name] + value if name in sums else value
        self.losses = []
        if sums:
            stacked = self.accelerator.reduce(
                torch.stack([v.double() for v in sums.values()]), reduction="sum"
            )
            for name, value in zip(sums, stacked.tolist()):
                self.window[name] += value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the steps since the last line, to console, metrics.jsonl and `report_to`."""
        if "loss" not in logs:  # the library's closing summary, which does not know our sums
            super().log(logs, start_time)
            return
        self.collect()
        step, window = self.state.global_step, self.window
        steps = max(1, window.pop("steps", 1))
        now = time.perf_counter()
        record = {"loss": window.pop("loss", math.nan) / steps}
        counted = {name: int(window.pop(name, 0)) for name in ("tokens", "views", "empty_batches")}
        record |= {name: value / steps for name, value in window.items()}
        if any(getattr(REGISTRY[term.name], "interpolated", False) for term in self.objective.terms):
            record["lambda"] = self.objective.schedule.train((step - 1) / self.config.steps)
        record |= {k: v for k, v in logs.items() if k in ("grad_norm", "learning_rate")}
        record |= counted
        record["tokens_per_s"] = counted["tokens"] / max(now - self.clock, 1e-9)
        self.window, self.clock, self.last = Counter(), now, record
        super().log(dict(record), start_time)
        if self.is_world_process_zero():
            with (self.out / METRICS).open("a") as f:
                f.write(json.dumps({"step": step, **record}) + "\n")
            logger.info(self._line(step, record))

    def _line(self, step: int, record: dict[str, float]) -> str:
        done = max(1, step - self.first_step)
        left = (time.perf_counter() - self.began) / done * (self.config.steps - step)
        names = [
            n for n in record if n not in ("grad_norm", "learning_rate", "tokens", "views", "tokens_per_s")
        ]
        terms = "  ".join(f"{n} {record[n]:.4g}" for n in names if n != "empty_batches" or record[n])
        return (
            f"step {step}/{self.config.steps}  {terms}  lr {record.get('learning_rate', 0.0):.2e}  "
            f"{record['tokens_per_s']:,.0f} tok/s  ETA {int(left) // 60}m{int(left) % 60:02d}s"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with without_progress_bar():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.collect()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            step = self.state.global_step
            folder = self.out / f"checkpoint-{step}"
            save_state(
                folder, RunState(step=step, stream=self.stream, window=dict(self.window), run=self.run)
            )
            prune(self.out, self.config.keep)
            self.saved = folder


class _EachStep(TrainerCallback):
    """Progress, the last line, and stopping when asked to."""

    def __init__(self, trainer: TideTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock = self.trainer.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.global_step >= trainer.config.steps:
            control.should_log = True
        if self._stop_asked():
            control.should_save = control.should_training_stop = True
        if trainer.progress is not None:
            shown = f"loss {trainer.last['loss']:.4g}" if trainer.last else "training"
            trainer.progress(state.global_step, trainer.config.steps, shown)

    def _stop_asked(self) -> bool:
        """Ranks must agree, or those that go on would wait for the others for ever."""
        asked, accelerator = self.trainer.should_stop(), self.trainer.accelerator
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(int(asked), device=accelerator.device)).item())
