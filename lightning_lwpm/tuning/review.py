"""Compares what was expected of a plan with what came, and looks for a better plan by what came.

::

    costs of the layers  x  measured / expected of their stage  ->  corrected costs  ->  best plan  ->  worth a move?
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_lwpm.partition.costs import Costs
from lightning_lwpm.partition.describe import Probe
from lightning_lwpm.partition.merge import NothingFits
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import human_seconds
from lightning_lwpm.tuning.choose import planned
from lightning_lwpm.tuning.lineup import Lineup
from lightning_lwpm.tuning.predict import SPLIT
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["Review", "StageTimes", "corrected", "measured", "review"]

WORTH = 1.05
"""Another partition is worth telling of where this one takes more than this times its step."""


@dataclass(frozen=True)
class StageTimes:
    """What a stage has measured of itself: median seconds of one micro-batch, waits left out.

    Args:
        forward: The forward pass.
        backward: The backward pass.
    """

    forward: float
    backward: float


def measured(
    forward: float | None, whole: float | None, inputs: float | None, weights: float | None
) -> StageTimes | None:
    """A stage's times from the seconds of its passes; ``None`` where it has not done both ways yet.

    A table may have a stage do some backward passes whole and others in two parts.

    Args:
        forward: Forward passes.
        whole: Backward passes as one.
        inputs: The part of a backward pass that makes the gradient of its input.
        weights: The part that makes the gradients of weights.
    """
    parts = (inputs or 0.0) + (weights or 0.0)
    backward = whole if whole is not None else parts / (1 + SPLIT)
    return StageTimes(forward, backward) if forward is not None and backward > 0 else None


@dataclass(frozen=True)
class Review:
    """A plan after some steps.

    Args:
        plan: What is expected of it now.
        better: The best plan by the corrected costs.
        expected: What was expected of each stage.
        measured: What each stage has measured.
        costs: The corrected costs of the layers.
    """

    plan: PartitionPlan
    better: PartitionPlan
    expected: tuple[StageTimes, ...]
    measured: tuple[StageTimes, ...]
    costs: Costs

    @property
    def gain(self) -> float:
        """How many times longer a step takes than with the better plan."""
        assert self.plan.prediction is not None and self.better.prediction is not None
        return self.plan.prediction.step_seconds / self.better.prediction.step_seconds

    @property
    def worth_telling(self) -> bool:
        """Whether another partition is over 5 % faster."""
        return self.better.cuts != self.plan.cuts and self.gain > WORTH

    def text(self) -> str:
        """The advice, with the numbers."""
        assert self.plan.prediction is not None and self.better.prediction is not None
        then = [human_seconds(stage.forward + stage.backward) for stage in self.expected]
        now = [human_seconds(stage.forward + stage.backward) for stage in self.measured]
        times = ", ".join(f"stage {i} {a} (expected {b})" for i, (a, b) in enumerate(zip(now, then, strict=True)))
        cuts = [stage.begins for stage in self.better.stages[1:]]
        return (
            f"another partition would be faster. Measured, for one micro-batch: {times}. A step takes "
            f"{human_seconds(self.plan.prediction.step_seconds)} now; with partition={cuts!r} it is expected to take "
            f"{human_seconds(self.better.prediction.step_seconds)}: {self.gain - 1:.0%} faster. Pass that, or let the "
            "layers move by themselves at the end of an epoch with `repartition_every_n_epochs=1`."
        )


def review(
    look: Look, seen: Probe, plan: PartitionPlan, num_ranks: int, wish: Wish, measured: Sequence[StageTimes]
) -> Review:
    """Compare a plan with what its stages have measured.

    Args:
        look: The step as the plan took it.
        seen: Where parameters are used.
        plan: The plan that runs.
        num_ranks: Number of ranks.
        wish: What the user asked for; the partition is left open here.
        measured: What each stage has measured.
    """
    assert plan.prediction is not None
    count, schedule = plan.prediction.num_microbatches, plan.prediction.schedule
    look = replace(look, costs=corrected(look.costs, plan, measured))
    cuts = [stage.begins for stage in plan.stages[1:]]
    lineup = Lineup(schedule, plan.ranks)
    now = planned(look, seen, max(plan.ranks) + 1, replace(wish, partition=cuts), count, lineup)
    try:
        better = planned(look, seen, num_ranks, replace(wish, partition="auto"), count, lineup)
    except NothingFits:  # the user's own partition runs, whatever was expected of it
        better = now
    return Review(
        now,
        better,
        tuple(StageTimes(stage.forward_seconds, stage.backward_seconds) for stage in plan.stages),
        tuple(measured),
        look.costs,
    )


def corrected(costs: Costs, plan: PartitionPlan, measured: Sequence[StageTimes]) -> Costs:
    """The costs of the layers, once their stages have been measured.

    Args:
        costs: As they were when the plan was made, for its size of micro-batches.
        plan: The plan.
        measured: What each of its stages has measured.
    """
    factors = [
        (_ratio(now.forward, stage.forward_seconds), _ratio(now.backward, stage.backward_seconds))
        for now, stage in zip(measured, plan.stages, strict=True)
    ]
    changed = costs.corrected(plan.cuts, factors)
    return replace(changed, calls=tuple(replace(call, measured=True) for call in changed.calls))


def _ratio(measured: float, expected: float) -> float:
    return measured / expected if measured > 0 and expected > 0 else 1.0
