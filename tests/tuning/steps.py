"""Steps made of numbers, and probes of them, for tests that need no model."""

from collections.abc import Sequence

from lightning_lwpm.partition.costs import CallCost, Costs, Link
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.timeline import Flow, LayerCall, Timeline
from lightning_lwpm.tuning.sized import Look

KIB = 1024


def timeline(
    flops: Sequence[float],
    boundary: int = 0,
    kept: int | Sequence[int] = 0,
    weights: int = 0,
    passing: int = 0,
    allowed: Sequence[bool] | None = None,
) -> Timeline:
    """A step of layers ``l0``, ``l1``, ...; bytes are of each layer, ``boundary`` of what crosses each cut."""
    held = [kept] * len(flops) if isinstance(kept, int) else kept
    calls = [
        LayerCall(f"l{i}", 0, work, 0.0, weights, weights // 4, kept_bytes=k, passing_bytes=passing)
        for i, (work, k) in enumerate(zip(flops, held, strict=True))
    ]
    edges = (0, *[boundary] * (len(calls) - 1))
    flows = [Flow(i, (i + 1,), boundary) for i in range(len(calls) - 1) if boundary]
    return Timeline(tuple(calls), edges, tuple(allowed or [True] * len(calls)), tuple(flows))


def costs(forward: Sequence[float], link: Link | None = None, weight: float = 0.0) -> Costs:
    """Measured costs: a backward pass of two forward passes, of which ``weight`` can be put off."""
    return Costs(tuple(CallCost(f, 2 * f, weight * f) for f in forward), link or Link(0.0, 1e15))


def look(
    samples: float, forward: Sequence[float], link: Link | None = None, weight: float = 0.0, **bytes_of: int
) -> Look:
    """A look at a step whose layers take the given seconds for a micro-batch of that size."""
    return Look(samples, timeline([f * 1e9 for f in forward], **bytes_of), costs(forward, link, weight))


def probe_of(found: Look) -> Probe:
    """A probe in which each layer has a weight of its own, with a gradient."""
    calls = found.timeline.calls
    parameters = {f"{call.name}.weight": (i,) for i, call in enumerate(calls)}
    sizes = {f"{call.name}.weight": (call.parameter_bytes, call.parameter_bytes) for call in calls}
    return Probe(found.timeline, {}, parameters, {}, sizes=sizes)
