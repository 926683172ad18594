"""Messages between ranks beside the data: requests, decisions, batches, failures; every wait on them can be broken.

    rank 0 ----- rank 1          one socket a pair, one reading thread a socket. A message has a kind and a key.
       \\          /              Requests ("?kind") go to their handler on a thread of its own; all others are kept
        \\        /               until somebody takes them. A closed socket without a farewell is a death, and a
          rank 2                 failure posted by one rank is raised by all, with the same words.

The main thread never waits anywhere but here, so it always hears of a failure at once. Where the user's code keeps it
from listening, the process is ended after a grace period.
"""

import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from typing import Any

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.pipeline.forks import guard
from lightning_lwpm.pipeline.packing import packed
from lightning_lwpm.pipeline.sockets import keep_alive, own_address, shut
from lightning_lwpm.pipeline.watch import explained

__all__ = ["Mailbox"]

_GRACE_SECONDS = 8.0  # for a rank to notice a failure by itself before its process is ended
_POLL_SECONDS = 0.25
_ECHO_SECONDS = 3.0  # for the word of why a connection broke to arrive after the break itself
_LAST_WORDS_SECONDS = 1.0  # at the end, for the others to read what was sent, and to close too
_MEETING_SECONDS = 60.0  # for all ranks to connect, once all have said that they are there


class Mailbox:
    """The control connections of one rank to all others.

    Args:
        rank: This rank.
        world: Number of ranks.
        gather: Collects one small object from every rank, in rank order (used once, to meet).
        patience: A wait longer than this many seconds is explained on standard error: who waits for what from whom.
        label: What this rank calls itself in messages.

    Attributes:
        failure: What every rank raises since one of them failed.
        resting: Whether no run is under way: then the end of another rank is no reason to end this process.
        waited: Seconds that the owner, the thread that made this mailbox, has spent waiting in it so far.
        waits: If it is a list, every such wait is added to it: what was waited for, its begin and its end
            (``time.perf_counter()``, seconds).
    """

    def __init__(
        self, rank: int, world: int, gather: Callable[[Any], list[Any]], patience: float = 30.0, label: str = ""
    ) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self.label = label or f"rank {rank}"
        self.names = [f"rank {r}" for r in range(world)]
        self.failure: str | None = None
        self.resting = False
        self.waited = 0.0
        self.waits: list[tuple[str, float, float]] | None = None
        self._raised: type[LWPMError] = PipelineError
        self._noticed = threading.Event()
        self._telling = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._owner = threading.get_ident()  # the thread that must notice a failure
        self._condition = threading.Condition()
        self._letters: dict[tuple[str, Any], deque[Any]] = defaultdict(deque)
        self._handlers: dict[str, Callable[[int, Any, Any], None]] = {}
        self._unhandled: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
        # not on the reading threads: an answer may block until the peer reads, and so may the peer's
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._peers: dict[int, Connection] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._farewells: set[int] = set()
        self._gone: set[int] = set()
        self._closing = False
        if world > 1:
            self._connect(gather)

    # -- sending and taking --------------------------------------------------------------------------------------

    def post(self, target: int, kind: str, key: Any, payload: Any = None) -> None:
        """Send a message; does not wait for it to be taken. One to a rank that has said farewell is lost."""
        if target == self.rank:
            self._deliver(self.rank, kind, key, payload)
        else:
            self._send(target, packed((kind, key, payload)))

    def post_all(self, kind: str, key: Any, payload: Any = None) -> None:
        """Send a message to every other rank."""
        data = packed((kind, key, payload)) if self.world > 1 else b""
        for target in self._peers:
            self._send(target, data)

    def take(self, kind: str, key: Any, what: str, source: int | None = None) -> Any:
        """Wait for a message and remove it.

        Args:
            kind: Its kind.
            key: Its key.
            what: Says, for people, what is waited for from whom.
            source: The rank that it comes from: waiting for one that has left is an error. If ``None``, any other rank.
        """
        letters = self._letters
        with self._condition:
            if not letters.get((kind, key)):
                with self._waiting(what):
                    while not letters.get((kind, key)):
                        self.check()
                        if self._has_left(source):
                            break
                        self._condition.wait(_POLL_SECONDS)
            if box := letters.get((kind, key)):
                payload = box.popleft()
                if not box:
                    del letters[kind, key]
                return payload
        raise self._left(source, what)

    def handle(self, kind: str, handler: Callable[[int, Any, Any], None]) -> None:
        """Let ``handler(source, key, payload)`` answer every request of a kind ("?..."), also those come already."""
        with self._condition:
            self._handlers[kind] = handler
            for message in self._unhandled.pop(kind, []):
                self._requests.put((kind, *message))

    def wait(self, event: threading.Event, what: str, source: int | None = None) -> None:
        """Wait for an event that another thread sets, breaking off at a failure; see :meth:`take`."""
        if event.is_set():
            return
        with self._waiting(what):
            while not event.wait(_POLL_SECONDS):
                self.check()
                if self._has_left(source) and not event.wait(_POLL_SECONDS):
                    raise self._left(source, what)

    # -- all together --------------------------------------------------------------------------------------------

    def gather(self, key: Any, value: Any, what: str = "all ranks") -> list[Any]:
        """Every rank gives a value and gets all of them, in rank order; also a barrier."""
        if self.world == 1:
            return [value]
        if self.rank == 0:
            others = range(1, self.world)
            values = [value] + [self.take("gather", (key, r), f"{what}: {self.names[r]}", r) for r in others]
            self.post_all("gathered", key, values)
            return values
        self.post(0, "gather", (key, self.rank), value)
        return list(self.take("gathered", key, f"{what}: {self.names[0]}, which waits for all others", 0))

    def broadcast(self, key: Any, value: Any, source: int = 0, what: str = "a value") -> Any:
        """The value of rank ``source``, on every rank."""
        if self.world == 1:
            return value
        if self.rank == source:
            self.post_all("broadcast", key, value)
            return value
        return self.take("broadcast", key, f"{what} of {self.names[source]}", source)

    # -- failure -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the failure of any rank.

        Raises:
            LWPMError: with the same words on every rank.
        """
        if self.failure is not None:
            self._notice()
            raise self._raised(self.failure)

    def echo(self, source: int) -> None:
        """After a broken connection to a rank: give the word of why it ended time to arrive, and raise it.

        Raises:
            LWPMError: the failure of any rank.
        """
        deadline = time.monotonic() + _ECHO_SECONDS
        with self._condition:
            while self.failure is None and source not in self._gone and time.monotonic() < deadline:
                self._condition.wait(_POLL_SECONDS)
        self.check()

    def failed(self, what: str, error: BaseException) -> LWPMError:
        """Tell all ranks of an exception of this one, unless it is the failure of another that was heard here.

        Args:
            what: What failed, such as "forward of micro-batch 3"; "" if nothing is known but the exception.
            error: The exception.

        Returns:
            What to raise: the same words on every rank.
        """
        self._notice()
        if self.failure is None:
            where = f"{self.label} failed in {what}" if what else f"{self.label} failed"
            if isinstance(error, ConfigurationError):
                self.fail(f"{where}: {error}", ConfigurationError)
            else:
                kind = "" if isinstance(error, LWPMError) else f"{type(error).__name__}: "
                trace = "".join(traceback.format_exception(error)).rstrip()
                self.fail(f"{where}: {kind}{error}\n\nOn {self.label}:\n{trace}")
        return self._raised(self.failure)

    def fail(self, message: str, raised: type[LWPMError] = PipelineError) -> None:
        """Tell every rank that this one cannot go on. The first failure is the one that counts.

        Args:
            message: What every rank raises.
            raised: The type of what is raised.
        """
        with self._telling:
            if not self._heard(message, raised):
                return
            data = packed(("failure", raised.__name__, message))
            for target in self._peers:
                with suppress(OSError, ValueError), self._locks[target]:
                    self._peers[target].send_bytes(data)

    def explained(self, what: str) -> AbstractContextManager[None]:
        """Say on standard error who waits for what if the block lasts."""
        return explained(self.label, self.patience, what)

    def introduce(self, ranks: Sequence[int]) -> None:
        """Call each rank by its stage from now on.

        Args:
            ranks: The rank of each stage.
        """
        self.names = [f"rank {r}" for r in range(self.world)]
        for stage, rank in enumerate(ranks):
            self.names[rank] = f"stage {stage} (rank {rank})"
        self.label = self.names[self.rank]

    def close(self) -> None:
        """Say farewell, and end all threads: see [Note: the end of the interpreter] in ``transport``."""
        with self._telling:  # a failure that another thread is about to tell goes before the farewell
            if self._closing:
                return
            self._closing = True
        self._requests.put(None)
        self._shut(socket.SHUT_WR, packed(("farewell", None, None)))
        # reading on meanwhile: what arrives at a closed connection resets it, and what it still carried is lost
        self._join(_LAST_WORDS_SECONDS)
        self._shut(socket.SHUT_RD)
        self._join(_ECHO_SECONDS)

    def let_go(self) -> None:
        """In a forked child, which must not keep a dead rank's sockets open: close them, and send nothing."""
        self._closing = True
        for connection in self._peers.values():
            with suppress(OSError):
                connection.close()

    def _shut(self, how: int, last: bytes = b"") -> None:
        for target, connection in self._peers.items():
            with suppress(OSError, ValueError), self._locks[target]:
                if last:
                    connection.send_bytes(last)
                shut(connection, how)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Count the wait, if it is one of the owner, and say so if it lasts."""
        begin = time.perf_counter()
        try:
            with self.explained(what):
                yield
        finally:
            if threading.get_ident() == self._owner:
                end = time.perf_counter()
                self.waited += end - begin
                if self.waits is not None:
                    self.waits.append((what, begin, end))

    # -- inside --------------------------------------------------------------------------------------------------

    def _connect(self, gather: Callable[[Any], list[Any]]) -> None:
        secret = gather(os.urandom(32))[0]  # one key for all, made by rank 0
        listener = Listener(("", 0), backlog=self.world, authkey=secret)
        cards = gather((own_address(), listener.address[1], socket.gethostname()))
        for target in range(self.rank):
            address, port, host = cards[target]
            connection = Client(("127.0.0.1" if host == socket.gethostname() else address, port), authkey=secret)
            connection.send_bytes(packed(self.rank))
            self._peers[target] = connection  # type: ignore[assignment]
        # private: there is no other way to bound the wait for a rank that died on its way here
        listener._listener._socket.settimeout(_MEETING_SECONDS)  # type: ignore[attr-defined]
        for _ in range(self.rank + 1, self.world):
            try:
                connection = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(self.rank + 1, self.world)) - set(self._peers))
                raise PipelineError(
                    f"{self.label} has waited {_MEETING_SECONDS:.0f} s for a connection from rank(s) {missing}: see "
                    "what they wrote last, and whether the hosts can reach each other on any port"
                ) from None
            self._peers[pickle.loads(connection.recv_bytes())] = connection  # type: ignore[assignment]
        listener.close()
        guard(self)
        for target, connection in self._peers.items():
            keep_alive(connection)
            self._locks[target] = threading.Lock()
            name = f"lwpm-mailbox-{target}"
            self._threads.append(threading.Thread(target=self._read, args=(target, connection), name=name, daemon=True))
        self._threads.append(threading.Thread(target=self._serve, name="lwpm-mailbox-answers", daemon=True))
        for thread in self._threads:
            thread.start()

    def _send(self, target: int, data: bytes) -> None:
        if target in self._farewells or self._closing:
            return
        try:
            with self._locks[target]:
                self._peers[target].send_bytes(data)
        except (OSError, ValueError):
            # the reading thread is about to find out whether this was a death or a farewell
            deadline = time.monotonic() + _ECHO_SECONDS
            while target not in self._gone and time.monotonic() < deadline:
                time.sleep(0.01)
            if target not in self._farewells and not self._closing:
                self._lost(target)
            self.check()

    def _read(self, source: int, connection: Connection) -> None:
        while True:
            try:
                data = connection.recv_bytes()
            except (EOFError, OSError):
                break
            try:
                kind, key, payload = pickle.loads(data)
            except Exception as error:
                self.failed(f"reading a message of {self.names[source]}", error)
                continue
            if kind == "farewell":
                with self._condition:
                    self._farewells.add(source)
                    self._condition.notify_all()
                continue
            self._deliver(source, kind, key, payload)
            del data, payload
        if source not in self._farewells and not self._closing:
            self._lost(source)
        with self._condition:
            self._gone.add(source)
            self._condition.notify_all()
        if self._closing:
            with self._locks[source]:
                connection.close()

    def _deliver(self, source: int, kind: str, key: Any, payload: Any) -> None:
        if kind == "failure":
            self._heard(payload, ConfigurationError if key == "ConfigurationError" else PipelineError)
            return
        with self._condition:
            if not kind.startswith("?"):
                self._letters[kind, key].append(payload)
                self._condition.notify_all()
            elif kind in self._handlers:
                self._requests.put((kind, source, key, payload))
            else:
                self._unhandled[kind].append((source, key, payload))

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            kind, source, key, payload = request
            try:
                self._handlers[kind](source, key, payload)
            except Exception as error:
                self.failed(f"answering '{kind}' of {self.names[source]}", error)
            del request, key, payload  # a thread that waits holds on to no tensor

    def _has_left(self, source: int | None) -> bool:
        """Whether nothing can come from a rank, or with ``None`` from any other, because it has ended its program."""
        return bool(self._farewells) and (
            self._farewells >= set(self._peers) if source is None else source in self._farewells
        )

    def _left(self, source: int | None, what: str) -> LWPMError:
        who = self.names[source] if source is not None else "every other rank"
        self.fail(
            f"{self.label} waits for {what}, but {who} has come to the end of its program: the ranks have taken "
            "different paths. Call `fit`, `validate`, `test`, `predict` and `save_checkpoint` on every rank alike, not "
            "under a condition such as `if trainer.is_global_zero`, and catch no exception around them on some ranks."
        )
        return self._raised(self.failure)

    def _lost(self, source: int) -> None:
        message = (
            f"{self.names[source]} died without a word: its process was killed (out of memory?), crashed, or called "
            "`os._exit`"
        )
        if self._heard(message) and not self.resting:
            # at once: Lightning kills the main process as soon as it sees that a child has died
            print(f"[lwpm] {self.label}: {message}", file=sys.stderr, flush=True)

    def _heard(self, message: str, raised: type[LWPMError] = PipelineError) -> bool:
        """Note a failure; ``False`` if it is not the first."""
        with self._condition:
            if self.failure is not None:
                return False
            self.failure, self._raised = message, raised
            self._condition.notify_all()
        self._notice()
        threading.Thread(target=self._insist, name="lwpm-insist", daemon=True).start()
        return True

    def _notice(self) -> None:
        """The main thread, if it is here now, knows of the failure."""
        if threading.get_ident() == self._owner:
            self._noticed.set()

    def _insist(self) -> None:
        """End this process if its main thread is stuck where it cannot hear (a foreign collective, an endless loop)."""
        if not self._noticed.wait(_GRACE_SECONDS) and not self._closing and not self.resting:
            stuck = (
                f"[lwpm] {self.label}: the main thread has not listened for {_GRACE_SECONDS:.0f} s; ending the process"
            )
            print(f"{stuck}: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)
