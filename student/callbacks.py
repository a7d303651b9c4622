"""What happens at a step's end: progress, the last line, evaluations, stopping when asked to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from student.loop import TideTrainer


class EachStep(TrainerCallback):
    """Progress, the last line, evaluations, and stopping when asked to."""

    def __init__(self, trainer: TideTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock = self.trainer.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        last = state.global_step >= trainer.config.steps
        if last:
            control.should_log = True
        if due(state.global_step, trainer.config.eval_every, last=last):
            control.should_evaluate = True
        if self._stop_asked():
            control.should_save = control.should_training_stop = True
        trainer.tell(f"loss {trainer.last['loss']:.4g}" if trainer.last else "training")

    def _stop_asked(self) -> bool:
        """Ranks must agree, or those that go on would wait for the others for ever."""
        asked, accelerator = self.trainer.should_stop(), self.trainer.accelerator
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(int(asked), device=accelerator.device)).item())


def due(step: int, every: int | None, *, last: bool) -> bool:
    """Whether something that is done every so many steps, and after the last, is to be done now."""
    return every is not None and (last or step % every == 0)
