"""``lwpm timeline``: schedules as they are planned, drawn below each other, without a model."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as Overview

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.policies import POLICIES
from lightning_lwpm.pipeline.schedule import Action, Table, build, place
from lightning_lwpm.pipeline.simulate import Simulation, bound, kept_by_ranks, simulate
from lightning_lwpm.pipeline.tablefile import save_csv
from lightning_lwpm.timeline.spans import Panel, planned
from lightning_lwpm.timeline.write import write_timeline
from lightning_lwpm.tuning.lineup import FEWEST, MOST

__all__ = ["timeline"]


@dataclass(frozen=True)
class _Shown:
    """One schedule.

    Attributes:
        name: Its name.
        each: Stages a device.
        ranks: The rank of each stage.
        table: The actions of each rank.
        run: How they run.
        least: A time that no schedule of these actions can beat.
    """

    name: str
    each: int
    ranks: tuple[int, ...]
    table: Table
    run: Simulation
    least: float


def timeline(args: argparse.Namespace) -> None:
    """Show schedules.

    Args:
        args: As parsed by :mod:`lightning_lwpm.cli`. ``forward``, ``backward`` and ``weight`` are the times of a
            device for one micro-batch; each of its stages takes an equal part of them.

    Raises:
        ConfigurationError: if a schedule is unknown, a number is of no use, or a picture cannot be drawn.
    """
    weight = args.backward / 2 if args.weight is None else args.weight
    for option, value in (("--forward", args.forward), ("--backward", args.backward), ("--latency", args.latency)):
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"{option} {value:g}: a time is a number of at least 0")
    if not 0 <= weight <= args.backward:
        raise ConfigurationError(
            f"--weight {weight:g}: it is the part of the backward pass that can be put off, so at least 0 and at most "
            f"--backward {args.backward:g}"
        )
    seconds = {"F": args.forward, "B": args.backward, "I": args.backward - weight, "W": weight}
    shown, panels = [], []
    for name in dict.fromkeys(args.schedule or POLICIES):
        each = _each(name, args.virtual_stages)
        ranks = _ranks(name, args.stages, each)

        def costs(action: Action, each: int = each) -> float:
            return seconds[action.kind] / each

        table = build(name, len(ranks), args.microbatches, args.stages, ranks, costs, args.latency)
        run = simulate(table, ranks, costs, args.latency)
        spans = tuple(planned(table, ranks, run, costs, args.latency))
        title = f"{name}: {run.makespan:.4g} units, bubble {run.bubble:.0%}"
        shown.append(_Shown(name, each, tuple(ranks), table, run, bound(table, ranks, costs, args.latency)))
        panels.append(Panel(title, spans, tuple(ranks), args.stages))
    console = Console()
    console.print(_overview(shown, args))
    if args.csv:
        for one in shown:
            path = Path(args.csv)
            path = path if len(shown) == 1 else path.with_stem(f"{path.stem}-{one.name}")
            save_csv(one.table, path)
            console.print(f"written: {path}", markup=False)
    if args.output:
        write_timeline(panels, args.output, "units")
        console.print(f"drawn: {args.output}", markup=False)


def _each(name: str, asked: int | None) -> int:
    """Stages a device: as many as asked for, where the schedule can take them."""
    if asked is not None and asked < 1:
        raise ConfigurationError(f"--virtual-stages {asked}: a device has at least 1 stage")
    several = name in POLICIES and POLICIES[name].style != "line"
    fewest = FEWEST.get(name, 1)
    if asked is None or not several:
        return fewest
    return min(max(asked, fewest), MOST.get(name, asked))


def _ranks(name: str, devices: int, each: int) -> list[int]:
    if devices < 1:
        raise ConfigurationError(f"--stages {devices}: at least 1 device with a stage is needed")
    return place(devices * each, devices, "v" if name in POLICIES and POLICIES[name].style == "v" else "loop")


def _overview(shown: list[_Shown], args: argparse.Namespace) -> Overview:
    """One line a schedule."""
    table = Overview(
        title=f"micro-batches: {args.microbatches}, devices: {args.stages}",
        caption="Bound: the least that any order of these actions takes. In flight: the most micro-batches at once, by "
        "stage. Kept: activations of the most micro-batches on a device, each counted as a whole device's.",
    )
    table.add_column("schedule", no_wrap=True)
    for column in ("stages a device", "makespan", "over bound", "bubble", "in flight", "kept"):
        table.add_column(column, justify="right")
    for one in shown:
        peaks = one.run.peak_in_flight
        table.add_row(
            one.name,
            str(one.each),
            f"{one.run.makespan:.4g}",
            f"{one.run.makespan / one.least - 1:.1%}" if one.least else "-",
            f"{one.run.bubble:.1%}",
            " ".join(map(str, peaks)) if len(peaks) <= 4 else f"{min(peaks)} to {max(peaks)}",
            f"{max(kept_by_ranks(one.table, [1 / one.each] * len(one.ranks))):.3g}",
        )
    return table
