"""Connections between ranks for engines that run without Lightning."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport

__all__ = ["Line", "connected"]


class Line:
    """The connections of the first ``stages`` ranks, over which several engines run one after another.

    Args:
        rank: This rank.
        stages: Number of ranks that are connected.
    """

    def __init__(self, rank: int, stages: int) -> None:
        members = dist.new_group(list(range(stages)))
        self.rank, self.stages, self.serial, self.turn = rank, stages, 0, 0
        if rank >= stages:
            return

        def gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * stages
            dist.all_gather_object(values, value, group=members)
            return values

        self.mailbox = Mailbox(rank, stages, gather, patience=600)
        self.transport = Transport(self.mailbox)

    def gather(self, value: Any = None) -> list[Any]:
        """The value of every rank, on every rank; also a barrier."""
        self.turn += 1
        return self.mailbox.gather(("benchmark", self.turn), value)

    def share(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        self.turn += 1
        return self.mailbox.broadcast(("benchmark", self.turn), value)

    def close(self) -> None:
        """End the connections."""
        if self.rank < self.stages:
            self.gather()
            self.transport.close()
            self.mailbox.close()


def connected(rank: int, world: int, sizes: Iterable[int]) -> dict[int, Line]:
    """The connections for each number of stages; ``world`` is the largest."""
    dist.init_process_group("gloo", rank=rank, world_size=world)
    return {stages: Line(rank, stages) for stages in sorted(sizes)}
