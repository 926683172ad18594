"""Moves cuts between stages that share ranks until a step cannot be made shorter by one move.

Merging evens out the stages. Where a rank has several of them it is their sum that counts, and when they come:

::

    stages      0    1    2    3          ranks 1 0 1 0
    seconds     1    3    3    3          stage 0 + 2: 4, stage 1 + 3: 6; to move a layer from 1 to 0 helps
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from lightning_lwpm.partition.costs import Costs
from lightning_lwpm.partition.search import Mask
from lightning_lwpm.partition.timeline import Timeline
from lightning_lwpm.pipeline.schedule import Action, Table
from lightning_lwpm.pipeline.simulate import simulate

__all__ = ["balanced"]

_REACH = 3  # a cut moves over so many places at once
_ROUNDS = 8


def balanced(
    timeline: Timeline,
    costs: Costs,
    cuts: Sequence[int],
    table: Table,
    ranks: Sequence[int],
    feasible: Callable[[int, int], Mask] | None = None,
) -> list[int]:
    """Better cuts for a table, by moving one at a time.

    Args:
        timeline: The layer calls.
        costs: What they cost.
        cuts: Where stages 1, 2, ... begin.
        table: The order in which stages are run.
        ranks: The rank of each stage.
        feasible: Says what fits the device of a stage; see :func:`~lightning_lwpm.partition.merge.merge`.
    """
    places = [position for position in range(1, len(timeline.calls)) if timeline.allowed[position]]
    sums = {
        "F": np.cumsum([0.0, *(call.forward for call in costs.calls)]),
        "B": np.cumsum([0.0, *(call.backward for call in costs.calls)]),
        "I": np.cumsum([0.0, *(call.backward - call.weight for call in costs.calls)]),
        "W": np.cumsum([0.0, *(call.weight for call in costs.calls)]),
    }

    def step(found: Sequence[int]) -> float:
        edges = [0, *found, len(timeline.calls)]
        if feasible is not None:
            for stage, (begin, end) in enumerate(pairwise(edges)):
                if not feasible(stage, len(ranks))[begin, end]:
                    return float("inf")
        seconds = {kind: np.diff(prefix[edges]) for kind, prefix in sums.items()}
        onward = [costs.link.seconds(timeline.boundary_bytes[cut]) for cut in found]

        def latency(action: Action) -> float:
            return onward[action.stage if action.kind == "F" else action.stage - 1]

        return simulate(table, ranks, lambda action: float(seconds[action.kind][action.stage]), latency).makespan

    best, least = list(cuts), step(cuts)
    for _ in range(_ROUNDS):
        before = least
        for i in range(len(best)):
            here = places.index(best[i])
            low, high = best[i - 1] if i else 0, best[i + 1] if i + 1 < len(best) else len(timeline.calls)
            for place in places[max(0, here - _REACH) : here + _REACH + 1]:
                moved = [*best[:i], place, *best[i + 1 :]]
                if low < place < high and (found := step(moved)) < least * (1 - 1e-9):
                    best, least = moved, found
        if least == before:
            break
    return best
