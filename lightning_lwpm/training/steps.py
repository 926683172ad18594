"""Runs the user's steps through the pipeline, and gives every rank what Lightning's loop expects of a step.

Lightning calls ``training_step``, then ``zero_grad``, then ``backward``. The whole schedule runs in the first of them;
the gradients wait in a :class:`~lightning_lwpm.training.gradients.Stash` for the last one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.training.data import Feed
from lightning_lwpm.training.gradients import Stash
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.logs import LogBook, sendable
from lightning_lwpm.training.metrics import Metrics
from lightning_lwpm.training.outputs import loss_of, mean_loss, merge_outputs
from lightning_lwpm.training.private import skips_backward

__all__ = ["Steps"]


class Steps:
    """The steps of one run.

    Args:
        trainer: Runs the loop.
        module: The user's module, of which this rank holds its share.
        engine: The pipeline.
        feed: Has given the batches.
        hooks: The user's hooks; ``None`` with one rank.
        precision: Lightning's precision plugin.
        count: Number of micro-batches.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        engine: Engine,
        feed: Feed,
        hooks: Hooks | None,
        precision: Precision,
        count: int,
    ) -> None:
        self.trainer, self.module, self.feed = trainer, module, feed
        self.hooks, self.precision, self.count, self.mailbox = hooks, precision, count, engine.mailbox
        self.book = LogBook(module, self.mailbox)
        self._turn = 0
        self.attach(engine)

    def attach(self, engine: Engine) -> None:
        """Run the steps by another engine from now on: the layers have moved."""
        self.engine = engine
        self.metrics = Metrics(self.module)
        held = [(name, p) for name, p in self.module.named_parameters() if not is_placeholder(p)]
        self.stash = Stash([p for _, p in held], [p for name, p in held if name in engine.summed])

    def train(self, batch: Any, *args: Any) -> Any:
        """Forward and backward passes of a batch; returns the output of ``training_step`` on every rank."""
        split = Batch.of(batch, self.count)
        losses: list[Tensor] = []
        accumulated = self.trainer.accumulate_grad_batches
        scaler = getattr(self.precision, "scaler", None)

        def forward(micro: Any, i: int) -> Any:
            self.book.microbatch(split.sizes[i], self.engine.at_last)
            with self.precision.train_step_context(), self.metrics.in_step(self._step()):
                out = self.module.training_step(micro, *args)
            if self.engine.at_last:
                losses.append(loss_of(out))
            return out

        def backward(out: Any, i: int) -> None:
            loss = losses[i] if len(losses) == 1 == len(split) else losses[i] * split.weights[i]
            loss = loss / accumulated  # as Lightning does, to the bit
            self.module.backward(loss if scaler is None else scaler.scale(loss))

        self.stash.begin(zeroed=self.trainer.fit_loop.batch_idx % accumulated == 0)
        with self.book.recording():
            if skips_backward(self.trainer):
                outputs = self.engine.evaluate(split, forward, self._fetcher(split), "train")
            else:
                outputs = self.engine.train(split, forward, backward, self._fetcher(split))
        self.stash.end()
        return self._share(split, outputs, losses)

    def _share(self, split: Batch, outputs: list[Any], losses: list[Tensor]) -> Any:
        """Give the loss and the logs of a batch to every rank, and log them there."""
        self._turn += 1
        if self.mailbox.rank == 0:
            entries = self.book.merged()
            out = merge_outputs(outputs, losses, split.sizes)
            if self.mailbox.world > 1:
                shared = out if self._outputs_wanted("on_train_batch_end") else mean_loss(losses, split.sizes)
                message = shared, sendable(entries), self.trainer.should_stop
                self.mailbox.post_all("step", self._turn, message)
                self.feed.used("train")
        else:
            what = "the loss of this batch from rank 0"
            out, entries, self.trainer.should_stop = self.mailbox.take("step", self._turn, what)
            out = move_data_to_device(out, self.engine.device)
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
        split = Batch.of(batch, 1)

        def forward(micro: Any, _: int) -> Any:
            step = self._step()
            with context(), self.metrics.in_step(step), self.book.in_evaluation(step, self.engine.at_last):
                return getattr(self.module, name)(micro, *args)

        out = self.engine.evaluate(split, forward, self._fetcher(split), name)[0]
        if self.mailbox.rank == 0:
            self.feed.used("ahead")
        if self._outputs_wanted(f"on_{name.removesuffix('_step')}_batch_end"):
            self._turn += 1
            out = self.mailbox.broadcast(("output", self._turn), out, what="the output of a step")
        return out

    def _outputs_wanted(self, hook: str) -> bool:
        return self.hooks is not None and self.hooks.outputs_wanted(hook)

    def _step(self) -> StagedStep | None:
        """The step that runs now."""
        return self.engine.executor.step if self.engine.executor is not None else None

    def _fetcher(self, split: Batch) -> Callable[[int], Tensor]:
        return lambda index: self.feed.fetch(split.absent[index])
