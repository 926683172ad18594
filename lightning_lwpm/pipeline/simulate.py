"""Runs a table without a model: how long it takes, what it holds, and how long any schedule of its kind must take.

``simulate`` measures time and takes links as given; ``rendezvous`` (in a file of its own) ignores time and asks whether
sends and receives meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from lightning_lwpm.pipeline.action import Action, Costs, Latency, Table, delay, dependencies, present_one, unit
from lightning_lwpm.pipeline.rendezvous import Message, adjacent, channels, rendezvous
from lightning_lwpm.pipeline.tables import Deadlock, check_table, held_by_stages, kept_by_ranks

__all__ = [
    "Deadlock",
    "Message",
    "Simulation",
    "adjacent",
    "bound",
    "channels",
    "kept_by_ranks",
    "rendezvous",
    "simulate",
]


@dataclass(frozen=True)
class Simulation:
    """What a table costs, in the unit of time of the given ``seconds``.

    Args:
        makespan: Time from the first action's start to the last one's end.
        busy: Time that each rank computes.
        bubble: Idle part, from 0 to 1, of the ranks that have anything to do.
        starts: When each action starts.
        peak_in_flight: For each stage, the most micro-batches under way at once: from F to B, or to I where the
            backward pass is split.
        peak_kept: For each stage, the most micro-batches whose activations it keeps at once: from F to B, or to W.
    """

    makespan: float
    busy: tuple[float, ...]
    bubble: float
    starts: dict[Action, float]
    peak_in_flight: tuple[int, ...]
    peak_kept: tuple[int, ...]


def simulate(
    table: Table,
    placement: Sequence[int],
    seconds: Costs = unit,
    latency: Latency = 0.0,
) -> Simulation:
    """Run each rank's list in order, every action as soon as what it depends on has arrived.

    Args:
        table: The actions of each rank.
        placement: The rank of each stage.
        seconds: Time of each action.
        latency: Time that a result takes to another rank: a number, or a function of the action that makes it.

    Raises:
        Deadlock: If an action waits for one that never runs, or runs only after it.
        ConfigurationError: If an action comes twice, or not on the rank of its stage.
    """
    check_table(table, placement)
    present = frozenset(chain.from_iterable(table))
    ends: dict[Action, float] = {}
    starts: dict[Action, float] = {}
    done = [0] * len(table)
    free = [0.0] * len(table)
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(table):
            while done[rank] < len(actions):
                action = actions[done[rank]]
                sources = dependencies(action, len(placement), present)
                if any(source not in ends for source in sources):
                    break
                arrivals = (ends[s] + (0.0 if placement[s.stage] == rank else delay(latency, s)) for s in sources)
                starts[action] = max([free[rank], *arrivals])
                ends[action] = free[rank] = starts[action] + seconds(action)
                done[rank] += 1
                progress = True
    waiting = []
    for rank, actions in enumerate(table):
        if done[rank] < len(actions):
            action = actions[done[rank]]
            missing = [str(source) for source in dependencies(action, len(placement), present) if source not in ends]
            waiting.append(f"rank {rank} waits in {action} for {' and '.join(missing)}")
    if waiting:
        raise Deadlock("; ".join(waiting))

    makespan = max(free, default=0.0)
    busy = tuple(float(sum(seconds(action) for action in actions)) for actions in table)
    capacity = makespan * sum(1 for actions in table if actions)
    bubble = 1.0 - sum(busy) / capacity if capacity else 0.0
    in_flight, kept = (held_by_stages(table, len(placement), until) for until in ("BI", "BW"))
    return Simulation(makespan, busy, bubble, starts, tuple(in_flight), tuple(kept))


def bound(table: Table, placement: Sequence[int], seconds: Costs = unit, latency: Latency = 0.0) -> float:
    """Return a time that no table of the same actions on the same ranks can beat, whatever memory it had.

    ::

        rank r   |-- way to its first action --|-- all its actions --|-- way back to stage 0 --|

    No rank starts before a micro-batch has come to the nearest of its stages. Then it has all its work to do; and
    after its last backward pass the gradient still goes back to stage 0 (where the backward pass is split, a W may
    be last, which nobody waits for). Nor is any table shorter than the way of one micro-batch. At even costs, no
    latency and no lack of micro-batches the named schedules reach it, ``gpipe`` and ``1f1b`` always.

    Args:
        table: The actions of each rank, complete; their order does not matter.
        placement: The rank of each stage.
        seconds: Time of each action.
        latency: As in ``simulate``.
    """
    present = frozenset(chain.from_iterable(table))
    counts = {action.microbatch for action in present}
    if not present:
        return 0.0
    stages = range(len(placement))

    def spent(action: Action) -> float:
        return seconds(action) if action in present else 0.0

    def way(kind: str, stage: int, microbatch: int) -> float:
        """The time of one action and of the way of its result to the next."""
        onward = stage + (1 if kind == "F" else -1)
        action = present_one(Action(kind, stage, microbatch), present)
        crosses = action in present and onward in stages and placement[onward] != placement[stage]
        return spent(action) + (delay(latency, action) if crosses else 0.0)

    longest = 0.0
    head, tail = [float("inf")] * len(stages), [float("inf")] * len(stages)
    for microbatch in counts:
        forward = list(accumulate((way("F", stage, microbatch) for stage in stages), initial=0.0))
        backward = list(accumulate((way("B", stage, microbatch) for stage in stages), initial=0.0))
        head = [min(pair) for pair in zip(head, forward[:-1], strict=True)]
        # From the end of the stage's own backward pass: the way of its gradient, too.
        own_passes = (present_one(Action("B", stage, microbatch), present) for stage in stages)
        ways = (end - spent(own) for end, own in zip(backward[1:], own_passes, strict=True))
        tail = [min(pair) for pair in zip(tail, ways, strict=True)]
        longest = max(longest, forward[-1] + backward[-1] + spent(Action("W", 0, microbatch)))
    for rank, actions in enumerate(table):
        own = [stage for stage in stages if placement[stage] == rank]
        if own:
            after = 0.0 if any(action.kind == "W" for action in actions) else min(tail[stage] for stage in own)
            longest = max(longest, min(head[s] for s in own) + sum(map(seconds, actions)) + after)
    return longest
