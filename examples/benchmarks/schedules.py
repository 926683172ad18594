"""Two ranks over one process: every schedule of ours, each of torch's on a copy split by hand, and DDP, by turns.

    python examples/benchmarks/schedules.py                                  # about 20 minutes
    python examples/benchmarks/schedules.py --models gpt --microbatches 4    # a part of it

Every process has one thread. The bound is that of the schedule on even stages, where transfers cost nothing; of
``auto`` that of its table at the times that it is made from. What the machine itself takes shows in "two, no messages":
each of two processes does half of the micro-batches, and they do not know of each other.
"""

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from typing import Any

from ranks import run

WORLD = 2


@dataclass(frozen=True)
class Row:
    """What came of one contender.

    Args:
        model: Key of the model.
        microbatches: Number of micro-batches.
        side: "ours", "torch", or "" of what has no schedule.
        name: What tables call it.
        seconds: The median step, until the slowest rank is done; ``None`` where torch refuses the schedule.
        speedup: One process's step over it.
        bound: The largest possible speed-up.
    """

    model: str
    microbatches: int
    side: str
    name: str
    seconds: float | None
    speedup: float
    bound: float


def measure(
    rank: int, world: int, name: str, microbatches: int, args: Any
) -> tuple[list[list[float] | None], list[float]]:
    """Seconds of each step: of those without a schedule, of each schedule ours and torch's, of ``auto``; its bounds."""
    import torch
    import torch.distributed as dist
    from contenders import Contender, Ours, Race, Task, Torch, made_to_measure, take_turns
    from lines import Line
    from split_models import CASES
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from lightning_lwpm.partition.apply import make_layout
    from lightning_lwpm.partition.plan import make_plan
    from lightning_lwpm.partition.probe import probe
    from lightning_lwpm.staging.layout import Layout

    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    case = CASES[name]
    model: nn.Module = case.build()
    task = Task(*case.batch(), case.loss, microbatches)

    class Alone:
        """A process that accumulates micro-batches: all of them on rank 0, or each rank its share, without a word."""

        model = case.build()

        def __init__(self, share: slice) -> None:
            pairs = zip(task.inputs.chunk(microbatches), task.targets.chunk(microbatches), strict=True)
            self.parts = list(pairs)[share]

        def step(self) -> None:
            for inputs, targets in self.parts:
                (task.loss(self.model(inputs), targets) / microbatches).backward()

    class Replicas:
        """Each rank has the whole model and its share of the batch."""

        model: nn.Module = DistributedDataParallel(case.build())

        def step(self) -> None:
            inputs, targets = (whole.chunk(world)[rank] for whole in (task.inputs, task.targets))
            task.loss(self.model(inputs), targets).backward()

    whole = slice(None) if rank == 0 else slice(0)
    contenders: list[Contender | None] = [Alone(whole), Alone(slice(rank, None, world)), Replicas()]
    lines = []
    seen = probe(model, lambda: task.loss(model(task.inputs[:1]), task.targets[:1]))
    model.zero_grad()

    def ours(race: Race) -> tuple[Line, Race, nn.Module, Layout, Task]:
        stages, own = race.stages(world), copy.deepcopy(model)
        lines.append(Line(rank, world))
        plan = make_plan(seen.timeline, len(stages), case.names(len(stages)), lambda *_: stages)
        return lines[-1], race, own, make_layout(own, seen, plan), task

    for race in races(args):
        contenders.append(Ours(*ours(race)))
        try:
            contenders.append(Torch(rank, world, race, case.split(model, len(race.stages(world))), task))
        except ValueError:  # too few micro-batches for it
            contenders.append(None)
    bounds = []
    for race in autos():
        contender, bound = made_to_measure(*ours(race))
        contenders.append(contender)
        bounds.append(bound)
    found = iter(take_turns([each for each in contenders if each is not None], args.rounds, args.steps))
    for line in lines:
        line.close()
    return [next(found) if each is not None else None for each in contenders], bounds


def races(args: Any) -> list[Any]:
    """The schedules that are wanted."""
    from contenders import RACES

    return [race for race in RACES if race.ours in args.schedules]


def autos() -> list[Any]:
    """Where ``auto`` has its stages: one stage a rank, and two, there and back."""
    from contenders import RACES

    return [race for race in RACES if (race.ours, race.per_rank) in (("zb1p", 1), ("zbv", 2))]


def rows(name: str, microbatches: int, args: Any) -> list[Row]:
    """Measure all contenders with a model and a number of micro-batches."""
    from contenders import slowest

    from lightning_lwpm.pipeline.simulate import simulate

    ranks = run(WORLD, measure, name, microbatches, args)
    steps, bounds = [found for found, _ in ranks], ranks[0][1]
    times = [slowest([found[i] for found in steps]) if kept is not None else None for i, kept in enumerate(steps[0])]
    alone = times[0]
    assert alone is not None
    labels: list[tuple[str, str, float]] = [
        ("", "one process", 1.0),
        ("", "two, no messages", WORLD),
        ("", "DDP", WORLD),
    ]
    for race in races(args):
        table = race.table(microbatches, WORLD)
        simulated = simulate(table, race.stages(WORLD))
        labels += [(side, race.label, sum(simulated.busy) / simulated.makespan) for side in ("ours", "torch")]
    for race, bound in zip(autos(), bounds, strict=True):
        label = "auto" if race.per_rank == 1 else f"auto, {race.per_rank} stages a rank, there and back"
        labels.append(("ours", label, bound))
    return [
        Row(name, microbatches, side, label, seconds, alone / seconds if seconds else 0.0, bound)
        for (side, label, bound), seconds in zip(labels, times, strict=True)
    ]


def main() -> None:
    """Measure and print tables."""
    from contenders import RACES
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    names = list(dict.fromkeys(race.ours for race in RACES))
    models = ("gpt", "resnet")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=models, choices=models)
    parser.add_argument("--schedules", nargs="+", default=names, choices=names)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender")
    parser.add_argument("--json", action="store_true", help="print numbers for programs instead of tables")
    args = parser.parse_args()

    plan = [(name, count) for name in args.models for count in args.microbatches]
    found = [(name, count, rows(name, count, args)) for name, count in track(plan, "schedules", disable=args.json)]
    if args.json:
        print(json.dumps([asdict(row) for *_, some in found for row in some]))
        return
    from split_models import CASES

    for name, count, some in found:
        table = Table(title=f"{CASES[name].title}; {count} micro-batches, two ranks")
        for column in ("", "schedule", "step, ms", "over one process", "bound", "of it"):
            table.add_column(column, justify="left" if column in ("", "schedule") else "right")
        for row in some:
            if row.seconds is None:
                table.add_row(row.side, row.name, "refused", "", "", "")
                continue
            numbers = f"{row.speedup:.2f}", f"{row.bound:.2f}", f"{row.speedup / row.bound:.0%}"
            table.add_row(row.side, row.name, f"{row.seconds * 1e3:.0f}", *numbers)
        Console().print(table)


if __name__ == "__main__":
    main()
