"""A step as a function of the size of its micro-batches, from looks at one or two sizes.

Seconds and bytes of a layer call grow with the number of samples from a start that does not: the overhead of the call,
the gradients of its weights. Two looks give both; with one look, all is taken to grow in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_lwpm.partition.costs import CallCost, Costs
from lightning_lwpm.partition.timeline import LayerCall, Timeline

__all__ = ["Look", "at"]


@dataclass(frozen=True)
class Look:
    """What one look at the step has shown.

    Args:
        samples: Size of the micro-batch.
        timeline: Its layer calls.
        costs: What they cost.
    """

    samples: float
    timeline: Timeline
    costs: Costs


def at(looks: Sequence[Look], samples: float) -> Look:
    """The step with micro-batches of another size.

    Args:
        looks: At one size, or at two; if the two sizes make different calls, the nearer one counts alone.
        samples: The size wanted.
    """
    for look in looks:
        if look.samples == samples:
            return look
    by_distance = sorted(looks, key=lambda look: abs(look.samples - samples))
    low, high = by_distance[0], by_distance[-1]
    if low.samples == high.samples or _names(low) != _names(high):
        high = Look(0, low.timeline, low.costs)

        def value(a: float, b: float) -> float:
            return a * samples / low.samples
    else:
        share = (samples - low.samples) / (high.samples - low.samples)

        def value(a: float, b: float) -> float:
            # overheads are not negative, so nothing falls below the part of the smaller look that its size explains
            least = min(a / low.samples, b / high.samples) * samples
            return max(a + (b - a) * share, min(least, a, b))

    def cost(a: CallCost, b: CallCost) -> CallCost:
        times = value(a.forward, b.forward), value(a.backward, b.backward), value(a.weight, b.weight)
        return CallCost(*times, measured=a.measured)

    def call(a: LayerCall, b: LayerCall) -> LayerCall:
        return replace(
            a,
            flops=value(a.flops, b.flops),
            bytes_moved=value(a.bytes_moved, b.bytes_moved),
            kept_bytes=round(value(a.kept_bytes, b.kept_bytes)),
            passing_bytes=round(value(a.passing_bytes, b.passing_bytes)),
        )

    one, two = low.timeline, high.timeline
    return Look(
        samples,
        Timeline(
            tuple(map(call, one.calls, two.calls)),
            tuple(round(value(a, b)) for a, b in zip(one.boundary_bytes, two.boundary_bytes, strict=True)),
            one.allowed,
            tuple(replace(flow, nbytes=flow.nbytes * samples / low.samples) for flow in one.flows),
        ),
        Costs(tuple(map(cost, low.costs.calls, high.costs.calls)), low.costs.link),
    )


def _names(look: Look) -> list[tuple[str, int]]:
    return [(call.name, call.occurrence) for call in look.timeline.calls]
