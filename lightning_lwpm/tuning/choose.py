"""Chooses partition, number of micro-batches and schedule: each candidate is planned, run in thought, and compared."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_lwpm.partition.cuts import label
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.merge import NothingFits
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.pipeline.schedule import build
from lightning_lwpm.tuning.balance import balanced
from lightning_lwpm.tuning.lineup import Lineup, called_again, lineups
from lightning_lwpm.tuning.needs import fits, memory_of, places_of, room_of
from lightning_lwpm.tuning.predict import predict, shortest
from lightning_lwpm.tuning.recomputed import look_at
from lightning_lwpm.tuning.refusal import refusal
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["Choice", "candidates", "choose", "planned"]

_AS_GOOD = 1.03
"""Fewer micro-batches are preferred where they cost no more than this times the best."""

_FASTER = 1.01
"""1F1B, which holds the fewest activations, comes first; another schedule must be faster by a hundredth."""

_ORDERED = 512
"""Up to so many stages times micro-batches a schedule is made to measure; with more, it takes long and gains little."""


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
    each = lineups(wish, num_ranks, places_of(looks[0]), train)
    if not train:
        try:
            return Choice(planned(looks[0], seen, num_ranks, wish, 1, each[0]), looks[0])
        except NothingFits:
            raise refusal(looks, seen, num_ranks, None, wish, 1, each[0]) from None
    found: dict[int, tuple[Look, list[PartitionPlan]]] = {}
    counts = candidates(wish.num_microbatches, min(num_ranks, each[0].stages), samples, wish.least_samples)
    for count in counts:
        look = look_at(looks, (samples or 1) / count, wish)
        plans = _plans(look, seen, num_ranks, wish, count, called_again(look, seen, wish, num_ranks) + each)
        if plans:
            found[count] = look, plans
    if not found:  # tell of what needs least: the smallest micro-batches, and the schedule that holds fewest of them
        raise refusal(looks, seen, num_ranks, samples, wish, counts[-1], each[0])
    seconds = {count: _seconds(_best(plans)) for count, (_, plans) in found.items()}
    least = min(seconds.values())
    count = next(count for count in seconds if seconds[count] <= least * _AS_GOOD)
    look, plans = found[count]
    evened = [_evened(lineup, look, seen, num_ranks, wish, count) for lineup in each]
    plans += _plans(look, seen, num_ranks, wish, count, [lineup for lineup in evened if lineup])
    best = _best(plans)
    if wish.schedule == "auto":
        made = _made_to_measure(look, [best, *sorted(plans, key=_seconds)], count)
        best = _best([best, *sorted(_plans(look, seen, num_ranks, wish, count, made), key=_seconds)])
    return Choice(best, look, {**seconds, count: _seconds(best)})


def _made_to_measure(look: Look, plans: Sequence[PartitionPlan], count: int) -> list[Lineup]:
    """The stages of some plans, with a schedule made for each: of the first, and of others as far as time allows."""
    least, room = _seconds(plans[0]), _ORDERED
    found: list[Lineup] = []
    for plan in plans:
        lineup = Lineup("auto", plan.ranks, _begins(look, plan.cuts))
        size = len(plan.stages) * count
        if 1 < size <= room and lineup not in found and shortest(plan) * _FASTER < least:
            found.append(lineup)
            room -= size
    return found


def _evened(lineup: Lineup, look: Look, seen: Probe, num_ranks: int, wish: Wish, count: int) -> Lineup | None:
    """The same line-up with cuts that even out ranks with several stages; ``None`` where that makes no difference."""
    if len(set(lineup.ranks)) == lineup.stages or wish.partition != "auto" or lineup.stages * count > _ORDERED:
        return None
    memory = memory_of(look, seen, lineup, count, wish)
    try:
        plan = planned(look, seen, num_ranks, wish, count, lineup)
    except NothingFits:
        return None
    few = min(count, 2 * num_ranks)  # as many as show how ranks wait for each other
    table = build(lineup.schedule, lineup.stages, few, num_ranks, lineup.ranks)
    feasible = memory.feasible if memory.limited else None
    cuts = balanced(look.timeline, look.costs, plan.cuts, table, lineup.ranks, feasible)
    return replace(lineup, begins=_begins(look, cuts)) if cuts != plan.cuts else None


def _begins(look: Look, cuts: Sequence[int]) -> tuple[str, ...]:
    """What a user would call the places of some cuts."""
    calls = [look.timeline.calls[cut] for cut in cuts]
    return tuple(label(call.name, call.occurrence) for call in calls)


def _plans(
    look: Look, seen: Probe, num_ranks: int, wish: Wish, count: int, each: Sequence[Lineup]
) -> list[PartitionPlan]:
    """The plans of those line-ups that fit the devices."""
    found = []
    for lineup in each:
        with suppress(NothingFits):
            found.append(planned(look, seen, num_ranks, wish, count, lineup))
    return found


def _best(plans: Sequence[PartitionPlan]) -> PartitionPlan:
    """The first of some plans than which no later one is clearly faster."""
    best = plans[0]
    for plan in plans[1:]:
        if _seconds(plan) * _FASTER < _seconds(best):
            best = plan
    return best


def candidates(wanted: int | Literal["auto"], stages: int, samples: int | None, least: int = 1) -> list[int]:
    """The numbers of micro-batches to consider, ascending: with "auto" one to sixteen for each stage.

    Args:
        wanted: A number, or "auto".
        stages: Number of stages.
        samples: Samples of a batch, if it has any to split.
        least: The fewest samples of a micro-batch, with "auto" and where the batch has as many.
    """
    if wanted != "auto":
        return [min(wanted, samples) if samples else wanted]
    if stages == 1 or samples is None:
        return [1]
    return sorted({max(1, min(stages * turns, samples // least)) for turns in (1, 2, 4, 8, 16)})


def planned(look: Look, seen: Probe, num_ranks: int, wish: Wish, count: int, lineup: Lineup) -> PartitionPlan:
    """The best plan for a number of micro-batches and a line-up, and what is expected of it.

    Args:
        look: The step at the size of these micro-batches.
        seen: Where parameters are used.
        num_ranks: Number of ranks.
        wish: What the user asked for.
        count: Number of micro-batches.
        lineup: The schedule, and where its stages lie.

    Raises:
        ConfigurationError: if it does not fit the devices, or the partition cannot be made.
    """
    assert not isinstance(wish.partition, PartitionPlan), "resolve the wish first"
    memory = memory_of(look, seen, lineup, count, wish)

    def made(partition: str | Sequence[str]) -> PartitionPlan:
        turns = count if lineup.schedule else None
        # too few names are an error
        stages = lineup.stages if wish.partition == "auto" else max(lineup.stages, num_ranks)
        return make_plan(look.timeline, num_ranks, partition, lineup.ranks, look.costs, turns, memory, stages)

    plan = made(lineup.begins or wish.partition)
    if not lineup.schedule:
        return plan
    if lineup.begins and not fits(plan, wish):
        raise NothingFits(f"the stages {plan.cuts} do not fit the devices")
    plan = replace(plan, room=room_of(plan, wish))
    return replace(plan, prediction=predict(plan, lineup.schedule, count, look.costs.measured))


def _seconds(plan: PartitionPlan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds
