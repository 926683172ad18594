"""Runs a plan's schedule in thought, with the seconds of its stages and of its links."""

from collections.abc import Callable
from functools import lru_cache

from lightning_lwpm.partition.plan import PartitionPlan, Prediction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.schedule import Action, Memory, Table, build
from lightning_lwpm.pipeline.simulate import bound, simulate

__all__ = ["SPLIT", "in_flight", "latency_of", "predict", "seconds_of", "shortest", "table_of"]

SPLIT = 0.06
"""A backward pass in two parts takes so much longer: 3 to 9 % were seen with a GPT of 8 blocks of width 256."""

_LIKE_1F1B = ("sequential", "async")
"""What is no order of actions of its own; a batch by itself goes by this one's."""


@lru_cache(maxsize=4096)
def in_flight(schedule: str, ranks: tuple[int, ...], num_microbatches: int) -> tuple[int, ...]:
    """The most micro-batches of which each stage keeps activations at once.

    Args:
        schedule: Its name. ``"auto"`` keeps what there is room for; to see whether a plan fits, as few as ``"1f1b"``.
            ``"async"`` is ``"1f1b"`` without an end; ``"sequential"`` has one micro-batch.
        ranks: The rank of each stage.
        num_microbatches: Number of micro-batches.
    """
    name = "1f1b" if schedule in ("auto", *_LIKE_1F1B) else schedule
    table = build(name, len(ranks), num_microbatches, max(ranks) + 1, ranks)
    return simulate(table, ranks).peak_kept


def table_of(plan: PartitionPlan, schedule: str) -> Callable[[int], Table]:
    """From the number of micro-batches to the table of a schedule, the same on all ranks.

    Args:
        plan: The plan.
        schedule: Its name; ``"auto"`` orders actions by the seconds of the plan's stages and links, in the room that
            devices have for micro-batches in flight. The table of ``"async"`` is that of a batch by itself, and so is
            that of ``"sequential"``, which tells what passes take: the order is that of the user's step.
    """
    memory = Memory([stage.microbatch_bytes for stage in plan.stages], plan.room) if plan.room else None

    def table(count: int) -> Table:
        if schedule != "auto":
            name = "1f1b" if schedule in _LIKE_1F1B else schedule
            return build(name, len(plan.stages), count, plan.num_ranks, plan.ranks)
        costs, latency = seconds_of(plan), latency_of(plan)
        return build("auto", len(plan.stages), count, plan.num_ranks, plan.ranks, costs, latency, memory)

    return table


def predict(plan: PartitionPlan, schedule: str, num_microbatches: int, measured: int = 0) -> Prediction:
    """What is expected of a plan.

    Args:
        plan: With the seconds of each stage and link.
        schedule: Its name.
        num_microbatches: Number of micro-batches.
        measured: How many of the layer calls have been measured.
    """
    if schedule == "async":  # no stage waits but for the slowest
        busy = [num_microbatches * (stage.forward_seconds + stage.backward_seconds) for stage in plan.stages]
        bubble = 1 - sum(busy) / (len(busy) * max(busy))
        late = tuple(Delay(stage, len(busy), num_microbatches).mean for stage in range(len(busy)))
        return Prediction(num_microbatches, schedule, max(busy), bubble, measured, late)
    run = simulate(table_of(plan, schedule)(num_microbatches), plan.ranks, seconds_of(plan), latency_of(plan))
    return Prediction(num_microbatches, schedule, run.makespan, run.bubble, measured)


def shortest(plan: PartitionPlan) -> float:
    """Seconds of a step that no order of the plan's actions can beat."""
    assert plan.prediction is not None
    table = table_of(plan, plan.prediction.schedule)(plan.prediction.num_microbatches)
    return bound(table, plan.ranks, seconds_of(plan), latency_of(plan))


def seconds_of(plan: PartitionPlan) -> Callable[[Action], float]:
    """The seconds of each action of a plan."""
    by_kind = {
        "F": [stage.forward_seconds for stage in plan.stages],
        "B": [stage.backward_seconds for stage in plan.stages],
        "I": [(1 + SPLIT) * stage.backward_seconds - stage.weight_seconds for stage in plan.stages],
        "W": [stage.weight_seconds for stage in plan.stages],
    }
    return lambda action: by_kind[action.kind][action.stage]


def latency_of(plan: PartitionPlan) -> Callable[[Action], float]:
    """The seconds that the result of each action of a plan takes to another rank."""
    return lambda action: plan.stages[action.stage if action.kind == "F" else action.stage - 1].onward_seconds
