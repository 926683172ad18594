"""Records what ran when in a few batches, and how much ranks idle in those that are logged.

::

    batch end     batch start        first .. last action                batch end
        |------ data -----|            |-- F, B, I, W --|--- optimizer ------|

Recorded batches cost two lists of moments; in all others nothing is noted but the end of the batch.
"""

import os
import time
from collections import deque

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import human_seconds
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.timeline.clocks import offset, serve
from lightning_lwpm.timeline.run import run_panels
from lightning_lwpm.timeline.spans import COMPUTE, Span, busy, measured
from lightning_lwpm.timeline.write import write_timeline

__all__ = ["Recorder"]

_FIRST, _COUNT = 10, 3
"""The timeline shows so many batches of an epoch, from this one on: by then nothing has to be learned any more."""

_LATER = 2
"""Rank 0 takes the others' spans so many batches after they were sent, so that it never waits for them."""


class Recorder(Callback):
    """Records batches of training; the first of all callbacks, so that their work lies between batches.

    Args:
        mailbox: The control connections.
        number: Tells the messages of this run from others; the same on all ranks.
        path: Where the timeline is written by rank 0; ``None`` for no timeline.
    """

    def __init__(self, mailbox: Mailbox, number: int, path: str | os.PathLike[str] | None) -> None:
        self.mailbox, self.number, self.path = mailbox, number, path
        self._window = range(0)  # the batches of this epoch that the timeline shows
        self._spans: list[Span] = []
        self._sent = path is None
        self._write_in: int | None = None  # batches until rank 0 writes
        self._ended: float | None = None  # when the batch before ended
        self._begun: float | None = None  # when this batch began
        self._batches = 0
        self._step = 0
        self._pending: deque[tuple[int, int, list[int]]] = deque()  # on rank 0: bubbles to be logged
        if mailbox.rank == 0:
            serve(mailbox)

    def attach(self, engine: Engine, plan: PartitionPlan | None) -> None:
        """Record the work of another engine from now on: the first one, or the layers have moved."""
        engine.record = [] if self.mailbox.waits is not None else None
        self.engine, self.plan = engine, plan
        self._spans = self._spans if self._sent else []

    def remove(self, trainer: Trainer) -> None:
        """Record nothing any more."""
        self._record(False)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if callback is not self]

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None
        if self._sent:
            return
        batches = trainer.num_training_batches
        if trainer.max_steps >= 0:
            batches = min(batches, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        first = int(max(0, min(_FIRST, batches - _COUNT)))
        self._window = range(first, first + int(min(_COUNT, batches)))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._batches += 1
        self._begun = time.perf_counter()
        self._step = trainer.global_step
        if self._logs(trainer) or batch_idx in self._window:
            self._record(True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.engine.record is not None:
            spans = self._noted(now, batch_idx)
            if self._logs(trainer):
                self._tell_busy(spans)
            if batch_idx in self._window:
                self._spans += spans
        self._record(batch_idx + 1 in self._window)
        if self._write_in is not None:
            self._write_in -= 1
        if self._write_in == 0:
            self._write()
        if batch_idx in self._window and batch_idx + 1 not in self._window:
            self._send()
        self._log(trainer, self._batches - 1)
        self._ended = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(False)
        if self._spans and not self._sent:
            self._send()
        if self._write_in is not None:
            self._write()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, self._batches)

    # -- recording -----------------------------------------------------------------------------------------------

    def _record(self, on: bool) -> None:
        """Have actions and waits noted from now on, or nothing."""
        if on and self.engine.record is None:
            self.engine.record, self.mailbox.waits = [], []
        elif not on:
            self.engine.record = self.mailbox.waits = None

    def _noted(self, now: float, batch_idx: int) -> list[Span]:
        """The spans of the batch that ends now; what comes from now on belongs to the next one."""
        actions, waits = self.engine.record or [], self.mailbox.waits or []
        self.engine.record, self.mailbox.waits = [], []
        others = []
        if self._ended is not None and self._begun is not None:
            others.append(("data", self._ended, self._begun))
        if actions:
            others.append(("optimizer", actions[-1][2], now))
            # where batches overlap, micro-batches are numbered through: here the batch's own begin with 0
            first = min((action.microbatch for action, _, _ in actions if action.kind != "F"), default=0)
            actions = [(a._replace(microbatch=a.microbatch - first), begin, end) for a, begin, end in actions]
        return measured(self.mailbox.rank, actions, others, waits, batch_idx, self.engine.times.on_device)

    # -- the timeline --------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Bring this rank's spans to rank 0, by rank 0's clock."""
        self._sent, self._window = True, range(0)
        if self.mailbox.rank == 0:
            self._write_in = _LATER
            return
        ahead, error = offset(self.mailbox, self.number)
        spans = [span.moved(ahead) for span in self._spans]
        self.mailbox.post(0, "spans", (self.number, self.mailbox.rank), (spans, error))

    def _write(self) -> None:
        """On rank 0: take the others' spans, and write the timeline. What goes wrong here ends no training."""
        assert self.path is not None
        self._write_in = None
        spans, error = list(self._spans), 0.0
        for rank in range(1, self.mailbox.world):
            theirs, off = self.mailbox.take("spans", (self.number, rank), f"the timeline of rank {rank}", rank)
            spans += theirs
            error = max(error, off)
        self._spans = []
        panels = run_panels(spans, self.engine.ranks, self.mailbox.world, self.plan)
        try:
            write_timeline(panels, self.path)
        except (OSError, ConfigurationError) as problem:
            rank_zero_warn(f"the timeline could not be written to {os.fspath(self.path)!r}: {problem}")
        else:
            clocks = f"; the clocks of the ranks agree to {human_seconds(error)}" if error else ""
            rank_zero_info(f"timeline written to {os.path.abspath(self.path)}{clocks}")

    # -- the bubble ----------------------------------------------------------------------------------------------

    def _logs(self, trainer: Trainer) -> bool:
        """Whether the bubble of this batch is logged."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and self._batches % every == 0

    def _tell_busy(self, spans: list[Span]) -> None:
        """Tell rank 0 how long this rank computed, and how long that took it from the first action to the last."""
        ranks = sorted(set(self.engine.ranks))
        if self.mailbox.rank == 0:
            self._pending.append((self._batches, self._step, ranks))
        if self.mailbox.rank in ranks:
            work = [span for span in spans if span.kind in COMPUTE]
            lasted = work[-1].end - work[0].begin if work else 0.0
            self.mailbox.post(0, "busy", (self.number, self._batches, self.mailbox.rank), (busy(work), lasted))

    def _log(self, trainer: Trainer, until: int) -> None:
        """On rank 0: log bubbles up to a batch. All ranks have told of it, for they have begun with the next one."""
        while self._pending and self._pending[0][0] <= until:
            batch, step, ranks = self._pending.popleft()
            what = "how long rank {} computed"
            told = [self.mailbox.take("busy", (self.number, batch, rank), what.format(rank), rank) for rank in ranks]
            # the longest is that of the first stage, where a batch begins and ends
            capacity = len(ranks) * max(lasted for _, lasted in told)
            found = {"lwpm/bubble": 1.0 - sum(worked for worked, _ in told) / capacity} if capacity else {}
            predicted = self.plan.prediction if self.plan is not None else None
            if predicted is not None and predicted.measured:  # FLOPs alone tell nothing of links
                found["lwpm/bubble_predicted"] = predicted.bubble
            for logger in trainer.loggers:
                logger.log_metrics(found, step)
