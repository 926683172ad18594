"""Tensors between ranks: receives posted ahead in the sender's order, sends reaped lazily, one group per direction.

    rank 1 (stage 0)    --- down: activations --->    rank 0 (stage 1)
                        <---- up: gradients ------

A pending receive holds up only its own direction. Both ends take the order from the same table, so that the k-th send
of a pair meets its k-th receive, as NCCL demands. Waiting in the process group cannot be broken off (not even by
aborting the group), so threads wait there, and the main thread waits for the threads through the mailbox.

[Note: the end of the interpreter] A thread that comes back from C++ while Python finalises is unwound, and that aborts
the process. So no thread may wait there then: at the end the group's connections are shut, which ends all waits.
"""

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["Receive", "Transport"]

_LAST_MESSAGES_SECONDS = 3.0  # for messages under way to arrive at the end


class Receive:
    """A receive that has been posted."""

    def __init__(self, mailbox: Mailbox, source: int, flat: Tensor) -> None:
        self.mailbox, self.source, self.flat, self.done = mailbox, source, flat, threading.Event()
        self.error: BaseException | None = None

    def wait(self, what: str) -> Tensor:
        """The bytes received, as a flat tensor on the host.

        Raises:
            PipelineError: if any rank failed meanwhile.
        """
        self.mailbox.wait(self.done, what, self.source)
        if self.error is not None:
            raise _broken(self.mailbox, self.source, f"was to bring {what}", self.error) from self.error
        return self.flat


class Transport:
    """Point-to-point messages of one rank.

    Args:
        mailbox: Where failures are heard.
        groups: The process group of each direction, the same on all ranks; made here if not given.
    """

    def __init__(self, mailbox: Mailbox, groups: dict[str, Any] | None = None) -> None:
        before = _sockets()
        self.mailbox = mailbox
        self.groups = groups or {direction: dist.new_group(backend="gloo") for direction in ("down", "up")}
        self._connections = _sockets() - before
        self._receives: dict[tuple[str, int], SimpleQueue[Any]] = {}
        self._sends: SimpleQueue[Any] | None = None
        self._threads: list[threading.Thread] = []

    def receive(self, direction: str, source: int, numel: int, dtype: torch.dtype) -> Receive:
        """Post a receive; the k-th posted for a pair and direction gets the k-th sent."""
        flat = torch.empty(numel, dtype=dtype)
        receive = Receive(self.mailbox, source, flat)
        if numel == 0:
            receive.done.set()
            return receive
        work = self._begin(dist.irecv, flat, source, direction)
        key = (direction, source)
        if key not in self._receives:
            self._receives[key] = self._start(f"lwpm-{direction}-{source}")
        self._receives[key].put((work, receive))
        return receive

    def send(self, direction: str, target: int, flat: Tensor) -> None:
        """Send a flat host tensor without waiting; it is kept alive until it has gone."""
        if flat.numel() == 0:
            return
        work = self._begin(dist.isend, flat, target, direction)
        if self._sends is None:
            self._sends = self._start("lwpm-reaper")
        self._sends.put((work, flat))

    def _begin(self, begin: Callable[..., Any], flat: Tensor, peer: int, direction: str) -> Any:
        try:
            return begin(_bytes(flat), peer, group=self.groups[direction])
        except RuntimeError as error:
            raise _broken(self.mailbox, peer, f"was to carry a tensor {direction}", error) from error

    def close(self) -> None:
        """End the waiting threads: once all messages have gone, and after a failure at once."""
        for queue in [*self._receives.values(), *([self._sends] if self._sends else [])]:
            queue.put(None)
        if self.mailbox.failure is None:
            self._join(_LAST_MESSAGES_SECONDS)
        if any(thread.is_alive() for thread in self._threads):
            for number, _ in self._connections & _sockets():
                with socket.socket(fileno=os.dup(number)) as view, suppress(OSError):
                    if not view.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo's listener must live on
                        view.shutdown(socket.SHUT_RDWR)
            self._join(_LAST_MESSAGES_SECONDS)
        self._threads = []

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, name: str) -> "SimpleQueue[Any]":
        queue: SimpleQueue[Any] = SimpleQueue()
        thread = threading.Thread(target=_wait_for, args=(queue,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return queue


def _broken(mailbox: Mailbox, peer: int, what: str, error: BaseException) -> PipelineError:
    """A connection breaks when a rank ends: its failure is on the way, and says more."""
    mailbox.echo(peer)
    return PipelineError(f"the connection to {mailbox.names[peer]} broke, which {what}: {error}")


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)  # every dtype travels: bool, bfloat16 and complex too


def _sockets() -> set[tuple[int, int]]:
    """Number and inode of each socket of this process; none where the system does not tell."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode):
                    found.add((int(name), status.st_ino))
    return found


def _wait_for(queue: "SimpleQueue[Any]") -> None:
    while (item := queue.get()) is not None:
        work, holder = item
        try:
            work.wait()
        except Exception as error:
            if isinstance(holder, Receive):
                holder.error = error
        if isinstance(holder, Receive):
            holder.done.set()
        del item, work, holder
