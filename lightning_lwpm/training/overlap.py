"""Asynchronous training in Lightning's loop: which batches may be begun early, and the weights that others see.

::

    Lightning, every rank    training_step(batch n)          backward  step n    ...  validation, checkpoint
    here                     backward passes of batch n,                              base weights, nothing in flight
                             forward passes of n+1, n+2 as far as they are admitted

So every rank makes step n at batch n, with Lightning's hooks, counters and learning rates, but at a time of its own.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lwpm.pipeline.asynchronous.continuous import Continuous, Work
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import unnoticed, writable
from lightning_lwpm.pipeline.asynchronous.norms import Norms
from lightning_lwpm.pipeline.asynchronous.registry import DEFAULT, correction
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.training.correction_state import by_name, in_order, merged
from lightning_lwpm.training.gradients import clip_by_norm
from lightning_lwpm.training.private import saves_every

__all__ = ["Overlap", "Rules"]

HARMLESS = 1.0
"""Steps that gradients may be late on average: look-ahead then ended below exact training, and 5.6 % above at 3.5."""

KEY = "lwpm_async"
"""Where a checkpoint keeps what continues the corrections."""


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


class Overlap:
    """Lets batches overlap.

    Args:
        trainer: Runs the loop.
        module: The user's module, of which this rank holds its share.
        engine: The pipeline.
        optimizers: Of the run.
        rules: What the user asked for.
        count: Number of micro-batches.

    Attributes:
        run: The pipeline without flushes.
        drained: Whether nothing of later batches has been begun in the present one.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        engine: Engine,
        optimizers: list[Optimizer],
        rules: Rules,
        count: int,
    ) -> None:
        self.trainer, self.module, self.engine, self.rules = trainer, module, engine, rules
        stages = len(engine.ranks)
        each = count * trainer.accumulate_grad_batches
        self.run = Continuous(engine, [stages - 1 - stage for stage in range(stages)])
        self.reach = stages - 1 if rules.max_staleness != 0 else 0
        self.drained = False
        self.norms = Norms(engine.mailbox, engine.ranks, each)
        self._turn = 0
        self._base: ExitStack | None = None
        self._depth = 0
        self.correction: Correction | None = None
        if engine.stage is not None and optimizers:
            delay = Delay(engine.stage, stages, each, rules.max_staleness)
            named = {id(p): name for name, p in module.named_parameters()}
            grouped = [p for group in optimizers[0].param_groups for p in group["params"]]
            held = [p for p in grouped if p.requires_grad and not is_placeholder(p)]
            self.names = [named[id(p)] for p in held]
            self.correction = correction(rules.staleness_correction)(optimizers[0], held, delay)
            self.run.correction = self.correction
            late = Delay(0, stages, each, rules.max_staleness).mean
            if late > HARMLESS and engine.mailbox.rank == 0:
                warnings.warn(
                    f"gradients of the first stage are {late:.3g} optimizer steps late on average; up to {HARMLESS:g} "
                    f"was seen to be harmless (with AdamW). Raise num_microbatches from {count} to {stages - 1} or "
                    "more, or limit max_staleness.",
                    stacklevel=2,
                )

    # -- which batches -------------------------------------------------------------------------------------------

    def drains(self, ahead: int) -> bool:
        """Whether nothing after a batch may be begun before it has ended.

        Args:
            ahead: The batch: 0 for the present one, 1 for the one after it.
        """
        trainer, rules = self.trainer, self.rules
        loop = trainer.fit_loop.epoch_loop
        batch, accumulated = trainer.fit_loop.batch_idx + ahead, trainer.accumulate_grad_batches
        if isinstance(trainer.val_check_batch, int | float) and trainer.enable_validation:
            done = batch if trainer.check_val_every_n_epoch is not None else loop.total_batch_idx + ahead
            if (done + 1) % trainer.val_check_batch == 0:
                return True
        if (batch + 1) % accumulated:
            return False
        step = self.step_of(ahead) + 1  # steps that are done by then
        if self._is_exact(step - 1) or self._is_exact(step):
            return True
        periods = [rules.drain_every_n_steps, *saves_every(trainer)]
        return any(every and step % every == 0 for every in periods) or step == trainer.max_steps

    def step_of(self, ahead: int) -> int:
        """The step that the gradients of a batch go to."""
        batch, accumulated = self.trainer.fit_loop.batch_idx, self.trainer.accumulate_grad_batches
        return self.trainer.global_step + (batch + ahead) // accumulated - batch // accumulated

    def _is_exact(self, step: int) -> bool:
        rules = self.rules
        if rules.max_staleness == 0 or step < rules.exact_warmup_steps:
            return True
        if not rules.exact_final_steps:
            return False
        return step >= self.trainer.estimated_stepping_batches - rules.exact_final_steps

    def train(self, present: Work, following: Callable[[int], Work | None]) -> list[Any]:
        """Run a batch.

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
        if self.drained:
            self.norms.begin()
        self.drained = len(works) == 1
        return self.run.train(works)

    def settle(self) -> None:
        """Let go of what has been begun: others are to see a pipeline at rest."""
        if self.run.begun:
            self.run.discard()
            self.norms.begin()

    # -- steps ---------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """All gradients of the step are there, and clipped."""
        if self.correction is not None:
            self.correction.late = not self._is_exact(self.trainer.global_step + 1)
            self.correction.before_step()

    def step(self, run: Callable[[], Any]) -> Any:
        """Run an optimizer's step, its closure included, unnoticed by the passes in flight."""
        if self.correction is None:
            return run()
        with unnoticed(self.correction.parameters):
            out = run()
        self.correction.after_step()
        return out

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Clip by the norm over all stages, without waiting for stages that are later in time."""
        parameters = list(parameters)  # alike on all ranks
        held = [p for p in parameters if p.grad is not None and not is_placeholder(p)]
        self.norms.tell(p for p in held if self._counts(p))
        self._turn += 1
        if self.drained:
            return clip_by_norm(self.engine.mailbox, ("drained", self._turn), parameters, max_norm)
        total = self.norms.total()
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, total)
        return total

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter counts here: one that several ranks hold counts on the latest stage's."""
        shared = self.engine.shared
        homes = {id(p): ranks[0] for _, p, ranks in shared.parameters} if shared is not None else {}
        return homes.get(id(parameter), self.engine.mailbox.rank) == self.engine.mailbox.rank

    # -- weights that others see ---------------------------------------------------------------------------------

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nothing in flight, and base weights, as they are to be evaluated and saved."""
        self.settle()
        self._depth += 1
        try:
            if self._depth > 1 or self.correction is None:
                yield
            else:
                with self.correction.base():
                    yield
        finally:
            self._depth -= 1

    def rest(self) -> None:
        """Begin to be at rest."""
        if self._base is None:
            self._base = ExitStack()
            self._base.enter_context(self.at_rest())

    def go_on(self) -> None:
        """End it."""
        if self._base is not None:
            base, self._base = self._base, None
            base.close()

    def finish(self) -> None:
        """At the end of training: base weights for good, and no more corrections."""
        self.settle()
        self.go_on()
        if self.correction is None:
            return
        parameters = self.correction.parameters
        with self.correction.base():
            base = [parameter.detach().clone() for parameter in parameters]
        with writable(parameters):
            for parameter, value in zip(parameters, base, strict=True):
                parameter.copy_(value)
        self.correction = self.run.correction = None

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self) -> Any:
        """What continues the corrections of this rank's weights; to be taken before :meth:`at_rest`."""
        resting = self._base is not None
        self.go_on()
        own = by_name(self.correction.state_dict(), self.names) if self.correction is not None else None
        if resting:
            self.rest()
        return own

    def save(self, checkpoint: dict[str, Any], own: Any, key: Any) -> None:
        """Put into rank 0's checkpoint what continues the corrections of all ranks.

        Args:
            checkpoint: What is to be saved.
            own: The state of this rank.
            key: Names this exchange.
        """
        mailbox = self.engine.mailbox
        if mailbox.rank:
            mailbox.post(0, "corrections", (key, mailbox.rank), own)
            return
        states = [own]
        for rank in range(1, mailbox.world):
            what = f"the state of the corrections of {mailbox.names[rank]}"
            states.append(mailbox.take("corrections", (key, rank), what))
        found = merged([state for state in states if state is not None])
        checkpoint[KEY] = {"correction": self.rules.staleness_correction, "state": found}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue where a checkpoint was written; without what is needed, corrections begin anew."""
        saved = checkpoint.get(KEY)
        if self.correction is None or not saved or saved["state"] is None:
            return
        if saved["correction"] != self.rules.staleness_correction:
            warnings.warn(
                f"the checkpoint was written with staleness_correction={saved['correction']!r}; "
                f"{self.rules.staleness_correction!r} begins anew",
                stacklevel=2,
            )
            return
        self.correction.load_state_dict(in_order(saved["state"], self.names))
