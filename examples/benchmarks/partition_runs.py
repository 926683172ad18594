"""What a rank does to measure partitions: one stage a rank, one thread a rank, without Lightning.

::

    processes   0 1 2 3 4 5 6 7        all stay; with fewer stages the others wait
    2 stages    1 0                    the number of the stage; each number of stages has its own connections
    4 stages    3 2 1 0
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lines import Line, connected
from partition_models import CASES, Case
from torch import nn

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.costs import Costs
from lightning_lwpm.partition.cuts import label
from lightning_lwpm.partition.merge import merge
from lightning_lwpm.partition.plan import PartitionPlan, make_plan
from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.partition.timeline import Timeline
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placement import place
from lightning_lwpm.tuning.cache import CostCache
from lightning_lwpm.tuning.link import measure_link
from lightning_lwpm.tuning.profile import profile

__all__ = ["METHODS", "Outcome", "compare", "engine", "placed", "probed", "zero_gradients"]

CPU = torch.device("cpu")
WARM_UP = 2  # the first step learns what to send, the second is the first that sends it

Seconds = tuple[float, float]
"""Of a forward and of a backward pass."""

METHODS: dict[str, Callable[[Timeline], list[float]]] = {
    "layers": lambda timeline: [1.0] * len(timeline.calls),
    "parameters": lambda timeline: [float(call.parameters) for call in timeline.calls],
    "flops": lambda timeline: [call.flops for call in timeline.calls],
}
"""What the others balance: the amount of each layer call."""


@dataclass(frozen=True)
class Outcome:
    """What came of the methods for one number of stages.

    Args:
        plans: The plan of each method, with what is predicted.
        seconds: By method and stage, each step's seconds.
        possible: Slowest over mean of the best partition of the measured layer times, if transfers cost nothing.
    """

    plans: dict[str, PartitionPlan]
    seconds: dict[str, list[list[Seconds]]]
    possible: float


def compare(rank: int, world: int, name: str, args: Any) -> list[Outcome]:
    """Measure all methods for a model; one outcome for each number of stages.

    Args:
        rank: This rank.
        world: Number of ranks: the largest number of stages.
        name: Of the model.
        args: Of the command line.
    """
    lines = connected(rank, world, args.stages)
    case = CASES[name]
    torch.manual_seed(0)
    model, batch = case.build(), case.batch()
    outcomes = []
    for line in lines.values():
        if rank < line.stages:
            outcomes.append(_compare(line, case, model, batch, args))
        lines[world].gather()
    for line in lines.values():
        line.close()
    return outcomes


def _compare(line: Line, case: Case, model: nn.Module, batch: Any, args: Any) -> Outcome:
    seen, costs = probed(line, case, model, batch)
    plans, layouts = dict[str, PartitionPlan](), list[Layout]()
    if seen is not None:
        plans = {method: planned(method, seen.timeline, costs, line.stages) for method in args.methods}
        layouts = [make_layout(model, seen, plan) for plan in _different(plans.values())]
    layouts = line.share(layouts)
    stage = place_stages(line.stages).index(line.rank)
    models = [placed(model, layout, stage) for layout in layouts]
    own: list[list[Seconds]] = [[] for _ in layouts]
    for _ in range(args.rounds):
        for copied, layout, seconds in zip(models, layouts, own, strict=True):
            seconds += run_steps(line, case, copied, batch, layout, args.steps)
    everyone = line.gather(own)
    measured = {
        method: [everyone[r][_different(plans.values()).index(plan)] for r in place_stages(line.stages)]
        for method, plan in plans.items()
    }
    return Outcome(plans, measured, _possible(seen.timeline, costs, line.stages) if seen is not None else 0.0)


def probed(line: Line, case: Case, model: nn.Module, batch: Any) -> tuple[Probe | None, Costs]:
    """What the step does, on rank 0, and what its layers cost; nothing is taken from or put into the user's cache."""
    seen = probe(model, lambda: case.step(model, batch)) if line.rank == 0 else None
    model.zero_grad()
    line.turn += 1
    link = measure_link(line.mailbox, line.transport, line.turn)
    cache = CostCache("nothing is kept")
    cache.path = None
    return seen, profile(line.mailbox, line.turn, seen, model, CPU, True, nullcontext, cache, link)


def planned(method: str, timeline: Timeline, costs: Costs, stages: int) -> PartitionPlan:
    """The partition of a method, with the measured costs as prediction."""
    partition: str | list[str] = "auto"
    if method in METHODS:
        nothing = [0.0] * len(timeline.calls)
        cuts = merge(METHODS[method](timeline), nothing, timeline.allowed, stages)
        partition = [label(timeline.calls[cut].name, timeline.calls[cut].occurrence) for cut in cuts]
    return make_plan(timeline, stages, partition, place_stages, costs)


def placed(model: nn.Module, layout: Layout, stage: int) -> nn.Module:
    """A copy of the model for one stage, which shares its weights with the model."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    place(copied, lambda name: layout.parameters.get(name) or layout.buffers.get(name), stage)
    return copied


def engine(line: Line, model: nn.Module, layout: Layout, schedule: str) -> Engine:
    """A new engine on connections that others have used before."""
    line.gather()  # the engine before has done all, on every rank
    return Engine(line.mailbox, line.transport, model, layout, CPU, schedule, serial=line.serial)


def run_steps(line: Line, case: Case, model: nn.Module, batch: Any, layout: Layout, steps: int) -> list[Seconds]:
    """Train on one micro-batch a step, so that one stage works at a time; this rank's busy seconds of each step."""
    run = engine(line, model, layout, "gpipe")
    assert run.stage is not None
    found = []
    for step in range(WARM_UP + steps):
        zero_gradients(model)
        run.times.clear()
        run.train(Batch.of(batch, 1), lambda values, _: case.step(model, values), lambda loss, _: loss.backward())
        forward, backward = (run.times.median(run.stage, kind) for kind in "FB")
        assert forward is not None and backward is not None
        if step >= WARM_UP:
            found.append((forward, backward))
    line.serial = run.serial
    return found


def zero_gradients(model: nn.Module) -> None:
    """Make gradients zero, but keep them: then backward passes add to them, as all but the first of a batch do."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def _different(plans: Iterable[PartitionPlan]) -> list[PartitionPlan]:
    """The plans without those equal to one before: these are measured once."""
    return list({tuple(plan.cuts): plan for plan in plans}.values())


def _possible(timeline: Timeline, costs: Costs, stages: int) -> float:
    work = costs.work
    cuts = merge(work, [0.0] * len(work), timeline.allowed, stages)
    edges = [0, *cuts, len(work)]
    slowest = max(sum(work[a:b]) for a, b in pairwise(edges))
    return slowest / (sum(work) / stages)
