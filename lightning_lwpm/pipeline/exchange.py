"""One stage's dealings with the others: what it receives (inbox) and what it sends (outbox)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lwpm.pipeline.flight import Desk, Item
from lightning_lwpm.pipeline.inbox import Inbox, Peers
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.outbox import Outbox
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Exchange", "Item"]


class Exchange:
    """The dealings of one stage.

    Args:
        mailbox: For requests and answers.
        transport: For data.
        stage: This rank's stage.
        ranks: The rank of each stage.
        device: Where tensors of this stage live.
        lookahead: How many micro-batches ahead receives are posted.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport,
        stage: int,
        ranks: Sequence[int],
        device: torch.device,
        lookahead: int = 2,
    ) -> None:
        self.desk = Desk(mailbox, stage, ranks)
        self.inbox = Inbox(self.desk, transport, device)
        self.outbox = Outbox(self.desk, transport, device)
        self.lookahead = lookahead

    def post(self, items: Sequence[Item]) -> None:
        """Post receives for the micro-batches whose forwards come next."""
        self.inbox.post(items)

    def open(self, item: Item) -> Peers:
        """Begin a forward: wait for what was agreed."""
        return self.inbox.open(item)

    def wait_for_room(self, window: int) -> None:
        """Do not run further ahead of the last stage than ``window`` micro-batches."""
        self.outbox.wait_for_room(window)

    def publish(self, item: Item, step: StagedStep) -> None:
        """End a forward: send what was agreed."""
        desk = self.desk
        if not desk.last:
            self.outbox.publish(desk.flights[item.serial], step)
        if not item.grad:
            for producer in range(desk.stage):
                desk.mailbox.post(desk.ranks[producer], "?forward-done", item.serial, desk.stage)
            if desk.last:
                with desk.lock:
                    del desk.flights[item.serial]

    def gradients(self, item: Item) -> tuple[list[Tensor], list[Tensor]]:
        """Begin a backward: the tensors sent, and their gradients."""
        return self.outbox.gradients(self.desk.flights[item.serial])

    def return_gradients(self, item: Item) -> None:
        """End a backward: send gradients back, and let go of the micro-batch."""
        self.inbox.return_gradients(self.desk.flights[item.serial])
        with self.desk.lock:
            del self.desk.flights[item.serial]
