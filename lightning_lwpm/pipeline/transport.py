"""Tensors between ranks: receives posted ahead in the sender's order, sends that wait for nobody.

    rank 1 (stage 0)    --- activations --->    rank 0 (stage 1)        one socket a pair of ranks
                        <--- gradients -----

Both ends take the order from the same table, so that the k-th send of a pair meets its k-th receive. The main thread
waits through the mailbox, so that it hears of failures meanwhile.

Not torch's gloo: a message of a few bytes takes it 120 us of both ends' CPU time, here 17 us, and its waits cannot be
broken off.
"""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.forks import guard
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.meeting import meet
from lightning_lwpm.pipeline.sockets import within_host
from lightning_lwpm.pipeline.streams import Pending, Stream

__all__ = ["LAST_MESSAGES_SECONDS", "Receive", "Transport"]

LAST_MESSAGES_SECONDS = 3.0  # for messages under way to arrive at the end


class Receive:
    """A receive that has been posted.

    Args:
        transport: What it belongs to.
        source: The rank that sends.
        flat: Where the data goes.
    """

    def __init__(self, transport: "Transport", source: int, flat: Tensor) -> None:
        self.transport, self.source, self.flat = transport, source, flat
        self._pending: Pending | None = None
        if flat.numel():
            self._pending = Pending(_bytes(flat))
            transport.streams[source].post(self._pending)

    def wait(self, what: str | Callable[[], str]) -> Tensor:
        """The elements received, as a flat tensor; on an accelerator in the order of its current stream.

        Args:
            what: Says, for people, what is waited for.

        Raises:
            PipelineError: if any rank failed meanwhile.
        """
        if self._pending is not None:
            self.transport.mailbox.wait(self._arrived, what, self.source)
            self._pending = None
        return self.flat

    def _arrived(self, seconds: float) -> bool:
        assert self._pending is not None
        try:
            return self.transport.streams[self.source].wait(self._pending, seconds)
        except OSError as error:
            self.transport.lost(self.source, error)
            return False


class Transport:
    """Point-to-point messages of one rank; made on all ranks at once.

    Args:
        mailbox: Where failures are heard.

    Attributes:
        device: Where the tensors lie that are sent and received, but for those of the host.
        arrives: Whether this rank hears of it when data has come: then all has come that was told before.
        streams: The connection to each other rank.
    """

    device = torch.device("cpu")
    arrives = True

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.streams: dict[int, Stream] = {}
        turn = iter(range(2))
        met = meet(mailbox.rank, mailbox.world, lambda value: mailbox.gather(("meet", next(turn)), value))
        near = 1 + sum(map(within_host, met.values()))
        spin = near <= len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else False
        for peer, connection in met.items():
            self.streams[peer] = Stream(socket.socket(fileno=os.dup(connection.fileno())), str(peer), spin)
            connection.close()
        guard(self)

    def receive(self, source: int, numel: int, dtype: torch.dtype, on_host: bool = False) -> Receive:
        """Post a receive; the k-th posted for a rank gets the k-th that it sends.

        Args:
            source: The rank that sends.
            numel: Number of elements.
            dtype: Their type.
            on_host: Whether they belong into host memory, whatever the device.
        """
        return Receive(self, source, torch.empty(numel, dtype=dtype))

    def send(self, target: int, flat: Tensor) -> None:
        """Send a flat tensor without waiting; it is kept alive until it has gone, and must stay as it is."""
        self._send(target, flat)

    def _send(self, target: int, flat: Tensor, ready: Callable[[], Any] | None = None) -> None:
        """Send a flat host tensor, once ``ready`` returns on another thread."""
        if not flat.numel():
            return
        try:
            self.streams[target].send(_bytes(flat), ready)
        except OSError as error:
            self.lost(target, error)

    def lost(self, peer: int, error: OSError) -> None:
        """The connection to a rank has ended: raise why, unless that rank has come to the end of its program.

        Raises:
            LWPMError: the failure of any rank; a rank's end is one, and the word of it says more than the error.
        """
        self.mailbox.echo(peer)
        if not self.mailbox.has_left(peer):
            raise PipelineError(f"the connection to {self.mailbox.names[peer]} broke: {error}") from error

    def close(self) -> None:
        """End the connections: once all messages have gone, and after a failure at once."""
        deadline = time.monotonic() + (LAST_MESSAGES_SECONDS if self.mailbox.failure is None else 0)
        for stream in self.streams.values():
            stream.finish(deadline)
        for stream in self.streams.values():
            stream.close()

    def let_go(self) -> None:
        """In a forked child, which must not keep a dead rank's sockets open."""
        for stream in self.streams.values():
            stream.let_go()


def _bytes(flat: Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data  # every dtype travels: bool, bfloat16 and complex too
