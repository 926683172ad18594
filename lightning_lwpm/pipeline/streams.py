"""Bytes between two ranks over a socket: small messages without any hand-over between threads, large ones in others.

    send    what the system takes at once goes at once; the rest, and all after it, by a thread; also what is not
            ready yet, which the thread waits for
    post    a large message, and all before it, are read ahead by a thread; a small one stays with the system until
            somebody waits for it, who then reads it: to wake another thread takes longer than that
    wait    looks again and again for a moment before it sleeps, where each rank has a core: to be woken takes longer
            than most messages are late

Every message begins with its length: both ends know it, and notice here if they do not agree.
"""

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

__all__ = ["Pending", "Stream"]

_AHEAD_BYTES = 32 << 10
"""Messages of so many bytes are read ahead."""

_SPIN_SECONDS = 2e-4

_HEADER_BYTES = 8


class Pending:
    """A message that is to come.

    Args:
        view: Where its bytes go.

    Attributes:
        size: Number of its bytes.
        come: Whether it is there.
    """

    def __init__(self, view: memoryview) -> None:
        self.size, self.come = len(view), False
        self._header = memoryview(bytearray(_HEADER_BYTES))
        self._missing = [self._header, view]
        self._done: threading.Event | None = None  # set by the reading thread, if it is the one that reads this
        self._error: BaseException | None = None

    def read(self, connection: socket.socket, flags: int) -> None:
        """Read what is missing.

        Raises:
            BlockingIOError: With ``MSG_DONTWAIT``, if it has not all come.
            OSError: If the connection has ended, or another message comes than this one.
        """
        while not self.come:
            if len(self._missing) < 2 and (found := int.from_bytes(self._header, "little")) != self.size:
                raise OSError(f"a message of {found} bytes has come where one of {self.size} bytes was expected")
            self.come = not self._missing
            if self.come:
                break
            count = connection.recvmsg_into(self._missing, 0, flags)[0]
            if count == 0:
                raise ConnectionResetError("the other side has closed it")
            self._missing = _after(self._missing, count)


class Stream:
    """Both directions of the connection to another rank. One thread sends and waits, the owner.

    Args:
        connection: The socket.
        name: Of the other rank, for the names of threads.
        spin: Whether to look again and again for a moment before a wait sleeps.
    """

    def __init__(self, connection: socket.socket, name: str, spin: bool = False) -> None:
        self._connection, self._name = connection, name
        self._spin_seconds = _SPIN_SECONDS if spin else 0.0
        connection.setblocking(True)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._posted: deque[Pending] = deque()  # in order; the owner reads them
        self._ahead: SimpleQueue[Pending | None] = SimpleQueue()  # before all of those; the thread reads them
        self._latest: Pending | None = None  # that the thread has been given
        self._waiting: SimpleQueue[tuple[list[memoryview], Callable[[], Any]] | None] = SimpleQueue()  # to be sent
        self._queued = self._gone = 0  # messages that the sending thread was given, and has sent
        self._threads: dict[str, threading.Thread] = {}

    # -- sending -------------------------------------------------------------------------------------------------

    def send(self, view: memoryview, ready: Callable[[], Any] | None = None) -> None:
        """Send a message without waiting. Its bytes are kept, and must stay as they are, until they have gone.

        Args:
            view: The bytes.
            ready: Waits until they are there, on another thread.

        Raises:
            OSError: If the connection has ended.
        """
        rest = [memoryview(len(view).to_bytes(_HEADER_BYTES, "little")), view]
        if ready is None and self._queued == self._gone:
            with suppress(BlockingIOError):
                rest = _after(rest, self._connection.sendmsg(rest, (), socket.MSG_DONTWAIT))
            if not rest:
                return
        self._start("send", self._send_rest)
        self._queued += 1
        self._waiting.put((rest, ready or _at_once))

    def _send_rest(self) -> None:
        while (item := self._waiting.get()) is not None:
            rest, ready = item
            ready()
            while rest:
                rest = _after(rest, self._connection.sendmsg(rest))
            self._gone += 1
            del item, rest, ready  # a thread that waits holds on to no memory

    # -- receiving -----------------------------------------------------------------------------------------------

    def post(self, pending: Pending) -> None:
        """Let the next message of which nothing is known yet be this one."""
        self._posted.append(pending)
        if pending.size < _AHEAD_BYTES:
            return
        self._start("read", self._read_ahead)
        for each in self._posted:
            each._done = threading.Event()
            self._ahead.put(each)
        self._posted.clear()
        self._latest = pending

    def _read_ahead(self) -> None:
        while (pending := self._ahead.get()) is not None:
            assert pending._done is not None
            try:
                pending.read(self._connection, socket.MSG_WAITALL)
            except OSError as error:
                pending._error = error
            pending._done.set()
            del pending  # a thread that waits holds on to no memory

    def wait(self, pending: Pending, seconds: float) -> bool:
        """Wait for a message; whether it has come.

        Raises:
            OSError: If the connection has ended, or another message comes than this one.
        """
        if pending._done is not None:
            return self._finished(pending, seconds)
        if pending.come:
            return True
        if self._latest is not None:
            if not self._finished(self._latest, seconds):
                return False
            self._latest = None
        while True:
            try:
                self._posted[0].read(self._connection, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not seconds or not (self._spun() or self._poll.poll(seconds * 1000)):
                    return False
            else:
                if self._posted.popleft() is pending:
                    return True

    def _finished(self, pending: Pending, seconds: float) -> bool:
        """Wait for the thread to have read a message; whether it has."""
        done = pending._done
        assert done is not None
        if not done.is_set() and not (seconds and self._spun(done)) and not done.wait(seconds):
            return False
        if pending._error is not None:
            raise pending._error
        return True

    def _spun(self, done: threading.Event | None = None) -> bool:
        """Look for a moment whether the thread is done, or else whether there is something to read."""
        end = time.perf_counter() + self._spin_seconds
        while time.perf_counter() < end:
            readable = self._poll.poll(0)  # which lets other threads run
            if readable if done is None else done.is_set():
                return True
            os.sched_yield()
        return False

    # -- the end -------------------------------------------------------------------------------------------------

    def finish(self, deadline: float) -> None:
        """Begin no more, and let what is under way go until a time (``time.monotonic()``)."""
        self._waiting.put(None)
        self._ahead.put(None)
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End all waits, and the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads.values():
            thread.join()
        self._connection.close()

    def let_go(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._connection.close()

    def _start(self, what: str, work: Callable[[], Any]) -> None:
        if what not in self._threads:
            self._threads[what] = threading.Thread(
                target=_quietly, args=(work,), name=f"lwpm-{what}-{self._name}", daemon=True
            )
            self._threads[what].start()


def _at_once() -> None:
    """What is there need not be waited for."""


def _quietly(work: Callable[[], Any]) -> None:
    with suppress(OSError):  # the connection has ended: the mailbox finds out why
        work()


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of some bytes after the first ``count``."""
    while views and count >= len(views[0]):
        count -= len(views[0])
        views = views[1:]
    return [views[0][count:], *views[1:]] if count else views
