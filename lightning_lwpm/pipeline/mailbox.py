"""Messages between ranks beside the data: requests, decisions, batches, failures; every wait on them can be broken.

    rank 0 ----- rank 1          one socket a pair, one reading thread a socket. A message has a kind and a key.
       \\          /              Requests ("?kind") go to their handler on a thread of its own; all others are kept
        \\        /               until somebody takes them. A closed socket without a farewell is a death, and a
          rank 2                 failure posted by one rank is raised by all, with the same words.

The main thread never waits anywhere but here, so it always hears of a failure at once.
"""

import io
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import PipelineError

__all__ = ["Mailbox"]

_GRACE_SECONDS = 8.0  # for a rank to notice a failure by itself before its process is ended
_POLL_SECONDS = 0.25


class Mailbox:
    """The control connections of one rank to all others.

    Args:
        rank: This rank.
        world: Number of ranks.
        gather: Collects one small object from every rank, in rank order (used once, to meet).
        patience: A wait longer than this many seconds is explained on standard error: who waits for what from whom.
        label: What this rank calls itself in messages.
    """

    def __init__(
        self, rank: int, world: int, gather: Callable[[Any], list[Any]], patience: float = 30.0, label: str = ""
    ) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self.label = label or f"rank {rank}"
        self.failure: str | None = None
        self._noticed = threading.Event()
        self._condition = threading.Condition()
        self._letters: dict[tuple[str, Any], deque[Any]] = defaultdict(deque)
        self._handlers: dict[str, Callable[[int, Any, Any], None]] = {}
        self._unhandled: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
        # not on the reading threads: an answer may block until the peer reads, and so may the peer's
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._peers: dict[int, Connection] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._farewells: set[int] = set()
        self._closing = False
        if world > 1:
            self._connect(gather)

    # -- sending and taking --------------------------------------------------------------------------------------

    def post(self, target: int, kind: str, key: Any, payload: Any = None) -> None:
        """Send a message; does not wait for it to be taken."""
        if target == self.rank:
            self._deliver(self.rank, kind, key, payload)
            return
        data = _dumps((kind, key, payload))
        try:
            with self._locks[target]:
                self._peers[target].send_bytes(data)
        except (OSError, ValueError) as error:
            self.check()
            if not self._closing:
                self._lost(target, error)
                self.check()

    def post_all(self, kind: str, key: Any, payload: Any = None) -> None:
        """Send a message to every other rank."""
        for target in range(self.world):
            if target != self.rank:
                self.post(target, kind, key, payload)

    def take(self, kind: str, key: Any, what: str) -> Any:
        """Wait for a message and remove it. ``what`` says, for people, what is waited for from whom."""
        letters = self._letters
        with self.explained(what), self._condition:
            while not letters.get((kind, key)):
                self.check()
                self._condition.wait(_POLL_SECONDS)
            box = letters[kind, key]
            payload = box.popleft()
            if not box:
                del letters[kind, key]
            return payload

    def handle(self, kind: str, handler: Callable[[int, Any, Any], None]) -> None:
        """Let ``handler(source, key, payload)`` answer every request of a kind ("?..."), also those come already."""
        with self._condition:
            self._handlers[kind] = handler
            for message in self._unhandled.pop(kind, []):
                self._requests.put((kind, *message))

    def wait(self, event: threading.Event, what: str) -> None:
        """Wait for an event that another thread sets, breaking off at a failure."""
        if event.is_set():
            return
        with self.explained(what):
            while not event.wait(_POLL_SECONDS):
                self.check()

    # -- all together --------------------------------------------------------------------------------------------

    def gather(self, key: Any, value: Any, what: str = "all ranks") -> list[Any]:
        """Every rank gives a value and gets all of them, in rank order; also a barrier."""
        if self.world == 1:
            return [value]
        if self.rank == 0:
            values = [value] + [self.take("gather", (key, r), f"{what}: rank {r}") for r in range(1, self.world)]
            self.post_all("gathered", key, values)
            return values
        self.post(0, "gather", (key, self.rank), value)
        return list(self.take("gathered", key, f"{what}: rank 0 and all others"))

    def broadcast(self, key: Any, value: Any, source: int = 0, what: str = "a value") -> Any:
        """The value of rank ``source``, on every rank."""
        if self.world == 1:
            return value
        if self.rank == source:
            self.post_all("broadcast", key, value)
            return value
        return self.take("broadcast", key, f"{what} of rank {source}")

    # -- failure -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the failure of any rank.

        Raises:
            PipelineError: with the same words on every rank.
        """
        if self.failure is not None:
            self._noticed.set()
            raise PipelineError(self.failure)

    def fail(self, message: str) -> None:
        """Tell every rank that this one cannot go on. The first failure is the one that counts."""
        with self._condition:
            if self.failure is not None:
                return
            self.failure = message
            self._condition.notify_all()
        self._noticed.set()
        for target in range(self.world):
            if target != self.rank and target in self._peers:
                try:
                    with self._locks[target]:
                        self._peers[target].send_bytes(_dumps(("failure", None, message)))
                except (OSError, ValueError):
                    continue

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Say on standard error who waits for what if the block lasts."""
        timer = None
        if self.patience > 0:
            timer = _Explainer(self, what)
            _explainers.append(timer)
        try:
            yield
        finally:
            if timer is not None:
                timer.done = True

    def close(self) -> None:
        """Say farewell and close all connections."""
        self._closing = True
        self._requests.put(None)
        for target, connection in self._peers.items():
            try:
                with self._locks[target]:
                    connection.send_bytes(_dumps(("farewell", None, None)))
            except (OSError, ValueError):
                continue

    # -- inside --------------------------------------------------------------------------------------------------

    def _connect(self, gather: Callable[[Any], list[Any]]) -> None:
        secret = gather(os.urandom(32))[0]  # one key for all, made by rank 0
        listener = Listener(("", 0), backlog=self.world, authkey=secret)
        cards = gather((_own_address(), listener.address[1], socket.gethostname()))
        for target in range(self.rank):
            address, port, host = cards[target]
            connection = Client(("127.0.0.1" if host == socket.gethostname() else address, port), authkey=secret)
            connection.send_bytes(_dumps(self.rank))
            self._peers[target] = connection  # type: ignore[assignment]
        for _ in range(self.rank + 1, self.world):
            connection = listener.accept()
            self._peers[pickle.loads(connection.recv_bytes())] = connection  # type: ignore[assignment]
        listener.close()
        for target, connection in self._peers.items():
            self._locks[target] = threading.Lock()
            name = f"lwpm-mailbox-{target}"
            threading.Thread(target=self._read, args=(target, connection), name=name, daemon=True).start()
        threading.Thread(target=self._serve, name="lwpm-mailbox-answers", daemon=True).start()

    def _read(self, source: int, connection: Connection) -> None:
        while True:
            try:
                kind, key, payload = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError) as error:
                if source not in self._farewells and not self._closing:
                    self._lost(source, error)
                return
            if kind == "farewell":
                self._farewells.add(source)
                continue
            self._deliver(source, kind, key, payload)

    def _deliver(self, source: int, kind: str, key: Any, payload: Any) -> None:
        if kind == "failure":
            self._heard(payload)
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
            except PipelineError:
                continue
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                self.fail(f"{self.label} could not answer '{kind}' of rank {source}:\n{text}")

    def _lost(self, source: int, error: BaseException) -> None:
        self._heard(f"rank {source} died without a word (its connection to {self.label} closed)")

    def _heard(self, message: str) -> None:
        with self._condition:
            if self.failure is not None:
                return
            self.failure = message
            self._condition.notify_all()
        threading.Thread(target=self._insist, name="lwpm-insist", daemon=True).start()

    def _insist(self) -> None:
        """End this process if its main thread is stuck where it cannot hear (a foreign collective, an endless loop)."""
        if not self._noticed.wait(_GRACE_SECONDS) and not self._closing:
            print(f"[lwpm] {self.label}: ending this process: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)


class _Explainer:
    """One wait that is under way."""

    def __init__(self, mailbox: Mailbox, what: str) -> None:
        self.mailbox, self.what, self.since, self.done, self.said = mailbox, what, time.monotonic(), False, 0
        _start_watch()


_explainers: deque[_Explainer] = deque()
_watch: threading.Thread | None = None


def _start_watch() -> None:
    global _watch
    if _watch is None or not _watch.is_alive():
        _watch = threading.Thread(target=_watch_waits, name="lwpm-watch", daemon=True)
        _watch.start()


def _watch_waits() -> None:
    while True:
        time.sleep(0.2)
        for _ in range(len(_explainers)):
            wait = _explainers.popleft()
            if wait.done:
                continue
            _explainers.append(wait)
            elapsed = time.monotonic() - wait.since
            if elapsed > wait.mailbox.patience * (wait.said + 1):
                wait.said += 1
                text = f"[lwpm] {wait.mailbox.label} has waited {elapsed:.0f} s for {wait.what}"
                print(text, file=sys.stderr, flush=True)


def _own_address() -> str:
    """The address under which other hosts reach this one: the one that faces the main host."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
    finally:
        probe.close()


class _Pickler(pickle.Pickler):
    """Pickles only the part of a storage that a tensor shows, and always from the host."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.layout is torch.strided:
            plain = value.detach().to("cpu").contiguous()
            data = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
            return _tensor, (data, plain.dtype, tuple(plain.shape), value.requires_grad)
        return NotImplemented


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    return tensor.requires_grad_() if requires_grad else tensor


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()
