"""What a rank does to measure the memory of its stage under 1f1b, beside what the plan expects."""

from typing import Any

import torch
from lines import Line, connected
from live_bytes import LiveBytes
from partition_models import CASES, Case
from partition_runs import WARM_UP, engine, placed, probed, zero_gradients
from rich.table import Table
from torch import nn

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import human_bytes
from lightning_lwpm.pipeline.schedule import place as place_stages
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.tuning.choose import planned
from lightning_lwpm.tuning.sized import Look
from lightning_lwpm.tuning.wish import Wish

__all__ = ["measure", "table_of"]

SCHEDULE = "1f1b"
TURNS = 2  # micro-batches for each stage

Found = tuple[PartitionPlan, list[tuple[int, int]]]
"""A plan, and for each stage the bytes it holds all the time (weights, gradients) and the most beside them at once."""


def measure(rank: int, world: int, name: str, args: Any) -> list[Found]:
    """Measure the memory of each stage of a model; one entry for each number of stages, on rank 0.

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
    found: list[Found] = []
    for line in lines.values():
        if rank < line.stages:
            found += _measure(line, case, model, batch)
        lines[world].gather()
    for line in lines.values():
        line.close()
    return found


def _measure(line: Line, case: Case, model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Found]:
    seen, costs = probed(line, case, model, batch)
    count = TURNS * line.stages
    plan, layout = None, None
    if seen is not None:
        plan = planned(Look(1, seen.timeline, costs), seen, line.stages, Wish(), count, SCHEDULE)
        layout = make_layout(model, seen, plan)
    layout = line.share(layout)
    assert layout is not None
    own = placed(model, layout, place_stages(line.stages).index(line.rank))
    run = engine(line, own, layout, SCHEDULE)
    whole = {name: torch.cat([values] * count) for name, values in batch.items()}
    counter = LiveBytes()
    for step in range(WARM_UP + 1):
        zero_gradients(own)
        held = _held(own)
        if step == WARM_UP:
            counter.__enter__()
        run.train(Batch.of(whole, count), lambda values, _: case.step(own, values), lambda loss, _: loss.backward())
    counter.__exit__(None, None, None)
    line.serial = run.serial
    everyone = line.gather((held, counter.peak))
    return [(plan, [everyone[rank] for rank in place_stages(line.stages)])] if plan is not None else []


def _held(model: nn.Module) -> int:
    """Bytes of the weights, buffers and gradients that are here."""
    parameters = [p for p in model.parameters() if not is_placeholder(p)]
    buffers = [b for b in model.buffers() if not is_placeholder(b)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(t.numel() * t.element_size() for t in [*parameters, *buffers, *gradients])


def table_of(title: str, found: list[Found]) -> Table:
    """The memory of each stage of a model."""
    table = Table(title=title, caption=f"{SCHEDULE}, {TURNS} micro-batches for each stage; without an optimizer")
    columns = ("stages", "stage", "weights, gradients", "beside them, at most", "in all", "predicted", "over measured")
    for column in columns:
        table.add_column(column, justify="right")
    for plan, stages in found:
        for stage, (held, peak) in zip(plan.stages, stages, strict=True):
            told = sum(stage.memory.values())
            cells = [human_bytes(value) for value in (held, peak, held + peak, told)]
            table.add_row(str(len(stages)), str(stage.index), *cells, f"{told / (held + peak):.2f}")
        table.add_section()
    return table
