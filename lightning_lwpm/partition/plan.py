"""Which stage computes which layer calls, on which rank: found by merging, or given by the user.

::

    timeline      embedding  h.0  h.1 | h.2  h.3  head        partition=["h.2"]
    stage                 0           |       1
    rank                  1           |       0               the last stage lives on rank 0
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.costs import Costs, estimate
from lightning_lwpm.partition.cuts import ancestors, find_cuts, label
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.merge import merge
from lightning_lwpm.partition.timeline import Timeline
from lightning_lwpm.partition.units import counted, human, human_bytes, human_seconds

__all__ = ["PartitionPlan", "Prediction", "StagePlan", "make_plan"]

Placement = Callable[[int], Sequence[int]] | Sequence[int]
"""The rank of each stage, or a function from the number of stages to them."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Args:
        index: Number of the stage, from 0 at the model's beginning.
        rank: The rank that executes it.
        calls: Its layer calls, as (name, occurrence), in execution order.
        parameters: Number of (scalar) parameters first used in it.
        parameter_bytes: Their bytes.
        share: Its part of the work of the whole step, from 0 to 1.
        bytes_onward: Bytes alive at its end, which later stages may need, for one micro-batch; 0 for the last stage.
        forward_seconds: Its forward pass of one micro-batch; on a nominal machine where nothing was measured.
        backward_seconds: The same for the whole backward pass.
        memory: Bytes that it needs on its device at the worst moment, by what they are for; empty if not known.
        weight_seconds: What of the backward pass can be put off: the gradients of weights.
        onward_seconds: The time that what it sends takes on its link; 0 for the last stage.
        microbatch_bytes: What of its memory each micro-batch in flight adds.
    """

    index: int
    rank: int
    calls: tuple[tuple[str, int], ...]
    parameters: int
    parameter_bytes: int
    share: float
    bytes_onward: int
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    weight_seconds: float = 0.0
    onward_seconds: float = 0.0
    microbatch_bytes: float = 0.0

    @property
    def begins(self) -> str:
        """The layer call with which it begins, as a user writes it."""
        return label(*self.calls[0])


@dataclass(frozen=True)
class Prediction:
    """What is expected of a plan.

    Args:
        num_microbatches: Of how many micro-batches.
        schedule: In which order.
        step_seconds: Forward and backward passes of a batch, without the optimizer.
        bubble: Idle part, from 0 to 1, of the ranks that have a stage.
        measured: How many of the layer calls have been measured; the others are estimated from FLOPs.
        late: For each stage, how many optimizer steps its gradients are late on average; empty where none is.
    """

    num_microbatches: int
    schedule: str
    step_seconds: float
    bubble: float
    measured: int = 0
    late: tuple[float, ...] = ()


@dataclass(frozen=True)
class PartitionPlan:
    """All stages, in execution order.

    Args:
        stages: The stages; fewer than ``num_ranks`` where the model has too few layers.
        num_ranks: Number of ranks; those without a stage stay idle.
        prediction: What is expected of it.
        room: For each rank, bytes that it has for micro-batches in flight; empty where devices have no limit.
    """

    stages: tuple[StagePlan, ...]
    num_ranks: int
    prediction: Prediction | None = None
    room: tuple[float, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return tuple(stage.rank for stage in self.stages)

    @property
    def goes_round(self) -> bool:
        """Whether each next stage is on the next rank, round and round, as where nobody says anything else."""
        ranks = min(self.num_ranks, len(self.stages))
        return self.ranks == tuple(after % ranks for after in reversed(range(len(self.stages))))

    @property
    def cuts(self) -> list[int]:
        """Index in the timeline of the first call of each stage but the first."""
        return list(accumulate(len(stage.calls) for stage in self.stages[:-1]))

    @cached_property
    def stage_of(self) -> dict[tuple[str, int], int]:
        """The stage of each layer call (name, occurrence)."""
        return {call: stage.index for stage in self.stages for call in stage.calls}

    def stage_holding(self, name: str) -> str | None:
        """Which stages hold a parameter or buffer, in words; ``None`` if it belongs to no layer that the plan names."""
        layer = max((call for call, _ in self.stage_of if name.startswith(f"{call}.")), key=len, default=None)
        holding = sorted({stage for (call, _), stage in self.stage_of.items() if call == layer})
        return " and ".join(f"stage {stage} (rank {self.ranks[stage]})" for stage in holding) or None

    def table(self) -> Table:
        """Draw the plan as a table, one row a stage, and one for each rank that holds none."""
        timed = self.prediction is not None and self.prediction.measured > 0
        table = Table("stage", "rank", "layers", title="partition", caption=self._caption() or None)
        for column in ("parameters", "forward + backward" if timed else "share of work", "memory", "sent onward"):
            table.add_column(column, justify="right")
        for stage, layers in zip(self.stages, self.layers(), strict=True):
            last = stage is self.stages[-1]
            times = f"{human_seconds(stage.forward_seconds)} + {human_seconds(stage.backward_seconds)}"
            table.add_row(
                str(stage.index),
                str(stage.rank),
                escape(layers),
                human(stage.parameters),
                f"{times} ({stage.share:.1%})" if timed else f"{stage.share:.1%}",
                human_bytes(sum(stage.memory.values())) if stage.memory else "-",
                "-" if last else human_bytes(stage.bytes_onward),
            )
        for rank in sorted(set(range(self.num_ranks)) - {stage.rank for stage in self.stages}):
            table.add_row("-", str(rank), "none", "-", "-", "-", "-")
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as YAML, to be read, edited, and given back as ``partition="plan.yaml"``."""
        from lightning_lwpm.partition.planfile import save_plan  # which knows plans

        save_plan(self, path)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw time, memory and traffic of the stages as a PNG or SVG picture."""
        from lightning_lwpm.partition.draw import draw_plan  # which knows plans, and needs matplotlib

        draw_plan(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers, strings, lists and dicts, ready for JSON or YAML."""
        stages = [
            {**asdict(stage), "calls": [list(call) for call in stage.calls], "memory": dict(stage.memory)}
            for stage in self.stages
        ]
        prediction = asdict(self.prediction) if self.prediction else None
        return {"stages": stages, "num_ranks": self.num_ranks, "prediction": prediction, "room": list(self.room)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PartitionPlan":
        """Build the plan that ``to_dict`` was called on."""
        stages = (
            StagePlan(**{**stage, "calls": tuple((str(name), int(k)) for name, k in stage["calls"])})
            for stage in data["stages"]
        )
        told = data.get("prediction")
        prediction = Prediction(**{**told, "late": tuple(told.get("late", ()))}) if told else None
        return cls(tuple(stages), data["num_ranks"], prediction, tuple(data.get("room", ())))

    def layers(self) -> Iterator[str]:
        """Name the layers of each stage by the largest modules that lie in it as a whole."""
        homes: dict[str, set[int]] = {}
        for stage in self.stages:
            for name, _ in stage.calls:
                for ancestor in ancestors(name):
                    homes.setdefault(ancestor, set()).add(stage.index)
        for stage in self.stages:
            whole = (next((a for a in ancestors(name) if len(homes[a]) == 1), name) for name, _ in stage.calls)
            labels = list(dict.fromkeys(whole))
            span = ", ".join(labels) if len(labels) <= 2 else f"{labels[0]} … {labels[-1]}"
            yield f"{span} ({len(stage.calls)} call{'s' if len(stage.calls) != 1 else ''})"

    def _caption(self) -> str:
        """What is expected of the plan, in a sentence."""
        told = self.prediction
        if told is None:
            return ""
        late = ", ".join(f"{steps:.3g}" for steps in told.late)
        late = f"Gradients are late, in optimizer steps on average by stage: {late}." if late else ""
        if not told.measured:
            return late
        calls = sum(len(stage.calls) for stage in self.stages)
        guessed = calls - told.measured
        source = f" {guessed} of {calls} layer calls are estimated from FLOPs." if guessed else ""
        expected = human_seconds(told.step_seconds)
        return (
            f"{counted(told.num_microbatches, 'micro-batch', 'micro-batches')}, {told.schedule}: expected {expected} a "
            f"batch without the optimizer, bubble {told.bubble:.0%}.{source}{' ' if late else ''}{late}"
        )


def make_plan(
    timeline: Timeline,
    num_ranks: int,
    partition: str | Sequence[str],
    placement: Placement,
    costs: Costs | None = None,
    microbatches: int | None = None,
    memory: Memory | None = None,
    num_stages: int | None = None,
) -> PartitionPlan:
    """Partition a timeline over ranks.

    Args:
        timeline: The layer calls of a step.
        num_ranks: Number of ranks.
        partition: ``"auto"`` for the best balance, or the layers that begin stages 1, 2, ...: see
            :func:`~lightning_lwpm.partition.cuts.find_cuts`.
        placement: The rank of each stage, or a function from the number of stages to them.
        costs: What the calls cost; estimated from FLOPs by default.
        microbatches: Number of micro-batches, over which filling and draining the pipeline spreads; many by default.
        memory: What the stages' devices hold; no limit by default.
        num_stages: Number of stages; by default one a rank.

    Returns:
        The plan. With ``"auto"`` it has fewer stages where the timeline has too few places to cut.

    Raises:
        ConfigurationError: If ``partition`` or ``placement`` does not fit the timeline and the ranks, or the model does
            not fit the devices.
    """
    if num_ranks < 1:
        raise ConfigurationError(f"num_ranks={num_ranks!r}: at least one rank is needed")
    if not timeline.calls:
        raise ConfigurationError("the step calls no layer, so there is nothing to partition; is the model empty?")
    costs = costs or estimate(timeline)
    num_stages = num_stages or num_ranks
    if isinstance(partition, str):
        if partition != "auto":
            raise ConfigurationError(
                f"unknown partition={partition!r}; use 'auto', or a list of the layers that begin a stage, "
                f"such as [{partition!r}]"
            )
        # Activations cross in the forward pass and gradients of the same size in the backward pass. Over gloo both
        # ends are busy with it meanwhile.
        boundary = [2 * nbytes / costs.link.bytes_per_second for nbytes in timeline.boundary_bytes]
        feasible = memory.feasible if memory is not None and memory.limited else None
        cuts = merge(costs.work, boundary, timeline.allowed, num_stages, microbatches, feasible)
    else:
        cuts = find_cuts(timeline, num_stages, list(partition))
    ranks = _ranks(placement, len(cuts) + 1, num_ranks)

    work = costs.work
    edges = [0, *cuts, len(work)]
    onward = [costs.link.seconds(timeline.boundary_bytes[cut]) for cut in cuts] + [0.0]
    total = sum(work)
    stages = []
    for index, (begin, end) in enumerate(pairwise(edges)):
        calls = timeline.calls[begin:end]
        stages.append(
            StagePlan(
                index=index,
                rank=ranks[index],
                calls=tuple((call.name, call.occurrence) for call in calls),
                parameters=sum(call.parameters for call in calls),
                parameter_bytes=sum(call.parameter_bytes for call in calls),
                share=sum(work[begin:end]) / total if total else len(calls) / len(work),
                bytes_onward=timeline.boundary_bytes[end] if end < len(work) else 0,
                forward_seconds=sum(cost.forward for cost in costs.calls[begin:end]),
                backward_seconds=sum(cost.backward for cost in costs.calls[begin:end]),
                weight_seconds=sum(cost.weight for cost in costs.calls[begin:end]),
                onward_seconds=onward[index],
                memory=memory.breakdown(index, len(ranks), begin, end) if memory is not None else {},
                microbatch_bytes=memory.microbatch(begin, end) if memory is not None else 0.0,
            )
        )
    return PartitionPlan(tuple(stages), num_ranks)


def _ranks(placement: Placement, num_stages: int, num_ranks: int) -> list[int]:
    ranks = list(placement(num_stages) if callable(placement) else placement)
    if len(ranks) != num_stages:
        raise ConfigurationError(f"placement={ranks!r} places {len(ranks)} stage(s), but there are {num_stages}")
    for rank in ranks:
        if not 0 <= rank < num_ranks:
            raise ConfigurationError(f"placement={ranks!r}: there is no rank {rank!r} among {num_ranks}")
    return ranks
