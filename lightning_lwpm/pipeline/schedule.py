"""Schedules as data: one greedy list scheduler turns a policy into the table that is run, simulated and drawn.

::

    Action  2F3                 stage 2, forward, micro-batch 3
    Table   [[Action, ...]]     one list per rank, in the order of execution
"""

import difflib
from collections.abc import Sequence

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.action import Action, Costs, Latency, Table, delay, dependencies, unit
from lightning_lwpm.pipeline.best import Memory, best_table, check_memory
from lightning_lwpm.pipeline.policies import FORWARD_ONLY, GPIPE, ONE_F_ONE_B, POLICIES, Policy
from lightning_lwpm.pipeline.scheduler import list_schedule, without_needless

__all__ = [
    "FORWARD_ONLY",
    "GPIPE",
    "ONE_F_ONE_B",
    "POLICIES",
    "Action",
    "Costs",
    "Latency",
    "Memory",
    "Policy",
    "Table",
    "build",
    "delay",
    "dependencies",
    "forward_only",
    "list_schedule",
    "place",
    "unit",
]


def place(num_stages: int, num_ranks: int | None = None, style: str = "loop") -> list[int]:
    """Return the rank of each stage: the last one on rank 0, where Lightning reports the loss.

    >>> place(4), place(4, 2), place(4, 2, style="v")
    ([3, 2, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0])

    Args:
        num_stages: Number of stages.
        num_ranks: Number of ranks, by default that of stages. Surplus ranks have no stage.
        style: ``"loop"``: each next stage on the next rank, round and round. ``"v"``: there and back again, so that
            with two stages a rank the first one is on rank 0 too.

    Raises:
        ConfigurationError: If the style is unknown.
    """
    ranks = num_stages if num_ranks is None else num_ranks
    to_the_end = range(num_stages - 1, -1, -1)
    if style == "loop":
        return [after % ranks for after in to_the_end]
    if style == "v":
        return [min(after % (2 * ranks), 2 * ranks - 1 - after % (2 * ranks)) for after in to_the_end]
    raise ConfigurationError(f"style={style!r}: stages are placed as a 'loop' or as a 'v'")


def build(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_ranks: int,
    placement: Sequence[int] | None = None,
    costs: Costs = unit,
    latency: Latency = 0.0,
    memory: Memory | None = None,
    split: bool = True,
) -> Table:
    """Make the table of a schedule by its name; ranks without a stage get an empty list.

    Args:
        name: One of ``POLICIES``, or ``"auto"``: of them and of their variants the one whose simulated makespan is
            least (``best_table``).
        num_stages: Number of stages.
        num_microbatches: Number of micro-batches.
        num_ranks: Number of ranks.
        placement: The rank of each stage, in any order; by default as the schedule is meant.
        costs: Time of each action, in any unit.
        latency: Time that a result takes to another rank, in the same unit.
        memory: What the ranks can keep; by default anything.
        split: Whether ``"auto"`` may split backward passes.

    Raises:
        ConfigurationError: If the schedule is unknown, a number is not a positive integer, a stage has no rank, or
            the table does not fit the memory.
    """
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_ranks": num_ranks}
    if name == "auto":
        ranks = _placement(counts, placement, "auto", "loop")
        return _padded(best_table(ranks, num_microbatches, costs, latency, memory, split), num_ranks)
    if name not in POLICIES:
        known = ["auto", *POLICIES]
        near = difflib.get_close_matches(str(name).lower(), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"unknown schedule {name!r}{hint} (known: {', '.join(map(repr, known))})")
    policy = POLICIES[name]
    ranks = _placement(counts, placement, name, policy.style)
    table = without_needless(list_schedule(policy, num_stages, num_microbatches, ranks, costs, latency))
    if memory is not None:
        check_memory(table, memory, name)
    return _padded(table, num_ranks)


def forward_only(
    num_stages: int, num_microbatches: int, num_ranks: int, placement: Sequence[int] | None = None
) -> Table:
    """Make the table of an evaluation step; raises as ``build`` does."""
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_ranks": num_ranks}
    ranks = _placement(counts, placement, FORWARD_ONLY.name, FORWARD_ONLY.style)
    return _padded(list_schedule(FORWARD_ONLY, num_stages, num_microbatches, ranks), num_ranks)


def _padded(table: Table, num_ranks: int) -> Table:
    return table + [[] for _ in range(num_ranks - len(table))]


def _placement(counts: dict[str, int], placement: Sequence[int] | None, name: str, style: str) -> list[int]:
    for what, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{what}={value!r}: a whole number of at least 1 is needed")
    num_stages, num_ranks = counts["num_stages"], counts["num_ranks"]
    if placement is not None:
        if len(placement) != num_stages or not all(0 <= rank < num_ranks for rank in placement):
            raise ConfigurationError(
                f"placement={list(placement)!r}: give each of {num_stages} stages a rank from 0 to {num_ranks - 1}"
            )
        return list(placement)
    if style == "line" and num_stages > num_ranks:
        raise ConfigurationError(
            f"{num_stages} stages do not fit on {num_ranks} ranks; use at most one stage a rank with {name!r}, "
            "or give their placement"
        )
    return place(num_stages, min(num_stages, num_ranks), "v" if style == "v" else "loop")
