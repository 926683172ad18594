"""Runs the user's steps through the pipeline, and gives every rank what Lightning's loop expects of a step.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``. The whole schedule runs in the first of them;
the gradients wait in a :class:`~lightning_lwpm.training.gradients.Stash` for the last one.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_lwpm.pipeline.asynchronous.continuous import Work
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.training.attributes import Change
from lightning_lwpm.training.course import Course
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.gradients import Stash
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.late_changes import LateChanges
from lightning_lwpm.training.logs import Entry, LogBook, sendable
from lightning_lwpm.training.metrics import Metrics
from lightning_lwpm.training.outputs import has_loss, loss_of, merge_outputs
from lightning_lwpm.training.overlap import Overlap
from lightning_lwpm.training.private import skips_backward
from lightning_lwpm.training.pulled import Pulled
from lightning_lwpm.training.skipped import SKIPPED, accept_skipped, refuse_skipped
from lightning_lwpm.training.termination import Interruption, Termination

__all__ = ["Steps"]


class _Pass:
    """The passes of one training batch.

    Args:
        steps: Those of the run.
        batch: The batch.
        args: Further arguments of the user's step.
    """

    def __init__(self, steps: "Steps", batch: Any, args: tuple[Any, ...]) -> None:
        self.steps = steps
        batch, self.arguments = steps.arguments(batch, args)
        self.split = Batch.of(batch, steps.count, steps.least)
        self.losses: dict[int, Tensor] = {}  # of the micro-batches that the user's step has not skipped
        self.scaler = getattr(steps.precision, "scaler", None)

    def forward(self, micro: Any, i: int) -> Any:
        """The user's step on micro-batch ``i``."""
        steps = self.steps
        steps.book.microbatch(self.split.sizes[i], steps.engine.at_last)
        with steps.precision.train_step_context(), steps.metrics.in_step(steps.current()):
            out = steps.module.training_step(*self.arguments(micro))
            if steps.engine.at_last and steps.hooks is not None and i == len(self.split) - 1:
                steps.hooks.settings.attributes.fetch()
        # of a whole batch on one device Lightning says itself what is wrong with the output
        here = len(self.split) > 1 or steps.mailbox.world > 1 or has_loss(out)
        if out is not None and steps.engine.at_last and here:
            self.losses[i] = loss_of(out)
        return out

    def backward(self, out: Any, i: int) -> None:
        """The backward pass of micro-batch ``i``; none if the step has skipped it, which leaves gradients ``None``."""
        steps = self.steps
        if i not in self.losses:
            return
        loss = self.losses[i] if len(self.split) == 1 else self.losses[i] * self.split.weights[i]
        loss = loss / steps.trainer.accumulate_grad_batches  # as Lightning does, to the bit
        steps.module.backward(loss if self.scaler is None else self.scaler.scale(loss))


class Steps:
    """The steps of one run.

    Args:
        trainer: Runs the loop.
        module: The user's module, of which this rank holds its share.
        engine: The pipeline.
        feed: Has given the batches.
        hooks: The user's hooks; ``None`` with one rank.
        precision: Lightning's precision plugin.
        interruption: Takes note of Ctrl-C.
        count: Number of micro-batches.
        overlap: Lets batches overlap; ``None`` where they do not.
        least: The fewest samples of a micro-batch.
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
        count: int,
        overlap: Overlap | None = None,
        least: int = 1,
    ) -> None:
        self.trainer, self.module, self.feed, self.overlap = trainer, module, feed, overlap
        self.hooks, self.precision, self.mailbox = hooks, precision, engine.mailbox
        self.count, self.least = count, least
        self.book, self._course = LogBook(module, self.mailbox), Course(trainer)
        self._turn = 0
        self._told: set[str] = set()  # the steps of evaluation of which the user knows that they run layers again
        self.termination = Termination(trainer, self.mailbox, interruption)
        self._begun: deque[_Pass] = deque()  # of batches to come
        self._late = LateChanges(self.current, self.mailbox.label)
        if hooks is not None:
            hooks.settings.attributes.ahead = overlap is not None
            hooks.settings.attributes.late = self._late.watch if count > 1 or overlap is not None else None
        accept_skipped(trainer)
        self.attach(engine)

    def attach(self, engine: Engine) -> None:
        """Run the steps by another engine from now on: the layers have moved."""
        self.engine = engine
        self.metrics = Metrics(self.module)
        held = [(name, p) for name, p in self.module.named_parameters() if not is_placeholder(p)]
        self.stash = Stash([p for _, p in held], [p for name, p in held if name in engine.summed])

    def train(self, batch: Any, *args: Any) -> Any:
        """Forward and backward passes of a batch.

        Returns:
            The output of ``training_step`` on every rank; ``SKIPPED`` where it has returned ``None`` throughout.
        """
        out = self._train(batch, args)
        return SKIPPED if out is None else out

    def _train(self, batch: Any, args: tuple[Any, ...]) -> Any:
        run = self._begun.popleft() if self._begun else _Pass(self, batch, args)
        self.stash.begin(zeroed=self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0)
        self._watch()
        attributes = self.hooks.settings.attributes if self.hooks is not None else None
        if attributes is not None and (self.mailbox.rank == 0 or attributes.ahead):
            attributes.watch()
        with self.book.recording():
            if skips_backward(self.trainer):
                outputs = self.engine.evaluate(run.split, run.forward, self._fetcher(run.split), "train")
            elif self.overlap is not None:
                outputs = self.overlap.train(self._work(run, 0), lambda i: self._following(i, args))
            else:
                outputs = self.engine.train(run.split, run.forward, run.backward, self._fetcher(run.split))
        self.stash.end()
        if self.mailbox.rank != 0:
            return self._share(None, None, [])
        out = merge_outputs(outputs, run.losses, run.split.sizes)
        brief = out.get("loss") if isinstance(out, Mapping) else out
        changes = attributes.changes() if attributes is not None else []
        return self._share(out, brief, self.book.merged(), changes)

    def backward(self, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:
        """Where Lightning asks for the backward pass.

        Args:
            loss: The loss, as Lightning and the precision plugin have scaled it.
            optimizer: As for Lightning's precision plugin, like all that follow.
            args: The same.
            kwargs: The same.
        """
        self.stash.hand_over()

    def arguments(self, batch: Any, args: tuple[Any, ...]) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
        """The batch, and what the user's step is given of a micro-batch.

        Args:
            batch: From Lightning's loop, or what a step takes its batches from itself.
            args: Further arguments.
        """
        if not self.feed.loop.pulls():
            return batch, lambda micro: (micro, *args)
        pulled = self.feed.pull(batch)
        return pulled.batch, lambda micro: (Pulled(micro, pulled.place),)

    def _following(self, index: int, args: tuple[Any, ...]) -> Work | None:
        """The batch that comes after ``index`` others, of which passes may be begun."""
        if index == len(self._begun):
            batch = self.feed.peek(index)
            if batch is None:
                return None
            number = (args[0] + index + 1,) if args and isinstance(args[0], int) else args[:1]  # of the batch
            self._begun.append(_Pass(self, batch, (*number, *args[1:])))
        return self._work(self._begun[index], index + 1)

    def _work(self, run: "_Pass", ahead: int) -> Work:
        assert self.overlap is not None
        return Work(
            run.split, self.overlap.admission.step_of(ahead), run.forward, run.backward, self._fetcher(run.split)
        )

    def _watch(self) -> None:
        """A step begins: what it sets on rank 0, :meth:`_share` tells."""
        if self.hooks is not None:
            self._course.watch()

    def _share(self, out: Any, brief: Any, entries: list[Entry], changes: Sequence[Change] = ()) -> Any:
        """Give what rank 0 has of a batch to every rank, and log it there.

        Args:
            out: The output of the step.
            brief: What is enough of it where no callback of the user looks at it.
            entries: What it has logged.
            changes: What it has set on modules.
        """
        self._turn += 1
        ending = self.termination.batch_ended()
        if self.mailbox.rank == 0:
            if self.hooks is not None:
                shared = out if self._outputs_wanted("on_train_batch_end") else brief
                message = shared, sendable(entries), changes, self._course.changes(), self.trainer.should_stop, ending
                self.mailbox.post_all("step", self._turn, message)
                self._let_go(training=True)
        else:
            what = "the loss of this batch from rank 0"
            out, entries, changes, course, self.trainer.should_stop, ending = self.mailbox.take(
                "step", self._turn, what
            )
            assert self.hooks is not None
            self._course.follow(course)
            self.hooks.settings.attributes.adopt(changes, step=True)
            out = move_data_to_device(out, self.engine.device)
        self.termination.agreed = ending
        self.book.replay(entries)
        return out

    def evaluate(self, name: str, context: Callable[[], AbstractContextManager[Any]], batch: Any, *args: Any) -> Any:
        """One batch of evaluation, whole; stages work on consecutive batches at the same time.

        Args:
            name: Of the user's step.
            context: Lightning's precision context for it.
            batch: The batch.
            args: Further arguments of the step.

        Returns:
            What the step returned, on rank 0. Other ranks get it only where a callback of the user may look at it,
            because they would have to wait for rank 0 in each batch.
        """
        if self.overlap is not None:
            self.overlap.settle()
        batch, arguments = self.arguments(batch, args)
        split = Batch.of(batch, 1)

        def forward(micro: Any, _: int) -> Any:
            step = self.current()
            with context(), self.metrics.in_step(step), self.book.in_evaluation(step, self.engine.at_last):
                return getattr(self.module, name)(*arguments(micro))

        out = self.engine.evaluate(split, forward, self._fetcher(split), name)[0]
        self._tell_of_passes(name)
        return self._evaluated(name, out)

    def _tell_of_passes(self, name: str) -> None:
        """Say once that rank 0 goes on by itself in a step of evaluation, which costs time."""
        onward = self.engine.executor.onward if self.engine.executor is not None else ""
        if onward and name not in self._told:
            self._told.add(name)
            rank_zero_info(
                f"`{name}` {onward}: from there on rank 0 runs it by itself, with the weights of other ranks, which "
                "are sent for each such batch. The result is that of one device; it takes the time of one device, and "
                "memory for all weights there."
            )

    def _evaluated(self, name: str, out: Any) -> Any:
        """An evaluation step has ended: its output on rank 0, and where it is looked at."""
        self._let_go(training=False)
        if self._outputs_wanted(f"on_{name.removesuffix('_step')}_batch_end"):
            self._turn += 1
            out = self.mailbox.broadcast(("output", self._turn), out, what="the output of a step")
        return out

    def _let_go(self, training: bool) -> None:
        """Rank 0 has the output of the last stage: earlier stages need no more of the batch."""
        if self.mailbox.rank == 0:
            self.feed.used(training)

    @property
    def apart(self) -> bool:
        """Whether the user's step runs, and ranks leave it at different places."""
        return self.mailbox.world > 1 and self.current() is not None

    def meet(self) -> None:
        """All ranks are about to exchange something: none of them may wait for another one's part of the step."""

    def paused(self) -> AbstractContextManager[None]:
        """Within the block nothing is part of the user's step, which may be under way."""
        return nullcontext()

    def resumed(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """What an optimizer calls within such a block, as a part of the step again."""
        return closure

    def remove(self) -> None:
        """The run has ended."""
        refuse_skipped(self.trainer)
        self.termination.remove()
        self._late.remove()

    def _outputs_wanted(self, hook: str) -> bool:
        return self.hooks is not None and self.hooks.outputs_wanted(hook)

    def current(self) -> StagedStep | None:
        """The step that runs now."""
        return self.engine.executor.step if self.engine.executor is not None else None

    def _fetcher(self, split: Batch) -> Callable[[int], Tensor]:
        return lambda index: self.feed.fetch(split.absent[index])
