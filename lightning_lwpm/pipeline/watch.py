"""Explains waits that last: who waits for what, said on standard error by a thread of its own."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["explained"]


@contextmanager
def explained(label: str, patience: float, what: str) -> Iterator[None]:
    """Say who waits for what if the block lasts.

    Args:
        label: Who waits.
        patience: After how many seconds, and again after as many; 0 for never.
        what: What is waited for, from whom.
    """
    if patience <= 0:
        yield
        return
    wait = _Wait(label, patience, what)
    try:
        yield
    finally:
        wait.done = True


class _Wait:
    """One wait that is under way."""

    def __init__(self, label: str, patience: float, what: str) -> None:
        self.label, self.patience, self.what = label, patience, what
        self.since, self.done, self.said = time.monotonic(), False, 0
        _waits.append(self)
        _start()


_waits: deque[_Wait] = deque()
_thread: threading.Thread | None = None


def _start() -> None:
    global _thread
    if _thread is None or not _thread.is_alive():  # a forked child has none
        _thread = threading.Thread(target=_watch, name="lwpm-watch", daemon=True)
        _thread.start()


def _watch() -> None:
    while True:
        time.sleep(0.2)
        for _ in range(len(_waits)):
            wait = _waits.popleft()
            if wait.done:
                continue
            _waits.append(wait)
            elapsed = time.monotonic() - wait.since
            if elapsed > wait.patience * (wait.said + 1):
                wait.said += 1
                print(f"[lwpm] {wait.label} has waited {elapsed:.0f} s for {wait.what}", file=sys.stderr, flush=True)
