"""Messages between ranks beside the data: requests, decisions, batches, failures; every wait on them can be broken.

    rank 0 ----- rank 1          one socket a pair, one reading thread a socket. A message has a kind and a key.
       \\          /              Requests ("?kind") go to their handler on a thread of its own; all others are kept
        \\        /               until somebody takes them. A closed socket without a farewell is a death, and a
          rank 2                 failure posted by one rank is raised by all, with the same words.

The main thread never waits anywhere but here, so it always hears of a failure at once. Where the user's code keeps it
from listening, the process is ended after a grace period.
"""

import pickle
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from lightning_lwpm.errors import LWPMError, PipelineError
from lightning_lwpm.pipeline.alarm import Alarm, described
from lightning_lwpm.pipeline.kinds import find, reference
from lightning_lwpm.pipeline.links import Links
from lightning_lwpm.pipeline.meeting import meet
from lightning_lwpm.pipeline.packing import packed
from lightning_lwpm.pipeline.watch import explained

__all__ = ["Mailbox"]

_POLL_SECONDS = 0.25
_ECHO_SECONDS = 3.0  # for the word of why a connection broke to arrive after the break itself


class Mailbox:
    """The control connections of one rank to all others.

    Args:
        rank: This rank.
        world: Number of ranks.
        gather: Collects one small object from every rank, in rank order (used once, to meet).
        patience: A wait longer than this many seconds is explained on standard error: who waits for what from whom.

    Attributes:
        label: What this rank calls itself in messages; see :meth:`introduce`.
        names: What it calls each rank.
        resting: Whether no run is under way: then the end of another rank is no reason to end this process.
        waited: Seconds that the owner, the thread that made this mailbox, has spent waiting in it so far.
        waits: If it is a list, every such wait is added to it: what was waited for, its begin and its end
            (``time.perf_counter()``, seconds).
    """

    def __init__(self, rank: int, world: int, gather: Callable[[Any], list[Any]], patience: float = 30.0) -> None:
        self.rank, self.world, self.patience = rank, world, patience
        self.label = f"rank {rank}"
        self.names = [f"rank {r}" for r in range(world)]
        self.resting = False
        self.waited = 0.0
        self.waits: list[tuple[str, float, float]] | None = None
        self._telling = threading.Lock()
        self._condition = threading.Condition()
        self._letters: dict[tuple[str, Any], deque[Any]] = defaultdict(deque)
        self._handlers: dict[str, Callable[[int, Any, Any], None]] = {}
        self._unhandled: dict[str, list[tuple[int, Any, Any]]] = defaultdict(list)
        # not on the reading threads: an answer may block until the peer reads, and so may the peer's
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._server = threading.Thread(target=self._serve, name="lwpm-mailbox-answers", daemon=True)
        self._links = Links(meet(rank, world, gather), self._condition, self._open, self._lost)
        self._alarm = Alarm(self._condition, lambda: self.resting or self._links.closing)
        if world > 1:
            self._links.start()
            self._server.start()

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
        for target in self._links.peers:
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
                        if self.has_left(source):
                            break
                        self._condition.wait(_POLL_SECONDS)
            if box := letters.get((kind, key)):
                payload = box.popleft()
                if not box:
                    del letters[kind, key]
                return payload
        raise self._left(source, what)

    def arrives(self, kind: str, key: Any, seconds: float) -> bool:
        """Whether there is a message to :meth:`take`, or will be within some seconds."""
        with self._condition:
            return bool(self._condition.wait_for(lambda: self._letters.get((kind, key)), seconds))

    def handle(self, kind: str, handler: Callable[[int, Any, Any], None]) -> None:
        """Let ``handler(source, key, payload)`` answer every request of a kind ("?..."), also those come already."""
        with self._condition:
            self._handlers[kind] = handler
            for message in self._unhandled.pop(kind, []):
                self._requests.put((kind, *message))

    def wait(self, until: Callable[[float], bool], what: str | Callable[[], str], source: int | None = None) -> None:
        """Wait for something, breaking off at a failure; see :meth:`take`.

        Args:
            until: Waits up to some seconds, and tells whether it is there, as the ``wait`` of an event does.
            what: Says, for people, what is waited for from whom; or a function that says it, called if need be.
            source: The rank that it comes from.
        """
        if until(0):
            return
        what = what if isinstance(what, str) else what()
        with self._waiting(what):
            while not until(_POLL_SECONDS):
                self.check()
                if self.has_left(source) and not until(_POLL_SECONDS):
                    raise self._left(source, what)

    def at_failure(self, react: Callable[[], None]) -> None:
        """Let ``react`` be called, on a thread of its own, when this rank hears of a failure, or has one."""
        self._alarm.reactions.append(react)

    @property
    def reusable(self) -> bool:
        """Whether no run is under way, no rank has failed, and none is at its end."""
        return self.resting and self.failure is None and not self._links.closing and not self._links.gone

    def has_left(self, source: int | None) -> bool:
        """Whether nothing can come from a rank, or with ``None`` from any other, because it has ended its program."""
        left = self._links.farewells
        return bool(left) and (left >= set(self._links.peers) if source is None else source in left)

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

    @property
    def failure(self) -> str | None:
        """What every rank raises since one of them failed."""
        return self._alarm.failure

    def check(self) -> None:
        """Raise the failure of any rank.

        Raises:
            LWPMError: with the same words on every rank.
        """
        self._alarm.check()

    def echo(self, source: int) -> None:
        """After a broken connection to a rank: give the word of why it ended time to arrive, and raise it.

        Raises:
            LWPMError: the failure of any rank.
        """
        deadline = time.monotonic() + _ECHO_SECONDS
        with self._condition:
            while self.failure is None and source not in self._links.gone and time.monotonic() < deadline:
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
        self._alarm.notice()
        if self.failure is None:
            self.fail(*described(self.label, what, error))
        return self._alarm.error()

    @contextmanager
    def guarded(self, what: Callable[[], str]) -> Iterator[None]:
        """Tell all ranks of a failure in the block, and raise it with the words that they hear.

        Where there is one rank, its own exception is raised, as on one device.

        Args:
            what: Says what has failed, such as "forward of micro-batch 3".
        """
        try:
            yield
        except Exception as error:
            if self.world == 1:
                raise
            heard = self.failure
            failure = self.failed(what(), error)
            if heard is not None and isinstance(error, LWPMError):
                raise
            # a failure caused by a StopIteration looks to `contextmanager` like that itself, which ends an epoch
            raise failure from (None if isinstance(error, StopIteration) else error)

    def fail(self, message: str, raised: type[LWPMError] = PipelineError) -> None:
        """Tell every rank that this one cannot go on. The first failure is the one that counts.

        Args:
            message: What every rank raises.
            raised: The type of what is raised.
        """
        with self._telling:
            if self._alarm.ring(message, raised, self.label):
                self._links.send_anyway(packed(("failure", reference(raised), message)))

    def introduce(self, ranks: Sequence[int]) -> None:
        """Call each rank by its stage from now on.

        Args:
            ranks: The rank of each stage.
        """
        self.names = [f"rank {r}" for r in range(self.world)]
        for rank in set(ranks):
            stages = [str(stage) for stage, where in enumerate(ranks) if where == rank]
            self.names[rank] = f"stage{'s' * (len(stages) > 1)} {' and '.join(stages)} (rank {rank})"
        self.label = self.names[self.rank]

    def close(self) -> None:
        """Say farewell, and end all threads."""
        with self._telling:  # a failure that another thread is about to tell goes before the farewell
            if self._links.closing:
                return
            self._links.closing = True
        self._requests.put(None)
        self._links.close()
        if self.world > 1:
            self._server.join(_ECHO_SECONDS)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Count the wait, if it is one of the owner, and say so if it lasts."""
        begin = time.perf_counter()
        try:
            with explained(self.label, self.patience, what):
                yield
        finally:
            if threading.get_ident() == self._alarm.owner:
                end = time.perf_counter()
                self.waited += end - begin
                if self.waits is not None:
                    self.waits.append((what, begin, end))

    def _send(self, target: int, data: bytes) -> None:
        if not self._links.send(target, data):
            self.check()

    def _open(self, source: int, data: bytes) -> None:
        try:
            kind, key, payload = pickle.loads(data)
        except Exception as error:
            self.failed(f"reading a message of {self.names[source]}", error)
        else:
            self._deliver(source, kind, key, payload)

    def _deliver(self, source: int, kind: str, key: Any, payload: Any) -> None:
        if kind == "failure":
            self._alarm.ring(payload, find(key), self.label)
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

    def _left(self, source: int | None, what: str) -> LWPMError:
        who = self.names[source] if source is not None else "every other rank"
        self.fail(
            f"{self.label} waits for {what}, but {who} has come to the end of its program: the ranks have taken "
            "different paths. Call `fit`, `validate`, `test`, `predict` and `save_checkpoint` on every rank alike, not "
            "under a condition such as `if trainer.is_global_zero`, and catch no exception around them on some ranks."
        )
        return self._alarm.error()

    def _lost(self, source: int) -> None:
        message = (
            f"{self.names[source]} died without a word: its process was killed (out of memory?), crashed, or called "
            f"`os._exit`{'' if source in self._links.near else ', or its host cannot be reached any more'}"
        )
        if self._alarm.ring(message, PipelineError, self.label) and not self.resting:
            # at once: Lightning kills the main process as soon as it sees that a child has died
            print(f"[lwpm] {self.label}: {message}", file=sys.stderr, flush=True)
