"""Tells the user when another partition would be faster, by what the stages have measured, and finds it."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_info

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.training.planning import Planner
from lightning_lwpm.tuning.review import StageTimes, measured

__all__ = ["Reviewer"]

_BATCHES = 12
"""After so many batches the stages' times are compared with the plan's: by then nothing has to be learned any more."""

_LATER = 2
"""Rank 0 reads the others' times so many batches after they were sent, so that it never waits for them."""


class Reviewer:
    """Compares the plan with what the stages measure of themselves.

    Args:
        planner: Has made the plan.
        mailbox: The control connections.
        engine: Runs the stages.
        every: After so many epochs layers may move; 0 for never.
    """

    def __init__(self, planner: Planner, mailbox: Mailbox, engine: Engine, every: int = 0) -> None:
        self.planner, self.mailbox, self.every = planner, mailbox, every
        self._settled_at: int | None = None  # the epoch in which layers last could move
        self.attach(engine)

    def attach(self, engine: Engine) -> None:
        """Go on with another engine: the layers have moved."""
        self.engine, self._batches = engine, 0

    def due(self, epoch: int) -> bool:
        """Whether layers may move at the start of an epoch."""
        if self._settled_at is None:
            self._settled_at = epoch
        if not self.every or epoch < self._settled_at + self.every:
            return False
        self._settled_at = epoch
        return True

    def batch_done(self) -> None:
        """Count a batch; once, some batches after the first, advise the user."""
        self._batches += 1
        if self._batches == _BATCHES:
            self.mailbox.post(0, "stage times", self.mailbox.rank, self._mine())
        if self._batches == _BATCHES + _LATER and self.mailbox.rank == 0:
            what = "the times of the stages of rank {}"
            gathered = {
                rank: self.mailbox.take("stage times", rank, what.format(rank), rank) for rank in set(self.engine.ranks)
            }
            found = self.planner.review(self._by_stage(gathered))
            if found is not None and found.worth_telling:
                rank_zero_info(found.text())

    def better(self) -> Layout | None:
        """The layout of a partition that is over 5 % faster, if there is one; all ranks take part."""
        self._batches = 0
        times = self.mailbox.gather(("stage times", self.engine.serial), self._mine(), "the times of all stages")
        return self.planner.revised(self._by_stage(dict(enumerate(times))))

    def _by_stage(self, gathered: Mapping[int, Mapping[int, StageTimes]]) -> list[StageTimes | None]:
        return [gathered[rank].get(stage) for stage, rank in enumerate(self.engine.ranks)]

    def _mine(self) -> dict[int, StageTimes]:
        """What each stage of this rank has measured."""
        found = {}
        for stage in self.engine.stages:
            times = measured(*(self.engine.times.median(stage, kind) for kind in "FBIW"))
            if times is not None:
                found[stage] = times
        return found
