"""How ranks meet: each listens, learns where the others do, and calls those that come before it."""

import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.sockets import keep_alive, own_address, own_host, send_at_once

__all__ = ["meet"]

_MEETING_SECONDS = 60.0  # for all ranks to connect, once all have said that they are there


def meet(rank: int, world: int, gather: Callable[[Any], list[Any]]) -> dict[int, Connection]:
    """Connect to every other rank.

    Args:
        rank: This rank.
        world: Number of ranks.
        gather: Collects one small object from every rank, in rank order.

    Returns:
        The connection to each other rank.

    Raises:
        PipelineError: if a rank does not come within a minute.
    """
    peers: dict[int, Connection] = {}
    if world == 1:
        return peers
    secrets, hosts = zip(*gather((os.urandom(32), own_host())), strict=True)
    secret, host = secrets[0], hosts[rank]  # one key for all, made by rank 0
    # within one host sockets that take half the time for a large message; named without a file, which Linux alone has
    near = sys.platform == "linux" and len(set(hosts)) == 1
    listener = Listener(f"\0lwpm-{os.urandom(16).hex()}" if near else ("", 0), backlog=world, authkey=secret)
    cards = gather(listener.address if near else (own_address(), listener.address[1]))
    for target in range(rank):
        address = cards[target] if near or hosts[target] != host else ("127.0.0.1", cards[target][1])
        connection = Client(address, authkey=secret)
        connection.send_bytes(pickle.dumps(rank))
        peers[target] = connection  # type: ignore[assignment]
    # private: there is no other way to bound the wait for a rank that died on its way here
    listener._listener._socket.settimeout(_MEETING_SECONDS)  # type: ignore[attr-defined]
    for _ in range(rank + 1, world):
        try:
            connection = listener.accept()
        except TimeoutError:
            missing = sorted(set(range(rank + 1, world)) - set(peers))
            raise PipelineError(
                f"rank {rank} has waited {_MEETING_SECONDS:.0f} s for a connection from rank(s) {missing}: see "
                "what they wrote last, and whether the hosts can reach each other on any port"
            ) from None
        peers[pickle.loads(connection.recv_bytes())] = connection  # type: ignore[assignment]
    listener.close()
    for connection in () if near else peers.values():
        keep_alive(connection)
        send_at_once(connection)
    return peers
