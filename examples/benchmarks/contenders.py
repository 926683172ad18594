"""One step of training by a schedule, ours or that of ``torch.distributed.pipelining``, for a chain of parts.

Both run without Lightning, on the same ranks, with the same parts of the model, batch and number of micro-batches.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lines import Line
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.schedule import POLICIES, Action, Table, build, list_schedule
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.pipeline.simulate import simulate
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout, Unit
from lightning_lwpm.staging.placement import place

__all__ = [
    "CPU",
    "RACES",
    "Contender",
    "Ours",
    "Race",
    "Task",
    "Torch",
    "chain",
    "made_to_measure",
    "slowest",
    "take_turns",
]

CPU = torch.device("cpu")
LATENCY = 5e-4  # seconds: what a message of half a megabyte takes between processes of one machine, roughly
WARM_UP = 3  # the first step learns what to send, the second is the first that sends it


@dataclass(frozen=True)
class Race:
    """A schedule that both sides have.

    Args:
        ours: Our name of it.
        theirs: The class of torch.
        per_rank: Stages a rank.
    """

    ours: str
    theirs: str
    per_rank: int

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.ours if self.per_rank == 1 else f"{self.ours}, {self.per_rank} stages a rank"

    def stages(self, world: int) -> list[int]:
        """The rank of each stage, as we place them."""
        count = self.per_rank * world
        return place_stages(count, world, "v" if POLICIES[self.ours].style == "v" else "loop")

    def table(self, microbatches: int, world: int) -> Table:
        """Our table for it."""
        ranks = self.stages(world)
        return build(self.ours, len(ranks), microbatches, world, ranks)


RACES = (
    Race("gpipe", "ScheduleGPipe", 1),
    Race("1f1b", "Schedule1F1B", 1),
    Race("interleaved_1f1b", "ScheduleInterleaved1F1B", 2),
    Race("zb1p", "ScheduleInterleavedZeroBubble", 1),
    Race("zb1p", "ScheduleInterleavedZeroBubble", 2),
    Race("zbv", "ScheduleZBVZeroBubble", 2),
)


@dataclass(frozen=True)
class Task:
    """What is trained.

    Args:
        inputs: Of the whole batch.
        targets: The same.
        loss: Of a micro-batch, from output and targets: a mean over samples.
        microbatches: How many.
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    microbatches: int


class Contender(Protocol):
    """One side of a race."""

    model: nn.Module

    def step(self) -> None:
        """Forward and backward passes of a batch; gradients are left in ``.grad``."""


def chain(model: nn.Sequential) -> Layout:
    """The layout in which each part of a chain is a stage."""
    parts = list(model.named_children())
    parameters = {f"{at}.{name}": (int(at),) for at, part in parts for name, _ in part.named_parameters()}
    buffers = {f"{at}.{name}": (int(at),) for at, part in parts for name, _ in part.named_buffers()}
    return Layout(len(parts), tuple(Unit(at, (int(at),)) for at, _ in parts), parameters, buffers)


class Ours:
    """Our engine.

    Args:
        line: Connections of its own.
        race: The schedule.
        model: The whole model, the same on all ranks; keeps the parts of this rank.
        layout: The partition.
        task: What is trained.
        table: The table, if it is not the one of the schedule's name.
        serial: Number of micro-batches that an engine before has done on this line.
    """

    def __init__(
        self,
        line: Line,
        race: Race,
        model: nn.Module,
        layout: Layout,
        task: Task,
        table: Table | None = None,
        serial: int = 0,
    ) -> None:
        self.model, self.task = model, task
        ranks, own = race.stages(line.stages), table or race.table(task.microbatches, line.stages)
        self.engine = Engine(line.mailbox, line.transport, model, layout, CPU, lambda _: own, serial, ranks)
        place(model, lambda name: layout.parameters.get(name) or layout.buffers.get(name), self.engine.stages)

    def step(self) -> None:
        """See :class:`Contender`."""
        task = self.task
        batch = Batch.of((task.inputs, task.targets), task.microbatches)
        share = 1 / task.microbatches

        def forward(values: Any, _: int) -> Tensor:
            inputs, targets = values
            return task.loss(self.model(inputs), targets)

        self.engine.train(batch, forward, lambda loss, _: (loss * share).backward())


def made_to_measure(line: Line, race: Race, model: nn.Module, layout: Layout, task: Task) -> tuple[Ours, float]:
    """Our schedule ``auto`` on the stages of a race, made from the times of a few steps; and its bound as a speed-up.

    Args:
        line: Connections of its own.
        race: Where stages are, and a schedule that splits backward passes.
        model: The whole model; keeps the parts of this rank.
        layout: The partition.
        task: What is trained.
    """
    ranks, count = race.stages(line.stages), task.microbatches
    half = replace(POLICIES[race.ours], split_last=count // 2)  # so that both kinds of backward pass are timed
    trial = Ours(line, race, model, layout, task, list_schedule(half, len(ranks), count, ranks))
    for _ in range(WARM_UP):
        trial.step()
    own = {(s, kind): trial.engine.times.median(s, kind) for s in trial.engine.stages for kind in "FBIW"}
    seconds = {key: value for each in line.gather(own) for key, value in each.items()}

    def costs(action: Action) -> float:
        return seconds[action.stage, action.kind]

    table = build("auto", len(ranks), count, line.stages, ranks, costs, LATENCY)
    work = sum(count * (seconds[stage, "F"] + seconds[stage, "B"]) for stage in range(len(ranks)))
    makespan = simulate(table, ranks, costs).makespan
    return Ours(line, race, model, layout, task, table, trial.engine.serial), work / makespan


class Torch:
    """A schedule of torch.

    Args:
        rank: This rank.
        world: Number of ranks.
        race: The schedule.
        parts: The part of the model in each stage.
        task: What is trained.
    """

    def __init__(self, rank: int, world: int, race: Race, parts: Sequence[nn.Module], task: Task) -> None:
        self.task, count = task, len(parts)
        folded = POLICIES[race.ours].style == "v"
        own = [rank, count - 1 - rank] if folded else list(range(rank, count, world))
        self.first, self.last = 0 in own, count - 1 in own
        self.model: nn.Module = nn.ModuleList(parts[stage] for stage in own)
        stages = [PipelineStage(parts[stage], stage, count, CPU) for stage in own]
        kind: Any = getattr(schedules, race.theirs)
        several = issubclass(kind, schedules.PipelineScheduleMulti)
        self.schedule = kind(stages if several else stages[0], task.microbatches, loss_fn=task.loss)

    def step(self) -> None:
        """See :class:`Contender`."""
        inputs = (self.task.inputs,) if self.first else ()
        target, losses = (self.task.targets, list[Tensor]()) if self.last else (None, None)
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int, warm_up: int = WARM_UP) -> list[list[float]]:
    """The seconds of each contender's steps on this rank; they take turns, ``steps`` at a time.

    All ranks must call it alike. A step begins on all ranks at once. Of ``warm_up`` steps before, nothing is told.
    """
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for contender, found in zip(contenders, seconds, strict=True):
            for _ in range(steps if turn else warm_up):
                contender.model.zero_grad()
                dist.barrier()
                begin = time.perf_counter()
                contender.step()
                if turn:
                    found.append(time.perf_counter() - begin)
    return seconds


def slowest(ranks: Sequence[Sequence[float]]) -> float:
    """The median over steps of the time of the slowest rank, in seconds."""
    return statistics.median(map(max, zip(*ranks, strict=True)))
