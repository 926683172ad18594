"""How far apart the clocks of two processes are, found by asking for the time.

::

    rank r   before |------------------------------| after         offset = there - (before + after) / 2
    rank 0                     there                               error <= (after - before) / 2
"""

import time
from collections.abc import Hashable

from lightning_lwpm.pipeline.mailbox import Mailbox

__all__ = ["offset", "serve"]

_ROUNDS = 8


def serve(mailbox: Mailbox) -> None:
    """On rank 0: tell the time (``time.perf_counter()``) to whoever asks."""
    mailbox.handle("?time", lambda source, key, _: mailbox.post(source, "time", key, time.perf_counter()))


def offset(mailbox: Mailbox, key: Hashable) -> tuple[float, float]:
    """The seconds by which rank 0's ``time.perf_counter()`` is ahead of this rank's, and the largest possible error.

    Of some exchanges the quickest counts, as in the Network Time Protocol (RFC 5905): the answer was given between
    question and reply, at worst right at one of both, so that the error is at most half of the time between them. The
    processes of a Linux host share their clock; so an offset within its error is taken as none. What the clocks drift
    apart afterwards (some microseconds a second between hosts) is not seen.

    Args:
        mailbox: The control connections; rank 0 must ``serve``.
        key: Tells this exchange from others; hashable.
    """
    if mailbox.rank == 0:
        return 0.0, 0.0
    best = (float("inf"), 0.0)
    for turn in range(_ROUNDS):
        label = (key, mailbox.rank, turn)
        before = time.perf_counter()
        mailbox.post(0, "?time", label)
        there = mailbox.take("time", label, "the time of rank 0", 0)
        after = time.perf_counter()
        best = min(best, (after - before, there - (before + after) / 2))
    error = best[0] / 2
    return (best[1] if abs(best[1]) > error else 0.0), error
