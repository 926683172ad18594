"""Steps that every rank runs whole, in turns: with manual optimization, and with ``schedule="sequential"``.

::

    automatic optimization     training_step | on_before_zero_grad, zero_grad | backward | optimizer's step
    manual optimization        training_step [backward, optimizer's step, backward, optimizer's step]
    the step, on every rank    .......................................        goes on

With automatic optimization the user's step ends as on one device, and goes on where Lightning asks for the backward
pass: so hooks keep their order, and the user's ``backward`` runs among them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.whole import Whole
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.remote import Remote, localise
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.staging.tree import map_tensors
from lightning_lwpm.training.collectives import data_axis
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.outputs import has_loss
from lightning_lwpm.training.private import skips_backward
from lightning_lwpm.training.pulled import Item
from lightning_lwpm.training.skipped import SKIPPED
from lightning_lwpm.training.steps import Steps
from lightning_lwpm.training.termination import Interruption

__all__ = ["WholeSteps"]


class WholeSteps(Steps):
    """The steps of a run in which a batch is whole, and ranks take turns.

    Args:
        trainer: As for :class:`Steps`, like all that follow.
        module: The same.
        engine: The same.
        feed: The same.
        hooks: The same.
        precision: The same.
        interruption: The same.
        optimizers: Those of the run; the user may call them without Lightning's wrappers.
        activation_checkpointing: What is computed again in backward passes.
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
        activation_checkpointing: str = "none",
    ) -> None:
        super().__init__(trainer, module, engine, feed, hooks, precision, interruption, 1)
        self.whole: Whole | None = None
        if self.mailbox.world > 1:
            self.whole = Whole(self.mailbox, module, engine.layout, engine.device, activation_checkpointing)
        self._loss: Tensor | None = None  # of which the backward pass is to come
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
            own = self._run("training_step", self.precision.train_step_context, batch, args)
            entries = self.book.entries
        automatic, real = self.module.automatic_optimization, self.mailbox.rank == 0
        told = map_tensors(_value, own) if real else None
        out = self._share(told, _loss_of(told) if automatic else None, entries)
        if automatic and has_loss(own) and not skips_backward(self.trainer):
            self._loss = loss = _loss_of(own)
            return _with_loss(out, loss) if self.whole.has_made(loss) else out
        self._ended(training=True)
        return SKIPPED if automatic and own is None else out

    @override
    def backward(self, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:
        if self.whole is None:
            self.precision.backward(loss, self.module, optimizer, *args, **kwargs)
            return
        assert self._loss is not None
        made, self._loss = self._loss, None
        with data_axis():
            self.whole.go_on(
                made, loss, lambda now: self.precision.backward(now, self.module, optimizer, *args, **kwargs)
            )
        self._ended(training=True)

    @override
    def evaluate(self, name: str, context: Callable[[], AbstractContextManager[Any]], batch: Any, *args: Any) -> Any:
        if self.whole is None:
            return super().evaluate(name, context, batch, *args)
        own = self._run(name, context, batch, args)
        out = self._evaluated(name, map_tensors(_value, own) if self.mailbox.rank == 0 else None)
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
        """Run a step; returns what it has returned on this rank."""
        assert self.whole is not None
        real = self.mailbox.rank == 0
        self.book.microbatch(1.0, real)
        given = (_Pulling(self, batch),) if self.feed.loop.pulls() else (self._whole_batch(batch), *args)
        over: list[StopIteration] = []

        def step() -> Any:
            running = self.current()
            with context(), self.metrics.in_step(running, self._told_by_rank_0), self.book.in_evaluation(running, real):
                try:
                    out = getattr(self.module, name)(*given)
                except StopIteration as end:  # there is no more data, on any rank
                    over.append(end)
                    return None
                with self.paused():
                    self._fetch_kept()
                return out

        out = self.whole.run(step, self.stash)
        if over:
            self._ended(training=name == "training_step")
            raise over[0]
        return out

    def _fetch_kept(self) -> None:
        """What the step has put into modules and another rank has made: later steps may read it on every rank."""
        if self.hooks is not None:
            self.hooks.settings.attributes.fetch()
        for module in self.module.modules():
            for name, buffer in module._buffers.items():
                if type(buffer) is Remote:
                    module._buffers[name] = _value(buffer)

    def _told_by_rank_0(self, function: Callable[[], Any]) -> Any:
        """What a function returns on rank 0, such as the value of a metric, on which a step may decide."""
        self.meet()
        self._turn += 1
        value = function() if self.mailbox.rank == 0 else None
        with self.paused():
            value = self.mailbox.broadcast(("value", self._turn), value, what="a value")
            return move_data_to_device(value, self.engine.device) if self.mailbox.rank else value

    def _whole_batch(self, batch: Any) -> Any:
        """A batch with those parts that this rank has not been given."""
        split = Batch.of(batch, 1)
        for index, absent in split.absent.items():
            split.leaves[index] = self.feed.fetch(absent)
        return split.microbatch(0)

    def pull(self, dataloader_iter: Any) -> Item:
        """The next batch of a step that takes its batches itself: all ranks ask for as many."""
        assert self.whole is not None
        self.meet()  # rank 0 draws what reading draws after all that was drawn before
        with self.paused():
            pulled = self.feed.pull(dataloader_iter)
            self.whole.draw_on()
            return self._whole_batch(pulled.batch), *pulled.place

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


class _Pulling(Iterator[Item]):
    """What a step gets in the place of ``dataloader_iter``: as many batches as it takes.

    Args:
        steps: Bring them.
        dataloader_iter: Lightning's.
    """

    def __init__(self, steps: WholeSteps, dataloader_iter: Any) -> None:
        self.steps, self.dataloader_iter = steps, dataloader_iter

    def __next__(self) -> Item:
        return self.steps.pull(self.dataloader_iter)

    def __getattr__(self, name: str) -> Any:  # such as `done`
        return getattr(self.__dict__["dataloader_iter"], name)


def _value(tensor: Tensor) -> Tensor:
    return localise(tensor).detach()


def _loss_of(out: Any) -> Any:
    return out.get("loss") if isinstance(out, Mapping) else out


def _with_loss(out: Any, loss: Tensor) -> Any:
    """What every rank has of a step's output, with the loss and its graph."""
    return {**out, "loss": loss} if isinstance(out, Mapping) else loss
