"""What layer calls and transfers cost in seconds: measured where that was possible, estimated from counts elsewhere.

Where nothing has been measured only ratios matter: constants ten times too large give the same cuts, as long as
arithmetic, memory and link keep their proportion. So one nominal machine stands for all, and where some calls have been
measured, they set the scale for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lightning_lwpm.partition.timeline import LayerCall, Timeline

__all__ = ["CallCost", "Costs", "Link", "estimate", "estimate_seconds", "filled"]

FLOPS_PER_SECOND = 50e9
"""Nominal arithmetic rate: 50 GFLOP/s, about one CPU core on float32 matrix products."""

MEMORY_BYTES_PER_SECOND = 10e9
"""Nominal rate at which element-wise operations write memory: 10 GB/s."""

BACKWARD_OVER_FORWARD = 2.0
"""A backward pass computes two products (input and weight gradient) for each one of the forward pass."""


@dataclass(frozen=True)
class CallCost:
    """Seconds of one layer call, with the functions after it, for one micro-batch.

    Args:
        forward: The forward pass.
        backward: The whole backward pass.
        weight: What of it can be put off: the gradients of weights.
        measured: Whether it was measured; otherwise it is estimated from FLOPs.
    """

    forward: float
    backward: float
    weight: float = 0.0
    measured: bool = True


@dataclass(frozen=True)
class Link:
    """The connection of two ranks.

    Args:
        latency: Seconds that an empty message takes.
        bytes_per_second: How fast a large one flows, one way.
    """

    latency: float = 100e-6
    bytes_per_second: float = 2e9

    def seconds(self, nbytes: float) -> float:
        """The time from sending to having received, in seconds."""
        return self.latency + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class Costs:
    """What a step costs.

    Args:
        calls: For each layer call of the timeline.
        link: The slowest connection of two neighbours; by default gloo's over loopback.
    """

    calls: tuple[CallCost, ...]
    link: Link = Link()

    @property
    def work(self) -> list[float]:
        """Seconds of each call, forward and backward."""
        return [call.forward + call.backward for call in self.calls]

    @property
    def measured(self) -> int:
        """How many of the calls were measured."""
        return sum(call.measured for call in self.calls)

    def corrected(self, cuts: Sequence[int], factors: Sequence[tuple[float, float]]) -> "Costs":
        """The costs, once stages have turned out slower or faster than predicted.

        Args:
            cuts: Where the second, third, ... stage begin.
            factors: For each stage, measured over predicted seconds of forward and backward passes.
        """
        calls: list[CallCost] = []
        for (begin, end), (forward, backward) in zip(pairwise([0, *cuts, len(self.calls)]), factors, strict=True):
            for call in self.calls[begin:end]:
                changed = replace(call, forward=call.forward * forward, backward=call.backward * backward)
                calls.append(replace(changed, weight=call.weight * backward))
        return replace(self, calls=tuple(calls))


def estimate_seconds(flops: float, bytes_moved: float, train: bool = True) -> float:
    """Estimate the time of a layer, as arithmetic time plus memory time.

    The roofline model (Williams et al., CACM 52(4), 2009) takes the larger of the two. The counts here belong to
    a whole layer, whose operations are bound by one or the other in turn, so the sum is the closer figure.

    Args:
        flops: Floating-point operations of the forward pass.
        bytes_moved: Bytes written by the forward pass.
        train: Whether to add the backward pass, counted as twice the forward pass.

    Returns:
        Seconds on the nominal machine.
    """
    forward = flops / FLOPS_PER_SECOND + bytes_moved / MEMORY_BYTES_PER_SECOND
    return forward * (1.0 + BACKWARD_OVER_FORWARD) if train else forward


def estimate(timeline: Timeline) -> Costs:
    """The costs of a step of which nothing has been measured."""
    return Costs(tuple(_estimated(call, 1.0) for call in timeline.calls))


def filled(timeline: Timeline, timings: Sequence[CallCost | None], link: Link) -> Costs:
    """The costs of a step of which some calls have been measured; estimates of the others are put to their scale.

    Args:
        timeline: The step.
        timings: For each call what was measured, or ``None``.
        link: The connection of the ranks.
    """
    known = [(call, timing) for call, timing in zip(timeline.calls, timings, strict=True) if timing is not None]
    guessed = sum(estimate_seconds(call.flops, call.bytes_moved) for call, _ in known)
    scale = sum(timing.forward + timing.backward for _, timing in known) / guessed if guessed else 1.0
    calls = (timing or _estimated(call, scale) for call, timing in zip(timeline.calls, timings, strict=True))
    return Costs(tuple(calls), link)


def _estimated(call: LayerCall, scale: float) -> CallCost:
    forward = estimate_seconds(call.flops, call.bytes_moved, train=False) * scale
    weight = forward if call.parameters else 0.0
    return CallCost(forward, forward * BACKWARD_OVER_FORWARD, weight, measured=False)
