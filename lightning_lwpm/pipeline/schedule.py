"""Schedules as data: one greedy list scheduler turns a policy into the table that is run, simulated and drawn.

::

    Action  2F3                 stage 2, forward, micro-batch 3
    Table   [[Action, ...]]     one list per rank, in the order of execution
"""

import difflib
import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_lwpm.errors import ConfigurationError


class Action(NamedTuple):
    """One unit of work of one rank, printed as ``2F3``: stage 2, forward, micro-batch 3.

    Args:
        kind: ``"F"`` forward or ``"B"`` backward.
        stage: Number of the stage, from 0 at the model's beginning.
        microbatch: Number of the micro-batch, from 0.
    """

    kind: str
    stage: int
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read the notation back: ``Action.parse("2F3") == Action("F", 2, 3)``.

        Raises:
            ConfigurationError: If ``text`` is not of this form.
        """
        match = re.fullmatch(r"(\d+)([A-Z])(\d+)", text.strip())
        if match is None:
            raise ConfigurationError(f"{text!r} is no action; write stage, kind, micro-batch, such as '2F3'")
        return cls(match[2], int(match[1]), int(match[3]))


Table = list[list[Action]]
Latency = float | Callable[[Action], float]
"""Seconds from the end of an action to the arrival of its result on another rank."""


@dataclass(frozen=True)
class Policy:
    """All that tells one schedule from another.

    Args:
        name: What the user writes.
        prefer: The kinds of action that the schedule has; a free rank takes the first of them that is ready.
        in_flight: From (stage, number of stages, number of micro-batches) to the number of micro-batches that the
            stage may hold between their forward and their backward pass; None for no cap.
    """

    name: str
    prefer: tuple[str, ...]
    in_flight: Callable[[int, int, int], int] | None = None


def _stages_to_the_end(stage: int, num_stages: int, num_microbatches: int) -> int:
    return num_stages - stage


# Both figures: three stages, four micro-batches, a backward pass (two columns) twice as long as a forward pass.
#
# gpipe (Huang et al., arXiv 1811.06965): forward passes first. Every stage holds all micro-batches.
#
#   stage 0  0F0 0F1 0F2 0F3                         0B0---- 0B1---- 0B2---- 0B3----
#   stage 1      1F0 1F1 1F2 1F3             1B0---- 1B1---- 1B2---- 1B3----
#   stage 2          2F0 2F1 2F2 2F3 2B0---- 2B1---- 2B2---- 2B3----
GPIPE = Policy("gpipe", prefer=("F", "B"))

# 1f1b (PipeDream-Flush: Narayanan et al., arXiv 2006.09503): a backward pass as soon as there is one. As long as
# gpipe, but stage s holds no more than (number of stages - s) micro-batches, however many there are.
#
#   stage 0  0F0 0F1 0F2                 0B0---- 0F3 0B1----     0B2----     0B3----
#   stage 1      1F0 1F1         1B0---- 1F2 1B1---- 1F3 1B2----     1B3----
#   stage 2          2F0 2B0---- 2F1 2B1---- 2F2 2B2---- 2F3 2B3----
ONE_F_ONE_B = Policy("1f1b", prefer=("B", "F"), in_flight=_stages_to_the_end)

# Evaluation: no backward pass, nothing is held.
#
#   stage 0  0F0 0F1 0F2 0F3
#   stage 1      1F0 1F1 1F2 1F3
#   stage 2          2F0 2F1 2F2 2F3
FORWARD_ONLY = Policy("forward only", prefer=("F",))

SCHEDULES: dict[str, Policy] = {policy.name: policy for policy in (GPIPE, ONE_F_ONE_B)}


def place(num_stages: int) -> list[int]:
    """Return the rank of each stage: the last one on rank 0, where Lightning reports the loss.

    >>> place(4)
    [3, 2, 1, 0]
    """
    return list(reversed(range(num_stages)))


def unit(action: Action) -> float:
    """Return the time of an action in units of a forward pass: 1 for F, 2 for B."""
    return 2.0 if action.kind == "B" else 1.0


def dependencies(action: Action, num_stages: int) -> list[Action]:
    """Return the actions whose end an action waits for, in the order of the flow of data.

    ``F(s, m)`` waits for ``F(s-1, m)``; ``B(s, m)`` for ``F(s, m)`` and ``B(s+1, m)``.
    """
    kind, stage, microbatch = action
    if kind == "F":
        return [Action("F", stage - 1, microbatch)] if stage > 0 else []
    own = [Action("F", stage, microbatch)]
    return [*own, Action("B", stage + 1, microbatch)] if stage < num_stages - 1 else own


def list_schedule(
    policy: Policy,
    num_stages: int,
    num_microbatches: int,
    placement: Sequence[int],
    costs: Callable[[Action], float] = unit,
    latency: Latency = 0.0,
) -> Table:
    """Make a table by greedy list scheduling: whenever a rank is free, it takes its best ready action.

    Ready means that the dependencies have arrived, that the cap on micro-batches in flight allows it and that the
    stage has done all earlier micro-batches of the same kind (so gradients are summed in the same order whatever
    the schedule). Best means first in ``policy.prefer``, then the lowest micro-batch, then the lowest stage.

    Args:
        policy: The schedule.
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        placement: The rank of each stage.
        costs: Seconds (or any unit of time) of each action.
        latency: Time that a result takes to another rank, in the same unit.

    Returns:
        The table, one list for each rank up to the highest in ``placement``.

    Raises:
        ConfigurationError: If the policy's cap admits no micro-batch.
    """
    caps = [policy.in_flight(s, num_stages, num_microbatches) if policy.in_flight else None for s in range(num_stages)]
    table: Table = [[] for _ in range(max(placement) + 1)]
    upcoming = {(kind, stage): 0 for kind in policy.prefer for stage in range(num_stages)}
    ends: dict[Action, float] = {}
    free = [0.0] * len(table)

    def arrival(source: Action, rank: int) -> float:
        end = ends.get(source, float("inf"))
        return end if placement[source.stage] == rank else end + delay(latency, source)

    def ready(action: Action, rank: int, now: float) -> bool:
        if action.microbatch >= num_microbatches:
            return False
        cap = caps[action.stage]
        if action.kind == "F" and cap is not None and action.microbatch - upcoming["B", action.stage] >= cap:
            return False
        return all(arrival(source, rank) <= now for source in dependencies(action, num_stages))

    # Nothing changes between the moments at which an action ends or its result arrives elsewhere.
    moments = [0.0]
    while moments:
        now = heapq.heappop(moments)
        while moments and moments[0] == now:
            heapq.heappop(moments)
        for rank in range(len(table)):
            if free[rank] > now:
                continue
            actions = (Action(kind, stage, m) for (kind, stage), m in upcoming.items() if placement[stage] == rank)
            choices = [action for action in actions if ready(action, rank, now)]
            if not choices:
                continue
            best = min(choices, key=lambda a: (policy.prefer.index(a.kind), a.microbatch, a.stage))
            table[rank].append(best)
            upcoming[best.kind, best.stage] += 1
            ends[best] = free[rank] = now + costs(best)
            heapq.heappush(moments, ends[best])
            heapq.heappush(moments, ends[best] + delay(latency, best))

    if len(ends) < len(upcoming) * num_microbatches:
        raise ConfigurationError(f"the schedule {policy.name!r} stalls: its caps in flight, by stage, are {caps}")
    return table


def delay(latency: Latency, source: Action) -> float:
    """Return the time that the result of ``source`` takes to another rank."""
    return latency(source) if callable(latency) else latency


def build(name: str, num_stages: int, num_microbatches: int, num_ranks: int) -> Table:
    """Make the table of a schedule by its name; ranks without a stage get an empty list.

    Raises:
        ConfigurationError: If the schedule is unknown, a number is not a positive integer, or there are more
            stages than ranks.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name).lower(), SCHEDULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"unknown schedule {name!r}{hint} (known: {', '.join(map(repr, SCHEDULES))})")
    return _build(SCHEDULES[name], num_stages, num_microbatches, num_ranks)


def forward_only(num_stages: int, num_microbatches: int, num_ranks: int) -> Table:
    """Make the table of an evaluation step; raises as ``build`` does."""
    return _build(FORWARD_ONLY, num_stages, num_microbatches, num_ranks)


def _build(policy: Policy, num_stages: int, num_microbatches: int, num_ranks: int) -> Table:
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_ranks": num_ranks}
    for what, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{what}={value!r}: a whole number of at least 1 is needed")
    if num_stages > num_ranks:
        raise ConfigurationError(f"{num_stages} stages do not fit on {num_ranks} ranks; use at most one stage a rank")
    table = list_schedule(policy, num_stages, num_microbatches, place(num_stages))
    return table + [[] for _ in range(num_ranks - num_stages)]
