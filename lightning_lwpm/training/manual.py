"""Steps with manual optimization: the user's step makes backward passes and optimizer steps itself, on every rank."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.whole import Whole
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.remote import localise
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.staging.tree import map_tensors
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.steps import Steps
from lightning_lwpm.training.termination import Interruption

__all__ = ["ManualSteps"]


class ManualSteps(Steps):
    """The steps of a run with manual optimization. A batch is whole, and ranks take turns.

    Args:
        trainer: As for :class:`Steps`, like all that follow.
        module: The same.
        engine: The same.
        feed: The same.
        hooks: The same.
        precision: The same.
        interruption: The same.
        optimizers: Those of the run; the user may call them without Lightning's wrappers.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        engine: Engine,
        feed: Feed,
        hooks: Hooks | None,
        precision: Precision,
        interruption: Interruption,
        optimizers: list[Optimizer],
    ) -> None:
        super().__init__(trainer, module, engine, feed, hooks, precision, interruption, 1)
        self.whole = Whole(self.mailbox, module, engine.layout, engine.device) if self.mailbox.world > 1 else None
        self._entered: list[AbstractContextManager[None]] = []
        self._handles: list[Any] = []
        for optimizer in optimizers if self.whole is not None else ():
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @override
    def train(self, batch: Any, *args: Any) -> Any:
        if self.whole is None:
            with self.precision.train_step_context():
                return self.module.training_step(batch, *args)
        self._watch()
        with self.book.recording():
            out = self._run("training_step", self.precision.train_step_context, batch, args)
            entries = self.book.entries
        out = self._share(out, None, entries)
        self._ended(training=True)
        return out

    @override
    def evaluate(self, name: str, context: Callable[[], AbstractContextManager[Any]], batch: Any, *args: Any) -> Any:
        if self.whole is None:
            return super().evaluate(name, context, batch, *args)
        out = self._evaluated(name, self._run(name, context, batch, args))
        self._ended(training=False)
        return out

    @override
    def _let_go(self, training: bool) -> None:
        if self.whole is None:  # else rank 0 may be done with its part before others have begun
            super()._let_go(training)

    def _ended(self, training: bool) -> None:
        """Every rank is done with its part."""
        assert self.whole is not None
        self.whole.end()
        super()._let_go(training)

    def _run(self, name: str, context: Callable[[], AbstractContextManager[Any]], batch: Any, args: Any) -> Any:
        """Run a step; returns its output on rank 0."""
        assert self.whole is not None
        batch, arguments = self.arguments(batch, args)
        split, real = Batch.of(batch, 1), self.mailbox.rank == 0
        for index, absent in split.absent.items():
            split.leaves[index] = self.feed.fetch(absent)
        self.book.microbatch(split.sizes[0], real)

        def step() -> Any:
            running = self.current()
            with context(), self.metrics.in_step(running), self.book.in_evaluation(running, real):
                return getattr(self.module, name)(*arguments(split.microbatch(0)))

        out = self.whole.run(step, self.stash)
        return map_tensors(_value, out) if real else None

    @override
    def current(self) -> StagedStep | None:
        return self.whole.step if self.whole is not None else super().current()

    @property
    @override
    def apart(self) -> bool:
        return False  # every rank runs the step to its end

    @override
    def meet(self) -> None:
        step = self.whole.step if self.whole is not None else None
        if step is not None:
            with step.paused():
                step.turn(step.at)

    @override
    def paused(self) -> AbstractContextManager[None]:
        step = self.whole.step if self.whole is not None else None
        return step.paused() if step is not None else nullcontext()

    @override
    def resumed(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        step = self.whole.step if self.whole is not None else None
        return step.resumed(closure) if step is not None else closure

    @override
    def remove(self) -> None:
        super().remove()
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        paused = self.paused()
        paused.__enter__()
        self._entered.append(paused)
        wrap = lambda value: self.resumed(value) if callable(value) else value  # noqa: E731
        return (args[0], *map(wrap, args[1:])), {name: wrap(value) for name, value in kwargs.items()}

    def _after_step(self, *_: Any) -> None:
        self._entered.pop().__exit__(None, None, None)


def _value(tensor: Tensor) -> Tensor:
    return localise(tensor).detach()
