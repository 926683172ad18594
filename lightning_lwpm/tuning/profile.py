"""Times the distinct segments of a step, the work shared out over the ranks.

::

    rank 0    segments -> distinct -> not in the cache -> shares      gather -> cache -> costs of all calls
    rank r                                              my share -> seconds
"""

import pickle
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lightning_lwpm.partition.costs import CallCost, Costs, Link, estimate_seconds, filled
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.measure import CACHE_BYTES, time_segment
from lightning_lwpm.partition.segment import Segment
from lightning_lwpm.partition.undo import generators_kept
from lightning_lwpm.partition.units import human_seconds
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.tuning.cache import CostCache

__all__ = ["profile"]

_BUDGET_SECONDS = 60.0
"""Timing ends after so long, the most work first; what is left is estimated."""

_CONSOLE = Console(stderr=True)

Context = Callable[[], AbstractContextManager[object]]


def profile(
    mailbox: Mailbox,
    key: object,
    seen: Probe | None,
    root: nn.Module,
    device: torch.device,
    train: bool,
    context: Context,
    cache: CostCache,
    link: Link,
) -> Costs:
    """Measure what the layer calls of a step cost. All ranks take part.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        seen: The step, on rank 0.
        root: The whole model.
        device: This rank's device, on which layers are timed one by one.
        train: Whether backward passes count.
        context: Entered around each forward pass (precision).
        cache: Read and written by rank 0.
        link: The connection of the ranks.

    Returns:
        The costs, the same on all ranks. Calls that cannot be run alone are estimated from FLOPs; so are layers with
        hooks that do something and must not hear of it, unless another layer is their like.
    """
    known: dict[str, CallCost] = {}
    shares: dict[int, list[bytes]] = {}
    own: list[Segment] = []
    timers = _timers(mailbox, key, device)
    if seen is not None:
        known = cache.read({segment.digest for segment in seen.segments})
        own, shares = _shared_out(seen, known, timers)
    shares = mailbox.broadcast((key, "segments"), shares, what="the layers to time")
    if mailbox.rank:
        own = [segment for data in shares.get(mailbox.rank, ()) if (segment := _unpacked(data)) is not None]
    began = time.monotonic()
    found = _time_all(own, root, device, train, context, mailbox.rank == 0) if own else {}
    if shares:
        gathered = mailbox.gather((key, "seconds"), found, "the times of all layers")
        found = {digest: cost for some in gathered for digest, cost in some.items()}
    costs = None
    if seen is not None:
        cache.write(found)
        known |= found
        costs = filled(seen.timeline, _of_calls(seen, known), link)
        if found:
            took = human_seconds(time.monotonic() - began)
            calls = len(seen.segments)
            _CONSOLE.print(f"timed {len(found)} distinct layers of {calls} layer calls in {took}", style="dim")
    return mailbox.broadcast((key, "costs"), costs, what="the costs of the layers")


def _of_calls(seen: Probe, known: Mapping[str, CallCost]) -> list[CallCost | None]:
    """The cost of each layer call; what the user has computed again costs its forward pass twice."""
    costs = [known.get(segment.digest) for segment in seen.segments]
    return [
        replace(cost, backward=cost.backward + cost.forward) if cost and call.recomputed else cost
        for cost, call in zip(costs, seen.timeline.calls, strict=True)
    ]


def _timers(mailbox: Mailbox, key: object, device: torch.device) -> list[int]:
    """The ranks that time: one for each device, and one for all CPU ranks of a host, whose memory they share."""
    mine = socket.gethostname(), str(device) if device.type != "cpu" else "cpu"
    places = mailbox.gather((key, "places"), mine, "the places of all ranks")
    return [rank for rank, place in enumerate(places) if places.index(place) == rank]


def _shared_out(
    seen: Probe, known: Mapping[str, CallCost], timers: Sequence[int]
) -> tuple[list[Segment], dict[int, list[bytes]]]:
    """The segments that rank 0 times, and each rank's share as bytes; what cannot be sent stays with rank 0."""
    work = {}
    for segment, call in zip(seen.segments, seen.timeline.calls, strict=True):
        if segment.digest not in known and not _heard(segment, seen):
            work[segment.digest] = (estimate_seconds(call.flops, call.bytes_moved), segment)
    loads, own = dict.fromkeys(timers, 0.0), list[Segment]()
    shares: dict[int, list[bytes]] = {rank: [] for rank in timers}
    for seconds, segment in sorted(work.values(), key=lambda item: -item[0]):
        least = min(timers, key=lambda rank: loads[rank])
        data = _packed(segment) if least else None
        if data is None:
            own.append(segment)
        else:
            shares[least].append(data)
        loads[least if data else 0] += seconds
    return own, shares if work else {}


def _heard(segment: Segment, seen: Probe) -> bool:
    """Whether hooks of the user's that do something would hear of it, if it ran by itself."""
    return any(f"{name}.".startswith(f"{layer}.") for name in seen.hooked for layer in segment.layers)


def _packed(segment: Segment) -> bytes | None:
    """A segment as bytes; ``None`` if a function or an argument in it cannot be sent."""
    try:
        return pickle.dumps(segment)
    except Exception:
        return None


def _unpacked(data: bytes) -> Segment | None:
    """The segment; ``None`` if this process does not know a function in it."""
    try:
        segment: Segment = pickle.loads(data)
    except Exception:
        return None
    return segment


def _time_all(
    segments: Sequence[Segment], root: nn.Module, device: torch.device, train: bool, context: Context, show: bool
) -> dict[str, CallCost]:
    """Time segments; one that fails by itself is left out, and so are those for which there is no time."""
    found: dict[str, Any] = {}
    end = time.monotonic() + _BUDGET_SECONDS
    cold = sum(p.numel() * p.element_size() for p in root.parameters()) > CACHE_BYTES
    with generators_kept(device):
        for segment in track(segments, "timing layers", console=_CONSOLE, transient=True, disable=not show):
            if time.monotonic() > end:
                break
            with suppress(Exception):
                found[segment.digest] = time_segment(segment, root, device, train, cold, context=context)
    return found
