"""Receives of one rank, posted ahead in the order in which each other rank sends.

    rank 1 (stages 0, 2) runs    0F0       0F1       2F0         2B0         0B0 ...
    and so sends to rank 0       0F0>1F0   0F1>1F1   2F0>3F0     2B0>1B0     ...
    rank 0 (stages 1, 3) posts   1F0       1F1       3F0         1B0         in this order, whatever it runs first

The k-th send of a pair of ranks meets its k-th receive. Both ends take the order from the same table. When a receive is
needed, all before it can be posted: what they belong to has been sent, or will be, without any act of this rank that
is still to come; otherwise the table itself would not run to its end.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_lwpm.pipeline.flight import Item
from lightning_lwpm.pipeline.rendezvous import Message
from lightning_lwpm.pipeline.schedule import Action

if TYPE_CHECKING:
    from lightning_lwpm.pipeline.exchange import Exchange

__all__ = ["Postings"]


class Postings:
    """The receives of one rank, of all its stages.

    Args:
        lookahead: How many forward passes ahead their receives are posted.
    """

    def __init__(self, lookahead: int = 2) -> None:
        self.lookahead = lookahead
        self.exchanges: dict[int, Exchange] = {}
        self._queues: dict[int, deque[Message]] = {}
        self._items: Mapping[int, Item] = {}
        self._forwards: list[int] = []  # by position in the row: how many forward passes come before it
        self._turns: dict[Action, int] = {}  # the same by forward pass

    def begin(
        self, row: Sequence[Action], messages: Mapping[int, Sequence[Message]], items: Mapping[int, Item]
    ) -> None:
        """Begin a batch.

        Args:
            row: This rank's actions.
            messages: By sending rank, what it sends to this one, in order.
            items: The micro-batches, by number.
        """
        assert not any(self._queues.values()), "receives of the batch before are left"
        self._queues = {sender: deque(sent) for sender, sent in messages.items()}
        self._items = items
        self._forwards, self._turns = [], {}
        for action in row:
            self._forwards.append(len(self._turns))
            if action.kind == "F":
                self._turns[action] = len(self._turns)

    def ahead(self, position: int) -> None:
        """Before an action: post what can be posted without waiting, up to some forward passes ahead."""
        latest = self._forwards[position] + self.lookahead
        for queue in self._queues.values():
            while queue and self._turns.get(queue[0].consumer, latest) <= latest and self._post(queue[0], wait=False):
                queue.popleft()

    def until(self, sender: int, posted: Callable[[], bool]) -> None:
        """Post receives from a rank until ``posted`` says so."""
        queue = self._queues[sender]
        while not posted():
            message = queue.popleft()
            done = self._post(message, wait=True)
            assert done, f"{message} comes before what it depends on"

    def _post(self, message: Message, wait: bool) -> bool:
        source, (kind, stage, microbatch) = message.producer.stage, message.consumer
        item, exchange = self._items[microbatch], self.exchanges[stage]
        if kind == "F":
            return exchange.inbox.post(source, item, learn=wait)
        return exchange.outbox.post(source, item)
