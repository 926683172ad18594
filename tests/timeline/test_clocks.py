"""Clocks are compared by asking for the time."""

import time
from typing import Any

from harness import connect
from pool import Pool

from lightning_lwpm.timeline.clocks import offset, serve

AHEAD = 5.0


def compare(rank: int, world: int, ahead: float) -> Any:
    """How far rank 0's clock is ahead, which may be another than this rank's."""
    mailbox, transport = connect(rank, world)
    if rank == 0 and ahead:
        mailbox.handle("?time", lambda source, key, _: mailbox.post(source, "time", key, time.perf_counter() + ahead))
    elif rank == 0:
        serve(mailbox)
    found = offset(mailbox, "clocks")
    mailbox.gather("end", None)
    assert transport is not None
    transport.close()
    mailbox.close()
    return found


def test_clocks_of_one_host_are_one(pool: Pool) -> None:
    here, there = pool.run(2, compare, 0.0)
    assert here == (0.0, 0.0)
    assert there[0] == 0.0 and 0.0 < there[1] < 0.1


def test_another_clock_is_found(pool: Pool) -> None:
    _, (found, error) = pool.run(2, compare, AHEAD)
    assert abs(found - AHEAD) <= error < 0.1
