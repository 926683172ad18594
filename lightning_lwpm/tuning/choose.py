"""Chooses partition, number of micro-batches and schedule: each candidate is planned, run in thought, and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.merge import NothingFits
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.pipeline.schedule import SCHEDULES, place
from lightning_lwpm.tuning.needs import memory_of, stages_of
from lightning_lwpm.tuning.predict import predict
from lightning_lwpm.tuning.refusal import refusal
from lightning_lwpm.tuning.sized import Look, at
from lightning_lwpm.tuning.wish import Wish

__all__ = ["Choice", "candidates", "choose", "planned"]

_AS_GOOD = 1.03
"""Fewer micro-batches are preferred where they cost no more than this times the best."""

_FASTER = 1.01
"""1F1B, which holds the fewest activations, comes first; another schedule must be faster by a hundredth."""


@dataclass(frozen=True)
class Choice:
    """A plan, and what it was chosen from.

    Args:
        plan: The best one.
        look: The step at the size of its micro-batches.
        considered: Number of micro-batches -> predicted seconds of a step with the best plan for it.
    """

    plan: PartitionPlan
    look: Look
    considered: Mapping[int, float] = field(default_factory=dict)


def choose(
    looks: Sequence[Look], seen: Probe, num_ranks: int, samples: int | None, wish: Wish, train: bool = True
) -> Choice:
    """Choose what is left open by the user.

    Args:
        looks: The step at one or two sizes of micro-batch.
        seen: One of them, for where parameters are used.
        num_ranks: Number of ranks.
        samples: Samples of a batch; ``None`` if batches have none to split.
        wish: What the user asked for.
        train: Whether there is a backward pass.

    Raises:
        ConfigurationError: if nothing that the user allows fits the devices, or the partition cannot be made.
    """
    if not train:
        try:
            return Choice(planned(looks[0], seen, num_ranks, wish, 1, ""), looks[0])
        except NothingFits:
            raise refusal(looks, seen, num_ranks, None, wish, 1, "") from None
    found: dict[int, Choice] = {}
    schedules = sorted(SCHEDULES) if wish.schedule == "auto" else [wish.schedule]
    counts = candidates(wish.num_microbatches, stages_of(looks[0], num_ranks), samples)
    for count in counts:
        look = at(looks, (samples or 1) / count)
        for schedule in schedules:
            try:
                plan = planned(look, seen, num_ranks, wish, count, schedule)
            except NothingFits:
                continue
            if count not in found or _seconds(plan) * _FASTER < _seconds(found[count].plan):
                found[count] = Choice(plan, look)
    if not found:  # tell of what needs least: the smallest micro-batches, and the schedule that holds fewest of them
        raise refusal(looks, seen, num_ranks, samples, wish, counts[-1], schedules[0])
    seconds = {count: _seconds(choice.plan) for count, choice in found.items()}
    best = min(seconds.values())
    chosen = found[next(count for count in seconds if seconds[count] <= best * _AS_GOOD)]
    return replace(chosen, considered=seconds)


def candidates(wanted: int | Literal["auto"], stages: int, samples: int | None) -> list[int]:
    """The numbers of micro-batches to consider, ascending: with "auto" one to sixteen for each stage."""
    if wanted != "auto":
        return [min(wanted, samples) if samples else wanted]
    if stages == 1 or samples is None:
        return [1]
    return sorted({min(stages * turns, samples) for turns in (1, 2, 4, 8, 16)})


def planned(look: Look, seen: Probe, num_ranks: int, wish: Wish, count: int, schedule: str) -> PartitionPlan:
    """The best plan for a number of micro-batches and a schedule, and what is expected of it.

    Args:
        look: The step at the size of these micro-batches.
        seen: Where parameters are used.
        num_ranks: Number of ranks.
        wish: What the user asked for.
        count: Number of micro-batches.
        schedule: Its name; "" for evaluation.

    Raises:
        ConfigurationError: if it does not fit the devices, or the partition cannot be made.
    """
    assert not isinstance(wish.partition, PartitionPlan), "resolve the wish first"
    memory = memory_of(look, seen, stages_of(look, num_ranks), count, schedule, wish)
    plan = make_plan(look.timeline, num_ranks, wish.partition, place, look.costs, count if schedule else None, memory)
    if not schedule:
        return plan
    return replace(plan, prediction=predict(plan, look.costs.link, schedule, count, look.costs.measured))


def _seconds(plan: PartitionPlan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds
