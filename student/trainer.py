"""Train a student on a logit dataset: what `tide train` does, from checks to the finished model folder.

The run's folder holds the student (`config.json`, `model.safetensors`, tokenizer), `train_config.json`,
`metrics.jsonl` and `checkpoint-N/`; `samples.jsonl` where texts are written, `best/` where the best
evaluation is kept, and `adapter/` where LoRA was trained: the student beside it has it merged in. An
interrupted run resumes at its newest complete checkpoint and ends, on the same machine, with the weights and
records it would have had without the interruption.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from shards.codec import SparseCodec
from shards.errors import ConfigMismatch, TideError, UsageError
from shards.reader import LogitDataset
from student.adapters import load_for_training, save_merged
from student.checkpoint import RunState, check_same_run, checkpoints, load_state, run_identity
from student.config import CONFIG_FILE, METRICS, SAMPLES, TrainConfig, check_libraries
from student.evaluate import EvalResult
from student.fresh import share_for
from student.heldout import HeldOut
from student.loader import DatasetRows, RowSource, global_batches
from student.loop import ADAPTER, Progress, TideTrainer
from student.model import load_student, without_progress_bar
from student.objective import Objective, check_dataset
from student.samples import WriteSamples, held_out_prompts
from student.tables import dataset_table
from student.tokenizer import tokenizer_hash

__all__ = ["TideTrainer", "TrainConfig", "TrainSummary", "check_student", "train"]

logger = logging.getLogger(__name__)

Judge = Callable[[Any, Callable[[int], None]], EvalResult]
"""Likelihood of held-out samples under a network; told how many are done."""
SAMPLED = 4096
"""Rows that the number of batches in an epoch is judged from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """How a run, or this part of it, ended."""

    out: Path
    """Folder of the student, if finished, and of the checkpoints."""
    step: int
    steps: int
    last: dict[str, float]
    """The last logged record: loss, terms, rates."""
    tokens: int
    """Packed tokens trained on in this part of the run."""
    seconds: float
    checkpoint: Path | None
    """Newest complete checkpoint."""

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def train(
    dataset_path: str | Path,
    student_path: str | Path,
    out: str | Path,
    config: TrainConfig,
    objective: Objective,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    through: Callable[[RowSource], RowSource] | None = None,
    held_out: Judge | None = None,
) -> TrainSummary:
    """Train the student of `student_path` on a dataset and write it to `out`.

    SIGINT or SIGTERM ends the run after the current step with a checkpoint, reported in the summary
    (`finished` is False); a second one stops at once.

    Args:
        resume: go on from the newest complete checkpoint in `out`; without one, start.
        progress: called with (steps done, steps in all, what is going on).
        through: changes the rows on their way from the dataset to the batches.
        held_out: what `eval_every` asks; None = the dataset's held-out samples.

    Raises:
        ConfigMismatch: dataset, student and checkpoint do not belong together.
        UsageError: the dataset cannot feed the objective, a library or GPU that a setting needs is missing,
            or `out` holds a run and `resume` is False.
        ModelError: the student cannot be loaded.
        TideError: the loss or the gradient is not finite; nothing of that step is kept.
    """
    out = Path(out).expanduser()
    check_libraries(config)
    config = config.resolved()
    found = checkpoints(out)
    if found and not resume:
        raise UsageError(
            f"{out} holds a run at step {found[-1][0]}: pass --resume to go on, or another --out"
        )
    tell = progress or (lambda done, steps, what: None)
    tell(0, config.steps, "opening the dataset")
    dataset = LogitDataset(dataset_path)
    temperatures = _temperatures(dataset)
    check_dataset(objective, dataset.manifest.kind, temperatures)
    fresh = config.fresh_noise
    repeated = fresh is None and config.steps > steps_of(
        dataset, dataset.manifest.noise.views, config.batch_tokens
    )
    config = replace(config, fresh_noise=share_for(objective, fresh, repeated=repeated))
    check_evaluations(config)
    if config.eval_every is not None and held_out is None:
        held_out = HeldOut(dataset, config.eval_samples)
    name = f"{dataset.manifest.identity[:12]} of {dataset.count('train')} training samples"
    run = run_identity(name, objective, config)
    start, folder = None, found[-1][1] if found else None
    if folder is not None:
        start = load_state(folder)
        check_same_run(start.run, run, out)
    block_size = dataset.manifest.block_size
    tell(start.step if start else 0, config.steps, "loading the student")
    model, tokenizer = load_for_training(student_path, config.adapter, config.seed)
    check_student(dataset.manifest, model, tokenizer, student_path)
    if start is not None and folder is not None and start.step >= config.steps:
        return _finish_again(out, folder, config, student_path, block_size)
    model.config.block_size = block_size
    prompts = []
    if config.sample_every is not None:
        room = model.config.max_position_embeddings
        prompts = held_out_prompts(
            dataset, tokenizer, count=config.samples, tokens=config.sample_tokens, positions=room
        )

    rows = DatasetRows(dataset, config.seed)
    with StopOnSignal() as stop:
        trainer = TideTrainer(
            model,
            tokenizer,
            objective,
            config,
            rows if through is None else through(rows),
            out,
            block_size=block_size,
            mask_token_id=dataset.manifest.student.mask_token_id,
            shared_vocab_size=dataset.manifest.shared_vocab_size,
            temperatures=temperatures or (),
            table=dataset_table(dataset) if "positions" in objective.requirements() else None,
            student_path=student_path,
            held_out=held_out,
            check=dataset.check,
            run=run,
            start=start,
            progress=progress,
            should_stop=lambda: stop.asked,
        )
        if prompts:
            trainer.add_callback(WriteSamples(trainer, prompts))
        if trainer.is_world_process_zero():
            _prepare_folder(out, run, config, start)
        began = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        except KeyboardInterrupt:
            raise TideError(f"stopped at once; {_how_to_go_on(out)}") from None
        step = trainer.state.global_step
        if step >= config.steps:
            trainer.tell("saving the student")
            trainer.save_student(out)
        else:
            logger.warning("stopped at step %d of %d; %s", step, config.steps, _how_to_go_on(out))
    kept = checkpoints(out)
    return TrainSummary(
        out=out,
        step=step,
        steps=config.steps,
        last=trainer.last,
        tokens=trainer.tokens,
        seconds=time.perf_counter() - began,
        checkpoint=kept[-1][1] if kept else None,
    )


def steps_of(dataset: LogitDataset, epochs: float, batch_tokens: int, seed: int = 0) -> int:
    """Optimiser steps that go over the training samples `epochs` times, from how the first rows are cut into
    batches; exact where the dataset has no more than `SAMPLED` and views are equally long.

    Raises:
        UsageError: `epochs` is not positive. ShardError: see `LogitDataset.stream`.
    """
    if not epochs > 0:
        raise UsageError(f"epochs must be positive, got {epochs}")
    samples = dataset.count("train")
    rows = islice(dataset.stream(seed), min(samples, SAMPLED))
    cut = global_batches(rows, batch_tokens=batch_tokens, block_size=dataset.manifest.block_size)
    sizes = [len(batch) for batch, _ in cut]
    return max(1, math.ceil(epochs * samples * len(sizes) / sum(sizes)))


def check_student(manifest: Any, model: Any, tokenizer: Any, path: str | Path) -> None:
    """Refuse a student that does not fit the dataset.

    Raises:
        ConfigMismatch: another tokenizer, fewer ids, other blocks, or fewer positions than the dataset's
            samples need.
    """
    student = manifest.student
    hashed = tokenizer_hash(tokenizer)
    if hashed != student.tokenizer_hash:
        raise ConfigMismatch(
            f"{path}: tokenizer {hashed[:12]} is not the one the dataset was made with "
            f"({student.tokenizer_hash[:12]}); use that student's folder, or precompute again with this one"
        )
    size = model.config.vocab_size
    if size < student.vocab_size:
        raise ConfigMismatch(
            f"{path}: the student has {size} ids, the dataset stores ids below {student.vocab_size}; use the "
            "student the dataset was made for"
        )
    trained = getattr(model.config, "block_size", None)
    if trained is not None and trained != manifest.block_size:
        raise ConfigMismatch(
            f"{path}: the student was trained with blocks of {trained} (block_size in its config.json), the "
            f"dataset has blocks of {manifest.block_size}; precompute with --block-size {trained}, or remove "
            "block_size there to change over"
        )
    blocks = -(-student.max_length // manifest.block_size)
    longest, room = blocks * manifest.block_size, model.config.max_position_embeddings
    if longest > room:
        raise ConfigMismatch(
            f"{path}: the student has {room} positions, the dataset's longest sample needs {longest}; use a "
            "student with more (max_position_embeddings) or a dataset of shorter samples"
        )


class StopOnSignal:
    """While open, the first SIGINT or SIGTERM only sets `asked`; the second acts as it did before."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        logger.warning("%s: finishing this step and saving a checkpoint", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()


def check_evaluations(config: TrainConfig) -> None:
    """
    Raises:
        UsageError: weights are sharded over GPUs, and evaluations and samples run the network whole.
    """
    for wanted, instead in (("eval_every", "tide eval"), ("sample_every", "tide generate")):
        for name in ("fsdp", "deepspeed"):
            if getattr(config, wanted) is not None and config.trainer_args.get(name):
                raise UsageError(
                    f"{wanted} does not go with {name}: leave it out and run {instead} afterwards"
                )


def _finish_again(
    out: Path, folder: Path, config: TrainConfig, student_path: str | Path, block_size: int
) -> TrainSummary:
    """A run whose last step is saved already: only the model folder may be missing or cut short."""
    if config.adapter is None:
        model, tokenizer = load_student(folder)
        with without_progress_bar():
            model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        (out / ADAPTER).mkdir(exist_ok=True)
        for file in folder.glob("adapter_*"):
            shutil.copy2(file, out / ADAPTER / file.name)
        save_merged(student_path, folder, out, block_size=block_size)
    logger.info("%s: already trained for %d steps", out, config.steps)
    lines = (out / METRICS).read_text().splitlines() if (out / METRICS).is_file() else []
    logged = [json.loads(line) for line in lines if math.isfinite(_step_of(line))]
    last: dict[str, float] = next((record for record in reversed(logged) if "loss" in record), {})
    return TrainSummary(
        out=out,
        step=config.steps,
        steps=config.steps,
        last={name: value for name, value in last.items() if name != "step"},
        tokens=0,
        seconds=0.0,
        checkpoint=folder,
    )


def _temperatures(dataset: LogitDataset) -> tuple[float, ...] | None:
    codec = dataset.manifest.codec
    return codec.temperatures if isinstance(codec, SparseCodec) else None


def _prepare_folder(out: Path, run: dict[str, Any], config: TrainConfig, start: RunState | None) -> None:
    """Write the settings; cut the run's records back to the step that training goes on from."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {**run, "config": asdict(replace(config, trainer_args=dict(config.trainer_args)))}
    (out / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n")
    for file in (out / METRICS, out / SAMPLES):
        if not file.is_file():
            continue
        lines = file.read_text(encoding="utf-8").split("\n")  # a sample may hold other ends of lines
        kept = [line for line in lines if start is not None and _step_of(line) <= start.step]
        file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """Step of a record's line; a line that a kill cut short belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _how_to_go_on(out: Path) -> str:
    kept = checkpoints(out)
    if not kept:
        return "no checkpoint was saved; start again"
    return f"checkpoint of step {kept[-1][0]} kept in {kept[-1][1]}; go on with the same command and --resume"
