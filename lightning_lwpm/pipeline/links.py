"""The control connections of one rank: a socket and a reading thread for each other rank.

A connection that ends without a farewell (an empty message) is a death.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from lightning_lwpm.pipeline.forks import guard
from lightning_lwpm.pipeline.sockets import shut, within_host

__all__ = ["Links"]

_END_SECONDS = 3.0  # for a thread to end once it can
_LAST_WORDS_SECONDS = 1.0  # at the end, for the others to read what was sent, and to close too
_FAREWELL = b""


class Links:
    """Sends bytes to other ranks, and hands over what comes from them.

    Args:
        peers: The connection to each other rank.
        changed: Notified when a rank leaves.
        deliver: Called as ``deliver(source, data)`` with each message, on the reading thread of its source.
        lost: Called with a rank that has died.

    Attributes:
        farewells: Ranks that have come to the end of their program.
        gone: Ranks from which nothing more comes.
        closing: Whether this rank is at its end.
        near: Ranks that are known to be on this host.
    """

    def __init__(
        self,
        peers: dict[int, Connection],
        changed: threading.Condition,
        deliver: Callable[[int, bytes], None],
        lost: Callable[[int], None],
    ) -> None:
        self.peers = peers
        self.farewells: set[int] = set()
        self.gone: set[int] = set()
        self.closing = False
        self.near = {peer for peer, connection in peers.items() if within_host(connection)}
        self._changed, self._deliver, self._lost = changed, deliver, lost
        self._locks = {peer: threading.Lock() for peer in peers}
        self._threads = [
            threading.Thread(target=self._read, args=item, name=f"lwpm-mailbox-{item[0]}", daemon=True)
            for item in peers.items()
        ]
        if peers:
            guard(self)

    def start(self) -> None:
        """Begin to read."""
        for thread in self._threads:
            thread.start()

    def send(self, target: int, data: bytes) -> bool:
        """Send a message; one to a rank that has said farewell, or from a rank at its end, is lost.

        Returns:
            ``False`` if the connection is broken; ``lost`` has been called if that was a death.
        """
        if target in self.farewells or self.closing:
            return True
        try:
            with self._locks[target]:
                self.peers[target].send_bytes(data)
        except (OSError, ValueError):
            # the reading thread is about to find out whether this was a death or a farewell
            deadline = time.monotonic() + _END_SECONDS
            while target not in self.gone and time.monotonic() < deadline:
                time.sleep(0.01)
            if target not in self.farewells and not self.closing:
                self._lost(target)
            return False
        return True

    def send_anyway(self, data: bytes) -> None:
        """Send a message to all that can still be reached."""
        for target, connection in self.peers.items():
            with suppress(OSError, ValueError), self._locks[target]:
                connection.send_bytes(data)

    def close(self) -> None:
        """Say farewell, and end all threads: none may come back to an interpreter that is being taken down."""
        self.closing = True
        self.send_anyway(_FAREWELL)
        self._shut(socket.SHUT_WR)
        # reading on meanwhile: what arrives at a closed connection resets it, and what it still carried is lost
        self._join(_LAST_WORDS_SECONDS)
        self._shut(socket.SHUT_RD)
        self._join(_END_SECONDS)

    def let_go(self) -> None:
        """In a forked child, which must not keep a dead rank's sockets open: close them, and send nothing."""
        self.closing = True
        for connection in self.peers.values():
            with suppress(OSError):
                connection.close()

    def _shut(self, how: int) -> None:
        for target, connection in self.peers.items():
            with suppress(OSError, ValueError), self._locks[target]:
                shut(connection, how)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _read(self, source: int, connection: Connection) -> None:
        while True:
            try:
                data = connection.recv_bytes()
            except (EOFError, OSError):
                break
            if data == _FAREWELL:
                with self._changed:
                    self.farewells.add(source)
                    self._changed.notify_all()
            else:
                self._deliver(source, data)
            del data
        if source not in self.farewells and not self.closing:
            self._lost(source)
        with self._changed:
            self.gone.add(source)
            self._changed.notify_all()
        if self.closing:
            with self._locks[source]:
                connection.close()
