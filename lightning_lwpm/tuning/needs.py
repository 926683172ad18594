"""What the stages of a step need on their devices, for a number of micro-batches and a schedule."""

import math

from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.tuning.lineup import Lineup
from lightning_lwpm.tuning.predict import in_flight
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["fits", "memory_of", "places_of", "room_of"]


def places_of(look: Look) -> int:
    """Number of stages into which a step can be cut at most."""
    return 1 + sum(look.timeline.allowed[1:])


def memory_of(look: Look, seen: Probe, lineup: Lineup, count: int, wish: Wish) -> Memory:
    """What stages need on their devices.

    Args:
        look: The step at the size of its micro-batches.
        seen: Where parameters and buffers are used, and their sizes.
        lineup: Says how many micro-batches a stage holds at once, and with which other stages it shares a device. Each
            of these may take an equal part.
        count: Number of micro-batches.
        wish: Says what devices hold, and optimizers.
    """
    schedule, ranks = lineup.schedule, lineup.ranks
    calls = look.timeline.calls
    weights = []
    for name, where in [*seen.parameters.items(), *seen.buffers.items()]:
        values, gradient = seen.sizes[name]
        weights.append((where, values + gradient * (1 + wish.state_factor)))
    again = [call.again_bytes if schedule else 0 for call in calls]
    whole = wish.activation_checkpointing == "stage"  # all of a stage at once, otherwise layer by layer
    # at work on a call: what it takes, what it gives, in the backward pass the gradients of both and of its weights
    working = [3 * call.passing_bytes + call.parameter_bytes if schedule else call.passing_bytes for call in calls]
    return Memory(
        parameters=weights,
        kept=[call.kept_bytes if schedule else 0 for call in calls],
        flows=look.timeline.flows,
        transient=working if whole else [once + more for once, more in zip(working, again, strict=True)],
        again=again if whole else (),
        shared=[(where, seen.sizes[name][1]) for name, where in seen.parameters.items() if len(where) > 1 and schedule],
        in_flight=lambda stage, _: in_flight(schedule, ranks, count)[stage] if schedule else 1,
        limits=[wish.limits[rank] / ranks.count(rank) for rank in ranks] if wish.limits else [math.inf] * len(ranks),
    )


def fits(plan: PartitionPlan, wish: Wish) -> bool:
    """Whether the stages of each rank fit its device together; weights that several of them use count in each."""
    left = list(wish.limits) or [math.inf] * plan.num_ranks
    for stage in plan.stages:
        left[stage.rank] -= sum(stage.memory.values())
    return min(left) >= 0


def room_of(plan: PartitionPlan, wish: Wish) -> tuple[float, ...]:
    """For each rank, the bytes that it has for micro-batches in flight; empty where no device has a limit.

    There is always room for one: a partition of the user's runs, whatever is expected of it.
    """
    if all(math.isinf(limit) for limit in wish.limits):
        return ()
    room, least = list(wish.limits), [0.0] * len(wish.limits)
    for stage in plan.stages:
        room[stage.rank] -= (
            stage.memory["weights"] + stage.memory["transient"] + stage.memory.get("computed again", 0.0)
        )
        least[stage.rank] += stage.microbatch_bytes
    return tuple(map(max, room, least))
