"""Asynchronous training in Lightning's loop: batches that overlap, and the weights that others see.

::

    Lightning, every rank    training_step(batch n)          backward  step n    ...  validation, checkpoint
    here                     backward passes of batch n,                              base weights, nothing in flight
                             forward passes of n+1, n+2 as far as they are admitted

So every rank makes step n at batch n, with Lightning's hooks, counters and learning rates, but at a time of its own.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from lightning_lwpm.pipeline.asynchronous.overflows import Overflows
from lightning_lwpm.pipeline.asynchronous.registry import correction
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.training.admission import Admission, Rules
from lightning_lwpm.training.correction_state import by_name, collected, in_order
from lightning_lwpm.training.gradients import clip_by_norm

__all__ = ["Overlap"]

HARMLESS = 1.75
"""Steps that gradients may be late on average: the loss was then 1.3 % above exact training's, and 2.9 % at 3.5.

Measured with AdamW and the default correction, 1,500 steps: see ``examples/benchmarks/README.md``.
"""

KEY = "lwpm_async"
"""Where a checkpoint keeps what continues the corrections."""


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
        self.trainer, self.engine, self.rules = trainer, engine, rules
        stages, rank = len(engine.ranks), engine.mailbox.rank
        each = count * trainer.accumulate_grad_batches
        self.run = Continuous(engine, [stages - 1 - stage for stage in range(stages)])
        self.admission = Admission(trainer, rules, stages - 1)
        self.drained = False
        self.scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.norms = Norms(engine.mailbox, engine.ranks, each, skipped=self.scaler is not None)
        self.overflows = Overflows(engine.mailbox, engine.ranks, each)
        shared = engine.shared.parameters if engine.shared is not None else ()
        # what several ranks hold counts in norms on the latest stage's
        self._counted_elsewhere = {id(p) for _, p, ranks in shared if ranks[0] != rank}
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
            if late > HARMLESS and rank == 0:
                warnings.warn(
                    f"gradients of the first stage are {late:.3g} optimizer steps late on average; up to {HARMLESS:g} "
                    "was seen to cost about 1 % of the loss (with AdamW). Raise num_microbatches from "
                    f"{count} to {stages - 1} or more, or limit max_staleness.",
                    stacklevel=2,
                )

    # -- batches -------------------------------------------------------------------------------------------------

    def train(self, present: Work, following: Callable[[int], Work | None]) -> list[Any]:
        """Run a batch.

        Args:
            present: The batch.
            following: Makes the one that comes after so many others; ``None`` at the end of the epoch.
        """
        works = self.admission.admitted(present, following)
        if self.drained:
            self._begin()
        self.drained = len(works) == 1
        return self.run.train(works)

    def settle(self) -> None:
        """Let go of what has been begun: others are to see a pipeline at rest."""
        if self.run.begun:
            self.run.discard()
            self._begin()

    def _begin(self) -> None:
        """The pipeline is empty."""
        self.norms.begin()
        self.overflows.begin()

    # -- steps ---------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """All gradients of the step are there, and clipped."""
        if self.correction is not None:
            self.correction.late = not self.admission.is_exact(self.trainer.global_step + 1)
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
        self.norms.tell(p for p in held if id(p) not in self._counted_elsewhere)
        self._turn += 1
        if self.drained:
            return clip_by_norm(self.engine.mailbox, ("drained", self._turn), parameters, max_norm)
        total = self.norms.total()
        torch.nn.utils.clip_grads_with_norm_(held, max_norm, total)
        return total

    def skip(self, overflow: bool) -> bool:
        """Whether this rank skips the step; told whether gradients overflow here."""
        assert self.scaler is not None
        return self.overflows.skip(overflow, self.scaler.get_scale(), self.drained)

    def lower(self) -> bool:
        """Whether the scale of losses is lowered after the step."""
        return self.overflows.lower(self.drained)

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

    def save(self, checkpoint: dict[str, Any], key: Any) -> None:
        """Put into rank 0's checkpoint what continues the corrections of all ranks.

        Args:
            checkpoint: What is to be saved.
            key: Names this exchange.
        """
        resting = self._base is not None
        self.go_on()
        own = by_name(self.correction.state_dict(), self.names) if self.correction is not None else None
        if resting:
            self.rest()
        state = collected(self.engine.mailbox, key, own)
        if self.engine.mailbox.rank == 0:
            checkpoint[KEY] = {"correction": self.rules.staleness_correction, "state": state}

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
