"""The training loop: transformers' Trainer with our loss, our data order and our record of where it stands.

Everything else (mixed precision, DDP, FSDP, DeepSpeed, optimisers, reporting, hub push) is the library's.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from shards.errors import TideError
from shards.row import Row
from student.adapters import plain, save_merged
from student.batch import collate
from student.callbacks import EachStep
from student.checkpoint import RunState, prune, save_state
from student.config import METRICS, TrainConfig, training_arguments
from student.evaluate import EvalResult
from student.forward import mask_argument
from student.fresh import FreshNoise
from student.fused import FusedLoss
from student.loader import BatchStream, RowSource
from student.model import without_progress_bar
from student.objective import REGISTRY, Objective
from student.tensors import Basis, Batch, TeacherHead, to_device, with_table

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""

ADAPTER, BEST = "adapter", "best"
"""Folders inside a run's: the trained adapter, the student of the best evaluation."""
NO_TERMS = ("grad_norm", "learning_rate", "tokens", "views", "tokens_per_s", "data_wait")
"""Entries of a record that are no part of the objective."""
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
        table: Basis | TeacherHead | None = None,
        student_path: str | Path = "",
        held_out: Callable[[Any, Callable[[int], None]], EvalResult] | None = None,
        check: Callable[[Row], None] | None = None,
        run: dict[str, Any] | None = None,
        start: RunState | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            source: endless row stream, opened at a state.
            table: what the dataset's targets need besides their rows (`student.tables`).
            student_path: what `model` was loaded from; an adapter is merged into it.
            held_out: likelihood of held-out samples under a network, called with the network and a report of
                samples done; needed by `eval_every`.
            check: see `student.loader.BatchStream`.
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
        if config.gradient_checkpointing:
            with warnings.catch_warnings():  # the name is on its way out, its successor is not everywhere yet
                warnings.simplefilter("ignore", FutureWarning)
                plain(model).gradient_checkpointing_enable({"use_reentrant": False})
            # A layer that runs twice gains nothing from bfloat16 copies of all weights kept through the step.
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.remove_callback(PrinterCallback)
        self.add_callback(EachStep(self))
        self.objective, self.config, self.out = objective, config, out
        self.loss_head = FusedLoss(objective)
        self.table = table
        self.block_size, self.student_path, self.held_out = block_size, student_path, held_out
        self.run = run or {}
        self.best: dict[str, float] = dict(start.best) if start else {}
        self.rows: tuple[str, ...] = ()
        self.progress, self.should_stop = progress, should_stop
        self.window: Counter[str] = Counter(start.window if start else {})
        self.losses: list[tuple[str, Tensor]] = []
        self.stream: dict[str, Any] = dict(start.stream) if start else {}
        self.last: dict[str, float] = {}
        self.saved: Path | None = out / f"checkpoint-{start.step}" if start else None
        self.first_step = start.step if start else 0
        self.tokens = 0
        self.waited = 0.0
        self.clock = self.began = time.perf_counter()
        flex = model.config._attn_implementation == "flex_attention"
        self.batches = BatchStream(
            FreshNoise(source, config.fresh_noise, config.seed) if config.fresh_noise else source,
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
            check=check,
            start=start.stream if start else None,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.config.eight_bit_embedding and "bnb" in self.config.optimizer:
            optimizer.mng.initialize()  # forgets what the library has just registered: 32 bits for embeddings
        return optimizer

    # data

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return self.batches.loader(self.config.workers)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int]:
        """The micro-batches of a step; a count tells the library that the loss is normalised already."""
        if self.first_step and self.state.global_step == self.first_step:
            # Dropout goes on where it was; the library restores generators only where it skips data itself.
            self._load_rng_state(str(self.saved))
        asked = time.perf_counter()
        parts = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        self.waited += time.perf_counter() - asked
        if len(parts) < num_batches:
            raise ValueError("the row stream ended; it must be endless")
        counts = parts[0].counts
        self.rows = tuple(row for part in parts for row in part.rows)
        self.stream = parts[-1].state
        self.tokens += counts.tokens
        self.window.update(
            tokens=counts.tokens, views=counts.views, empty_batches=int(not counts.masked), steps=1
        )
        return parts, counts.masked

    def _prepare_inputs(self, inputs: Any) -> Any:
        batch: Batch = to_device(inputs, self.args.device)
        at = batch.positions
        if at is None or self.table is None:
            return batch
        return replace(batch, positions=replace(at, target=with_table(at.target, self.table)))

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
        loss = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            read=batch.read,
            loss_head=self.loss_head.about(batch, self.state.global_step / self.config.steps),
            use_cache=False,
            **mask_argument("staircase", batch.at, self.model),
        )
        if not torch.isfinite(loss.total):
            self._refuse(batch, loss.terms)
        self.losses.append(("loss", loss.total.detach()))
        self.losses.extend(loss.terms.items())
        total = loss.total * self.accelerator.num_processes
        return (total, loss) if return_outputs else total

    def _refuse(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        shown = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
        raise self._not_finite(f"the loss is not finite ({shown})", batch.rows)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm before clipping, with which the library calls the step's last check.

        Raises:
            TideError: it is not finite (names step and rows).
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._not_finite(f"the gradient norm is {float(norm):g}", self.rows)
        return norm

    def _not_finite(self, what: str, rows: tuple[str, ...]) -> TideError:
        named = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        kept = f"the last checkpoint is {self.saved}" if self.saved else "no checkpoint was saved yet"
        return TideError(
            f"step {self.state.global_step + 1}: {what} on rows {named}; stopped before the optimiser step, "
            f"{kept}; lower the learning rate, or look at these rows (sample id/view) in the dataset"
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
        seconds = max(now - self.clock, 1e-9)
        record["tokens_per_s"] = counted["tokens"] / seconds
        record["data_wait"] = min(1.0, self.waited / seconds)  # share of the time, on this rank
        self.window, self.clock, self.waited, self.last = Counter(), now, 0.0, record
        super().log(dict(record), start_time)
        self._write({"step": step, **record})
        if self.is_world_process_zero():
            logger.info(self._line(step, record))

    def _write(self, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            with (self.out / METRICS).open("a") as f:
                f.write(json.dumps(record) + "\n")

    def tell(self, what: str) -> None:
        """Say what is going on, to whoever shows progress."""
        if self.progress is not None:
            self.progress(self.state.global_step, self.config.steps, what)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Time spent inside counts in no rate."""
        before = time.perf_counter()
        yield
        spent = time.perf_counter() - before
        self.clock, self.began = self.clock + spent, self.began + spent

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out bits per byte now, on every rank; written before the step's checkpoint, so that a resumed
        run writes the same lines. The student is kept if it is the best so far and that is wanted."""
        with self.off_the_clock():
            return self._judge()

    def _judge(self) -> dict[str, float]:
        assert self.held_out is not None  # the trainer asks for no evaluation without one
        network = plain(self.accelerator.unwrap_model(self.model))
        with self.accelerator.autocast():
            found = self.held_out(network, lambda done: self.tell(f"evaluating, {done} samples"))
        step, value = self.state.global_step, found.bits_per_byte
        if not self.best or value < self.best["bits_per_byte"]:
            self.best = {"step": step, "bits_per_byte": value}
            if self.config.keep_best:
                self._keep_best()
        super().log({"eval_bits_per_byte": value})  # to `report_to`
        by_t = {f"{t:g}": bits for t, bits in found.by_t.items()}
        self._write({"step": step, "heldout_bits_per_byte": value, "by_t": by_t})
        logger.info(
            "step %d/%d  held-out %.4f bits per byte  best %.4f at step %d",
            *(step, self.config.steps, value, self.best["bits_per_byte"], int(self.best["step"])),
        )
        metrics = {"eval_bits_per_byte": value}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_best(self) -> None:
        """Replace `best`; a kill leaves the old one or the new one, or is put right by the resumed run."""
        part = self.out / f"{BEST}.part"
        self.save_student(part)
        if self.args.should_save:
            shutil.rmtree(self.out / BEST, ignore_errors=True)
            part.rename(self.out / BEST)

    def save_student(self, folder: Path) -> None:
        """Write the student as a plain model folder, a trained adapter in `adapter` inside it. For all ranks
        to call."""
        adapter = self.config.adapter is not None
        weights = folder / ADAPTER if adapter else folder
        self.save_model(str(weights))
        if self.args.should_save:
            (weights / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to anyone
            if adapter:
                save_merged(self.student_path, weights, folder, block_size=self.block_size)

    def _line(self, step: int, record: dict[str, float]) -> str:
        done = max(1, step - self.first_step)
        left = (time.perf_counter() - self.began) / done * (self.config.steps - step)
        names = [n for n in record if n not in NO_TERMS]
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
                folder,
                RunState(
                    step=step, stream=self.stream, window=dict(self.window), best=self.best, run=self.run
                ),
            )
            prune(self.out, self.config.keep)
            self.saved = folder
