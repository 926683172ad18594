"""What each stage tells all ranks once a step, and when it is known where no step waits for the others.

Stages step one after the other, the last one first. At step n stage k knows of later stages what they told at step n,
and of an earlier stage j, which has not come there, without waiting what it told at step n - ceil((k-j)/m).
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Told", "late"]

Value = TypeVar("Value", float, bool)


def late(stage: int, at: int, num_microbatches: int) -> int:
    """How many steps ago a stage told what is known of it at stage ``at`` without waiting."""
    return max(0, -(-(at - stage) // num_microbatches))


class Told(Generic[Value]):
    """Values of all stages, by turn: a turn is a step of this run.

    Args:
        kind: Tells messages apart, and what is waited for, for people.
        mailbox: Carries them.
        ranks: The rank of each stage.
        num_microbatches: Micro-batches between two steps.

    Attributes:
        turn: The present turn, 0 before the first.
        since: The turn after which the pipeline was empty for the last time.
        here: The stage of this rank; on a rank without one, that after the last.
    """

    def __init__(self, kind: str, mailbox: Mailbox, ranks: Sequence[int], num_microbatches: int) -> None:
        self.kind, self.mailbox, self.ranks, self.num_microbatches = kind, mailbox, list(ranks), num_microbatches
        self.here = self.ranks.index(mailbox.rank) if mailbox.rank in self.ranks else len(self.ranks)
        self.turn = self.since = 0
        self._values: list[dict[int, Value]] = [{} for _ in ranks]
        self._heard = [0] * len(ranks)

    def tell(self, value: Value) -> None:
        """Begin a turn: tell all ranks of this stage; to be called once a step on all ranks."""
        self.turn += 1
        if self.here < len(self.ranks):
            self._values[self.here][self.turn] = value
            self.mailbox.post_all(self.kind, (self.turn, self.mailbox.rank), value)

    def begin(self) -> None:
        """The pipeline is empty: what stages were like before says nothing any more."""
        self.since = self.turn

    def late(self, stage: int, at: int) -> int:
        """See :func:`late`."""
        return late(stage, at, self.num_microbatches)

    def value(self, stage: int, turn: int) -> Value:
        """What a stage has told in a turn; waits for it."""
        known, rank = self._values[stage], self.ranks[stage]
        while stage != self.here and self._heard[stage] < turn:
            self._heard[stage] += 1
            what = f"the {self.kind} of stage {stage} (rank {rank}) for a step"
            known[self._heard[stage]] = self.mailbox.take(self.kind, (self._heard[stage], rank), what)
        for old in [each for each in known if each < turn - len(self.ranks)]:
            del known[old]
        return known[turn]
