"""One stage's dealings with the others: what it receives (inbox) and what it sends (outbox)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lwpm.pipeline.flight import Desk, Item
from lightning_lwpm.pipeline.inbox import Inbox, Peers
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.outbox import Outbox
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Exchange", "Item", "exchanges"]


class Exchange:
    """The dealings of one stage.

    Args:
        transport: For data.
        postings: The order of this rank's receives.
        desk: The stage's desk.
        device: Where tensors of this stage live.
    """

    def __init__(self, transport: Transport, postings: Postings, desk: Desk, device: torch.device) -> None:
        self.desk = desk
        self.inbox = Inbox(desk, transport, postings, device)
        self.outbox = Outbox(desk, transport, postings, device)

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
                if producer in desk.here:
                    desk.here[producer].evaluated(item.serial, desk.stage)
                else:
                    desk.request(producer, "forward-done", item.serial, desk.stage)
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

    def forget(self, serial: int) -> None:
        """Let go of all micro-batches from a serial number on."""
        with self.desk.lock:
            for number in [number for number in self.desk.flights if number >= serial]:
                for arrival in self.desk.flights.pop(number).arrivals.values():
                    arrival.release()


def exchanges(
    mailbox: Mailbox,
    transport: Transport,
    postings: Postings,
    stages: Sequence[int],
    ranks: Sequence[int],
    device: torch.device,
) -> dict[int, Exchange]:
    """The dealings of each stage of a rank.

    Args:
        mailbox: For requests and answers.
        transport: For data.
        postings: The order of this rank's receives.
        stages: The stages of this rank.
        ranks: The rank of each stage.
        device: Where tensors of these stages live.
    """
    desks: dict[int, Desk] = {}
    for stage in stages:
        Desk(mailbox, stage, ranks, desks)
    postings.exchanges = {stage: Exchange(transport, postings, desk, device) for stage, desk in desks.items()}
    return postings.exchanges
