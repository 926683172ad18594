"""What the stages of a step need on their devices, for a number of micro-batches and a schedule."""

import math

from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.pipeline.schedule import place
from lightning_lwpm.tuning.predict import in_flight
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["memory_of", "stages_of"]


def stages_of(look: Look, num_ranks: int) -> int:
    """Number of stages: one a rank, as long as there are places to cut."""
    return min(num_ranks, 1 + sum(look.timeline.allowed[1:]))


def memory_of(look: Look, seen: Probe, stages: int, count: int, schedule: str, wish: Wish) -> Memory:
    """What stages need on their devices.

    Args:
        look: The step at the size of its micro-batches.
        seen: Where parameters and buffers are used, and their sizes.
        stages: Number of stages.
        count: Number of micro-batches.
        schedule: Says how many of them a stage holds at once; "" for evaluation.
        wish: Says what devices hold, and optimizers.
    """
    calls = look.timeline.calls
    weights = []
    for name, where in [*seen.parameters.items(), *seen.buffers.items()]:
        values, gradient = seen.sizes[name]
        weights.append((where, values + gradient * (1 + wish.state_factor)))
    return Memory(
        parameters=weights,
        kept=[call.kept_bytes if schedule else 0 for call in calls],
        flows=look.timeline.flows,
        # at work on a call: what it takes, what it gives, in the backward pass the gradients of both and of its weights
        transient=[3 * call.passing_bytes + call.parameter_bytes if schedule else call.passing_bytes for call in calls],
        shared=[(where, seen.sizes[name][1]) for name, where in seen.parameters.items() if len(where) > 1 and schedule],
        in_flight=lambda stage, stages: in_flight(schedule, stages, count)[stage] if schedule else 1,
        limits=[wish.limits[rank] for rank in place(stages)] if wish.limits else [math.inf] * stages,
    )
