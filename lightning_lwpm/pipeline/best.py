"""The schedule ``auto``: of all schedules and their variants, the table whose simulated makespan is least."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.action import Costs, Latency, Table, unit
from lightning_lwpm.pipeline.policies import GPIPE, POLICIES, ZB1P, ZBV, Caps, Pipeline, Policy, unlimited
from lightning_lwpm.pipeline.scheduler import list_schedule, without_needless
from lightning_lwpm.pipeline.simulate import kept_by_ranks, simulate

_SPLIT_LAST = (1, 2, 3, 4, 6, 8, 12, 16)

LATE = replace(ZB1P, name="late", prefer=("I", "F", "W"))
"""As ``zb1p``, but gradients first: where few passes are split, W alone does not fill what waiting for them leaves."""


@dataclass(frozen=True)
class Memory:
    """What ranks can keep of the micro-batches under way.

    Args:
        per_microbatch: For each stage, what it keeps of one micro-batch until its backward pass is done: bytes, or
            1 to count micro-batches.
        limits: For each rank, the most that it can keep, in the same unit.
    """

    per_microbatch: Sequence[float]
    limits: Sequence[float]


def check_memory(table: Table, memory: Memory, name: str) -> None:
    """Raise if a table keeps more than the ranks can.

    Raises:
        ConfigurationError: Naming the rank, what it would keep and its limit.
    """
    for rank, (kept, limit) in enumerate(zip(kept_by_ranks(table, memory.per_microbatch), memory.limits, strict=False)):
        if kept > limit:
            raise ConfigurationError(
                f"the schedule {name!r} keeps up to {kept:g} on rank {rank}, whose limit is {limit:g}; use smaller "
                "micro-batches" + ("" if name == "auto" else ", or the schedule 'auto'")
            )


def best_table(
    placement: Sequence[int],
    num_microbatches: int,
    costs: Costs = unit,
    latency: Latency = 0.0,
    memory: Memory | None = None,
    split: bool = True,
) -> Table:
    """Make every candidate, and return the one that fits the memory and takes least; of equals, what keeps least.

    Candidates are all of ``POLICIES``, made for the given costs and for unit costs, with deeper warm-ups where a
    latency has to be hidden, with shallower ones down to one micro-batch a stage where memory is short, and with
    backward passes split at the end only: elsewhere it does not pay, as a pass takes longer in two parts. So the table
    is never longer than that of a schedule that has a name.

    Args:
        placement: The rank of each stage.
        num_microbatches: Number of micro-batches.
        costs: Time of each action, B and its parts I and W alike.
        latency: Time that a result takes to another rank.
        memory: What ranks can keep; by default anything.
        split: Whether the backward pass may be split into I and W.

    Raises:
        ConfigurationError: If not even one micro-batch at a time fits.
    """
    weights = memory.per_microbatch if memory else [1.0] * len(placement)
    limits = memory.limits[: max(placement) + 1] if memory else [math.inf] * (max(placement) + 1)
    found: list[tuple[float, float, Table]] = []
    table: Table = []
    for policy in _candidates(num_microbatches, split):
        # what splits late is made for its costs only
        for seconds, link in ((costs, latency), (unit, 0.0))[: 2 if math.isinf(policy.split_last) else 1]:
            made = list_schedule(policy, len(placement), num_microbatches, placement, seconds, link)
            table = without_needless(made)
            kept = kept_by_ranks(table, weights)
            if all(amount <= limit for amount, limit in zip(kept, limits, strict=True)):
                found.append((simulate(table, placement, costs, latency).makespan, max(kept), table))
    if not found and memory is not None:
        check_memory(table, memory, "auto")  # says what the last candidate, one micro-batch at a time, needs
    return min(found, key=lambda candidate: candidate[:2])[2]


def _candidates(num_microbatches: int, split: bool) -> Iterator[Policy]:
    """List the named policies and their variants, in the end the one that keeps least."""
    depths = [2**i for i in range(num_microbatches.bit_length())]
    for policy in POLICIES.values():
        if "I" in policy.prefer and not split:
            continue
        yield policy
        if policy.caps is not unlimited:
            yield from (replace(policy, caps=_deeper(policy.caps, extra)) for extra in depths)
    for policy in (LATE, ZBV) if split else ():
        free = replace(policy, caps=unlimited, in_order=False)
        for base in (policy, *(replace(policy, caps=_deeper(policy.caps, extra)) for extra in depths[::2]), free):
            yield from (replace(base, split_last=last) for last in _SPLIT_LAST if last <= num_microbatches)
    for base in (ZB1P, GPIPE) if split else (GPIPE,):
        for depth in reversed(depths):
            yield Policy(f"at most {depth}", base.prefer, _at_most(depth, "I" in base.prefer))


def _deeper(caps: Callable[[Pipeline], Caps], extra: int) -> Callable[[Pipeline], Caps]:
    return lambda pipeline: caps(pipeline).deeper(extra, pipeline)


def _at_most(depth: int, split: bool) -> Callable[[Pipeline], Caps]:
    """Let stage s hold ``depth`` micro-batches, or fewer if the end is near; no rank keeps more until W either."""

    def caps(pipeline: Pipeline) -> Caps:
        count = pipeline.num_stages
        stage = [min(depth, count - s) for s in range(count)]
        kept = [sum(stage[s] for s in stages) if split else math.inf for stages in pipeline.stages_by_rank]
        return unlimited(pipeline)._replace(stage=stage, kept=kept)

    return caps
