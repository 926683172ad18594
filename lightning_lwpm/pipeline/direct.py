"""Tensors straight from device to device by ``torch.distributed`` (NCCL); the host hears nothing of their arrival.

::

    rank 0   --- group "down" --->   rank 1         of each pair of ranks, one communicator and stream a direction:
             <--- group "up" -----                  a receive that waits for its data holds up no send

NCCL matches messages of a pair and direction by order, as the sockets do. Communicators are made by their first
message, for which both ranks must be there: so each pair exchanges one before training, in the same order everywhere.
"""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import LAST_MESSAGES_SECONDS, Receive, Transport

__all__ = ["OWN_GROUPS", "Direct"]

OWN_GROUPS = "lwpm"
"""What the library's process groups are described by."""


class Direct(Transport):
    """Point-to-point messages between devices; made on all ranks at once, where ``torch.distributed`` is initialised.

    Tensors that live on the host beside an accelerator go over sockets.

    Args:
        mailbox: Where failures are heard.
        device: The device of this rank, used by no other one; also the current one of its type.
        backend: Of the process groups. With ``"gloo"``, which is for tests on a CPU, waits cannot be broken off.
        timeout: After which NCCL ends the process if an operation has not finished.
    """

    arrives = False

    def __init__(
        self,
        mailbox: Mailbox,
        device: torch.device,
        backend: str = "nccl",
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(mailbox)
        self.device = device
        self._groups = [dist.new_group(backend=backend, timeout=timeout, group_desc=OWN_GROUPS) for _ in ("down", "up")]
        self._sends: deque[tuple[Any, Tensor]] = deque()  # under way
        mailbox.at_failure(self._abort)
        self._warm_up()

    @override
    def receive(self, source: int, numel: int, dtype: torch.dtype, on_host: bool = False) -> Receive:
        if on_host and self.device.type != "cpu":
            return super().receive(source, numel, dtype)
        return _Coming(self, source, torch.empty(numel, dtype=dtype, device=self.device))

    @override
    def send(self, target: int, flat: Tensor) -> None:
        if flat.device.type != self.device.type:
            super().send(target, flat)
        elif flat.numel():
            self.mailbox.check()
            while self._sends and self._sends[0][0].is_completed():
                self._sends.popleft()
            work = dist.isend(flat.view(torch.uint8), target, group=self.group(self.mailbox.rank, target))
            self._sends.append((work, flat))

    def group(self, source: int, target: int) -> dist.ProcessGroup:
        """The process group of a direction."""
        return self._groups[source > target]

    def _warm_up(self) -> None:
        """Exchange a byte with each other rank and in each direction; in each round every rank has one partner."""
        rank, world = self.mailbox.rank, self.mailbox.world
        for turn in range(world):
            peer = (turn - rank) % world
            for source, target in ((min(rank, peer), max(rank, peer)), (max(rank, peer), min(rank, peer))):
                if source == target:
                    continue
                byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
                if rank == source:
                    dist.send(byte, target, group=self.group(source, target))
                else:
                    dist.recv(byte, source, group=self.group(source, target))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _abort(self) -> None:
        """Free the device of what waits for data that never comes; whoever waits for the device can then go on."""
        for group in self._groups:
            group.abort()

    @override
    def close(self) -> None:
        """End the connections: once all messages have gone, and after a failure at once."""
        if self.mailbox.failure is None:
            deadline = time.monotonic() + LAST_MESSAGES_SECONDS
            while not all(work.is_completed() for work, _ in self._sends) and time.monotonic() < deadline:
                time.sleep(0.01)
            if dist.is_initialized():
                for group in self._groups:
                    dist.destroy_process_group(group)
        super().close()


class _Coming(Receive):
    """A receive that the device waits for."""

    def __init__(self, transport: Direct, source: int, flat: Tensor) -> None:
        self.transport, self.source, self.flat = transport, source, flat
        self._work: Any = None
        if flat.numel():
            group = transport.group(source, transport.mailbox.rank)
            self._work = dist.irecv(flat.view(torch.uint8), source, group=group)

    @override
    def wait(self, what: str | Callable[[], str]) -> Tensor:
        self.transport.mailbox.check()
        if self._work is not None:
            self._work.wait()  # with NCCL only the current stream waits
            self._work = None
        return self.flat
