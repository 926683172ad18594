"""Gradients that overflow in half precision, where no step waits for the others.

A stage skips a step where its own gradients or those of a later stage overflow: what overflows goes on to earlier
stages, and later ones have made their step by then. The scale of the losses follows what the last stage knows at that
step, and so does the scale by which every other stage divides, which comes there later::

    skip(k, n)    = any of overflow_j(n) for j >= k
    lower(n)      = any of overflow_j(t) not counted before, up to t = n - ceil((p-1-j)/m), if scale(t) <= scale(n)

for p stages of m micro-batches a step; an overflow under a scale that has been lowered since says nothing any more. In
the last step before a drain every stage waits for all: they skip and lower as one device does.
"""

from collections.abc import Sequence

from lightning_lwpm.pipeline.asynchronous.told import Told
from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Overflows"]


class Overflows:
    """Which steps are skipped, and after which the scale is lowered.

    Args:
        mailbox: Carries what each stage has found.
        ranks: The rank of each stage.
        num_microbatches: Micro-batches between two steps.
    """

    def __init__(self, mailbox: Mailbox, ranks: Sequence[int], num_microbatches: int) -> None:
        self._found: Told[bool] = Told("overflow", mailbox, ranks, num_microbatches)
        self._scales: dict[int, float] = {}  # by turn
        self._counted = [0] * len(ranks)  # by stage: the last turn that has been counted

    def begin(self) -> None:
        """The pipeline is empty: what has not been counted yet is forgotten, on all ranks alike."""
        self._counted = [self._found.turn] * len(self._counted)

    def skip(self, here: bool, scale: float, drained: bool) -> bool:
        """Begin a turn: whether this stage skips the step; to be called once a step on all ranks.

        Args:
            here: Whether gradients of this rank overflow.
            scale: By which the losses of this step were multiplied.
            drained: Whether nothing of later batches has been begun.
        """
        found = self._found
        found.tell(here)
        self._scales[found.turn] = scale
        return any(found.value(stage, found.turn) for stage in range(0 if drained else found.here, len(found.ranks)))

    def lower(self, drained: bool) -> bool:
        """Whether this turn lowers the scale; the same on all ranks. To be called after :meth:`skip`."""
        found, scales, lowers = self._found, self._scales, False
        last = len(found.ranks) - 1
        for stage, before in enumerate(self._counted):
            until = found.turn if drained else found.turn - found.late(stage, last)
            for turn in range(before + 1, until + 1):
                self._counted[stage] = turn
                lowers |= found.value(stage, turn) and scales[turn] <= scales[found.turn]
        for old in [turn for turn in scales if turn < min(self._counted)]:
            del scales[old]
        return lowers
