"""Which batches may be begun before the present one has ended, in asynchronous training."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_lwpm.pipeline.asynchronous.continuous import Work
from lightning_lwpm.pipeline.asynchronous.registry import DEFAULT
from lightning_lwpm.training.private import saves_every

__all__ = ["Admission", "Rules"]


@dataclass(frozen=True)
class Rules:
    """What the user asked for.

    Args:
        staleness_correction: What is done about late gradients.
        max_staleness: The most steps that a gradient may be late; ``None`` for any.
        exact_warmup_steps: So many first steps are exact.
        exact_final_steps: So many last steps are exact.
        drain_every_n_steps: The pipeline drains after so many steps; 0 for never.
    """

    staleness_correction: str = DEFAULT
    max_staleness: int | None = None
    exact_warmup_steps: int = 0
    exact_final_steps: int = 0
    drain_every_n_steps: int = 0


class Admission:
    """Decides by the rules and by what Lightning's loop is going to do; alike on all ranks.

    Args:
        trainer: Runs the loop.
        rules: What the user asked for.
        reach: How many micro-batches of later batches may be begun.
    """

    def __init__(self, trainer: Trainer, rules: Rules, reach: int) -> None:
        self.trainer, self.rules = trainer, rules
        self.reach = reach if rules.max_staleness != 0 else 0

    def admitted(self, present: Work, following: Callable[[int], Work | None]) -> list[Work]:
        """The present batch, and those after it that may be begun.

        Args:
            present: The batch.
            following: Makes the one that comes after so many others; ``None`` at the end of the epoch.
        """
        works, known = [present], 0
        limit = self.rules.max_staleness
        while known < self.reach and not self.drains(len(works) - 1):
            late = self.step_of(len(works)) - present.step
            work = following(len(works) - 1) if limit is None or late <= limit else None
            if work is None:
                break
            works.append(work)
            known += len(work.batch)
        return works

    def drains(self, ahead: int) -> bool:
        """Whether nothing after a batch may be begun before it has ended.

        Args:
            ahead: The batch: 0 for the present one, 1 for the one after it.
        """
        trainer = self.trainer
        loop = trainer.fit_loop.epoch_loop
        batch, accumulated = trainer.fit_loop.batch_idx + ahead, trainer.accumulate_grad_batches
        if isinstance(trainer.val_check_batch, int | float) and trainer.enable_validation:
            done = batch if trainer.check_val_every_n_epoch is not None else loop.total_batch_idx + ahead
            if (done + 1) % trainer.val_check_batch == 0:
                return True
        if (batch + 1) % accumulated:
            return False
        step = self.step_of(ahead) + 1  # steps that are done by then
        if self.is_exact(step - 1) or self.is_exact(step):
            return True
        periods = [self.rules.drain_every_n_steps, *saves_every(trainer)]
        return any(every and step % every == 0 for every in periods) or step == trainer.max_steps

    def step_of(self, ahead: int) -> int:
        """The step that the gradients of a batch go to."""
        batch, accumulated = self.trainer.fit_loop.batch_idx, self.trainer.accumulate_grad_batches
        return self.trainer.global_step + (batch + ahead) // accumulated - batch // accumulated

    def is_exact(self, step: int) -> bool:
        """Whether nothing else is in flight in a step."""
        rules = self.rules
        if rules.max_staleness == 0 or step < rules.exact_warmup_steps:
            return True
        if not rules.exact_final_steps:
            return False
        return step >= self.trainer.estimated_stepping_batches - rules.exact_final_steps
