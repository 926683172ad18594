"""Chooses partition, number of micro-batches and schedule: each candidate is planned, run in thought, and compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.partition.planfile import load_plan
from lightning_lwpm.pipeline.schedule import SCHEDULES, place
from lightning_lwpm.tuning.predict import in_flight, predict
from lightning_lwpm.tuning.sized import Look, at

__all__ = ["Choice", "Wish", "choose"]

_AS_GOOD = 1.03
"""Fewer micro-batches are preferred where they cost no more than this times the best."""

_FASTER = 1.01
"""1F1B, which holds the fewest activations, comes first; another schedule must be faster by a hundredth."""


@dataclass(frozen=True)
class Wish:
    """What the user asked for, and what there is.

    Args:
        partition: "auto", the layers that begin stages, the path of a plan, or a plan.
        num_microbatches: A number, or "auto".
        schedule: A name, or "auto".
        limits: Bytes of each rank's device; infinite where there is no limit.
        state_factor: Bytes of optimizer state for each byte of trained parameters.
    """

    partition: str | Sequence[str] | PartitionPlan = "auto"
    num_microbatches: int | Literal["auto"] = "auto"
    schedule: str = "auto"
    limits: tuple[float, ...] = ()
    state_factor: float = 0.0

    def resolved(self) -> "Wish":
        """The same with the layers that a plan names, and what else it says where the user has left it open.

        Raises:
            ConfigurationError: if a plan's file cannot be used.
        """
        if isinstance(self.partition, PartitionPlan):
            told = self.partition.prediction
            cuts = [stage.begins for stage in self.partition.stages[1:]]
            count, schedule = (told.num_microbatches, told.schedule) if told is not None else (None, None)
        elif isinstance(self.partition, str) and self.partition != "auto":
            file = load_plan(self.partition)
            cuts, count, schedule = file.cuts, file.num_microbatches, file.schedule
        else:
            return self
        return replace(
            self,
            partition=cuts,
            num_microbatches=(count or "auto") if self.num_microbatches == "auto" else self.num_microbatches,
            schedule=(schedule or "auto") if self.schedule == "auto" else self.schedule,
        )


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
        return Choice(planned(looks[0], seen, num_ranks, wish, 1, ""), looks[0])
    found: dict[int, Choice] = {}
    refusal: ConfigurationError | None = None
    for count in candidates(wish.num_microbatches, _stages(looks[0], num_ranks), samples):
        look = at(looks, (samples or 1) / count)
        for schedule in sorted(SCHEDULES) if wish.schedule == "auto" else [wish.schedule]:
            try:
                plan = planned(look, seen, num_ranks, wish, count, schedule)
            except ConfigurationError as error:
                refusal = refusal or error
                continue
            if count not in found or _seconds(plan) * _FASTER < _seconds(found[count].plan):
                found[count] = Choice(plan, look)
    if not found:
        assert refusal is not None
        raise refusal
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
    memory = memory_of(look, seen, _stages(look, num_ranks), count, schedule, wish)
    plan = make_plan(look.timeline, num_ranks, wish.partition, place, look.costs, count if schedule else None, memory)
    if not schedule:
        return plan
    return replace(plan, prediction=predict(plan, look.costs.link, schedule, count, look.costs.measured))


def _stages(look: Look, num_ranks: int) -> int:
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
        boundary=look.timeline.boundary_bytes,
        # at work on a call: what it takes, what it gives, and in the backward pass a new gradient of its weights
        transient=[2 * call.passing_bytes + (call.parameter_bytes if schedule else 0) for call in calls],
        in_flight=lambda stage, stages: in_flight(schedule, stages, count)[stage] if schedule else 1,
        limits=[wish.limits[rank] for rank in place(stages)] if wish.limits else [math.inf] * stages,
    )


def _seconds(plan: PartitionPlan) -> float:
    assert plan.prediction is not None
    return plan.prediction.step_seconds
