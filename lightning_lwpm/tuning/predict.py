"""Runs a plan's schedule in thought, with the seconds of its stages and of its links."""

from functools import lru_cache

from lightning_lwpm.partition.costs import Link
from lightning_lwpm.partition.plan import PartitionPlan, Prediction
from lightning_lwpm.pipeline.schedule import Action, build
from lightning_lwpm.pipeline.simulate import simulate

__all__ = ["in_flight", "predict"]


@lru_cache(maxsize=4096)
def in_flight(schedule: str, num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """The most micro-batches that each stage holds between their forward and their backward pass."""
    table = build(schedule, num_stages, num_microbatches, num_stages)
    return simulate(table, _ranks(table, num_stages)).peak_in_flight


def predict(plan: PartitionPlan, link: Link, schedule: str, num_microbatches: int, measured: int = 0) -> Prediction:
    """What is expected of a plan.

    Args:
        plan: With the seconds of each stage, and what it sends onward.
        link: The connection of neighbouring ranks.
        schedule: Its name.
        num_microbatches: Number of micro-batches.
        measured: How many of the layer calls have been measured.
    """
    stages = plan.stages
    table = build(schedule, len(stages), num_microbatches, len(stages))

    def seconds(action: Action) -> float:
        stage = stages[action.stage]
        return stage.forward_seconds if action.kind == "F" else stage.backward_seconds

    def latency(action: Action) -> float:
        crossed = action.stage if action.kind == "F" else action.stage - 1
        return link.seconds(stages[crossed].bytes_onward)

    run = simulate(table, _ranks(table, len(stages)), seconds, latency)
    return Prediction(num_microbatches, schedule, run.makespan, run.bubble, measured)


def _ranks(table: list[list[Action]], num_stages: int) -> list[int]:
    """The rank of each stage in a table."""
    ranks = {action.stage: rank for rank, actions in enumerate(table) for action in actions}
    return [ranks[stage] for stage in range(num_stages)]
