"""Ranks that run the same code tell each other results, and notice where one of them is on another path.

Every rank counts the results that are told, its own and those of others. One that waits for number 7 from a rank that
waits for 7 or a later one itself, or has ended, is on another path. Before the first change of what is read all wait
for each other::

    count          count + 0.25                      count + 0.5                     infinity
    come so far    waits for result count + 1        is about to change something    has ended
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Lockstep"]

_SOON_SECONDS = 0.005  # one that waits longer tells how far it is


class Lockstep:
    """What one rank hears of the others in a piece of code that all run.

    Args:
        mailbox: The control connections.
        turn: Numbers the pieces of code, the same on all ranks.
        what: Names the piece, for people.

    Attributes:
        count: The results told so far, and one for the beginning of changes.
        changing: Whether the first change has come.
        changes: How many changes this rank has made of what all have to change alike.
    """

    def __init__(self, mailbox: Mailbox, turn: int, what: str) -> None:
        self.mailbox, self.turn, self.what = mailbox, turn, what
        self.others = [rank for rank in range(mailbox.world) if rank != mailbox.rank]
        self.count, self.changing, self.changes = 0, False, 0
        self._at = self._marked = -1.0
        self._told: dict[int, deque[Any]] = {rank: deque() for rank in self.others}
        self._come = dict.fromkeys(self.others, -1.0)  # how far each rank is known to be
        self._changes = dict.fromkeys(self.others, 0)  # the changes that each had made by then
        self._last: dict[int, Any] = {}  # what each has said at its end

    def tell(self, ranks: Iterable[int], value: Any) -> None:
        """Tell some ranks the next result; :meth:`advance` follows."""
        for rank in ranks:
            self._post(rank, self.count + 1, value)

    def hear(self, rank: int) -> tuple[int, Any] | None:
        """What a rank tells next, and as which result; ``None`` if it is on another path. :meth:`advance` follows."""
        self._at = self.count + 0.25
        told = self._told[rank]
        while not told and self._come[rank] < self._at:
            self._receive(rank)
        return told.popleft() if told else None

    def advance(self) -> None:
        """A result has been told or heard."""
        self.count += 1

    def begin_changes(self) -> None:
        """Before the first change wait for all ranks, which may ask for what was before."""
        if not self.changing:
            self._all_reach(self.count + 0.5)
            self.count += 1
            self.changing = True

    def end(self, last: Any = None) -> dict[int, Any]:
        """Wait until all ranks have ended.

        Args:
            last: What this rank has to say at its end.

        Returns:
            What each of the others says, by rank.

        Raises:
            ConfigurationError: if one of them has changed what another has not.
        """
        self._all_reach(math.inf, last)
        for rank, changes in self._changes.items():
            if changes != self.changes:
                most = rank if changes > self.changes else self.mailbox.rank
                raise ConfigurationError(
                    f"{self.what} changes gradients or weights on rank {most} that it leaves as they are on another "
                    "rank, so that the ranks would go on with different models. Let it change them on every rank, not "
                    "under `if trainer.is_global_zero`, or do it in `on_train_batch_end` of the module."
                )
        return self._last

    def _all_reach(self, at: float, *last: Any) -> None:
        self._at = at
        self._mark(*last)
        for rank in self.others:
            while self._come[rank] < at:
                self._receive(rank)

    def _receive(self, rank: int) -> None:
        key = ("together", (self.turn, rank))
        if self._marked < self._at and not self.mailbox.arrives(*key, _SOON_SECONDS):
            self._mark()
        count, changes, *value = self.mailbox.take(*key, f"{self.what} on rank {rank}", source=rank)
        self._come[rank], self._changes[rank] = max(self._come[rank], count), changes
        if count == math.inf:
            (self._last[rank],) = value
        elif value:
            self._told[rank].append((count, *value))

    def _mark(self, *last: Any) -> None:
        """Tell all ranks how far this one is."""
        self._marked = self._at
        for rank in self.others:
            self._post(rank, self._at, *last)

    def _post(self, rank: int, at: float, *value: Any) -> None:
        self.mailbox.post(rank, "together", (self.turn, self.mailbox.rank), (at, self.changes, *value))
