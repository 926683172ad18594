"""Measures the connections between neighbouring ranks: a few short messages there and back, then a few long ones."""

import statistics
import time

import torch

from lightning_lwpm.partition.costs import Link
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Transport

__all__ = ["measure_link"]

_SHORT, _LONG = 256, 2 << 20  # bytes
_SHORT_TURNS, _LONG_TURNS = 12, 3


def measure_link(mailbox: Mailbox, transport: Transport | None, key: object) -> Link:
    """Measure the links of neighbouring ranks, one after the other.

    Args:
        mailbox: The control connections.
        transport: The data connections; ``None`` with one rank.
        key: Names this exchange; the same on all ranks.

    Returns:
        The slowest latency and the slowest bandwidth, the same on all ranks.
    """
    if transport is None or mailbox.world == 1:
        return Link()
    rank, world = mailbox.rank, mailbox.world
    mine: list[Link] = []
    if rank > 0:  # the pair below is measured first, so that no two pairs are at work at once
        _turns(transport, rank - 1, rank)
    if rank < world - 1:
        short, long = _turns(transport, rank + 1, rank)
        mine = [Link(short, _LONG / max(long - short, 1e-9))]
    links = [link for some in mailbox.gather((key, "link"), mine, "the speed of the links") for link in some]
    return Link(max(link.latency for link in links), min(link.bytes_per_second for link in links))


def _turns(transport: Transport, peer: int, rank: int) -> tuple[float, float]:
    """Seconds that a short and a long message take one way; the lower rank of the pair begins."""
    medians = []
    for nbytes, turns in ((_SHORT, _SHORT_TURNS), (_LONG, _LONG_TURNS)):
        flat = torch.zeros(nbytes, dtype=torch.uint8, device=transport.device)
        seconds = []
        for _ in range(turns + 1):
            begin = time.perf_counter()
            if rank < peer:
                transport.send(peer, flat)
                _receive(transport, peer, nbytes)
            else:
                _receive(transport, peer, nbytes)
                transport.send(peer, flat)
            seconds.append((time.perf_counter() - begin) / 2)
        medians.append(statistics.median(seconds[1:]))  # the first message warms up
    return medians[0], medians[1]


def _receive(transport: Transport, peer: int, nbytes: int) -> None:
    """Wait until a message is there, on an accelerator too."""
    transport.receive(peer, nbytes, torch.uint8).wait(f"a message of rank {peer}")
    if transport.device.type != "cpu":
        torch.accelerator.synchronize(transport.device)
