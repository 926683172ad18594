"""How near a step comes to its bound on many ranks: stages that sleep for a known time, every schedule.

    python examples/benchmarks/scaling.py --ranks 2 4 8 16          # 32 micro-batches; about 15 minutes

A forward pass sleeps for 40 ms, a backward pass twice as long, its parts (input gradients, weight gradients) as long
as a forward pass each. So all ranks fit on a machine with fewer cores. The bound is the time that no order of the same
work on the same ranks can beat; what is simulated is the schedule's own order, without any overhead.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ranks import run


@dataclass(frozen=True)
class Row:
    """What came of one schedule on a number of ranks; times in seconds.

    Args:
        ranks: Number of ranks.
        schedule: What tables call it.
        measured: The median step, from its begin to the end of the slowest rank.
        simulated: The schedule's makespan.
        bound: Of the same work.
    """

    ranks: int
    schedule: str
    measured: float
    simulated: float
    bound: float


def measure(rank: int, world: int, args: Any) -> list[list[float]]:
    """For each schedule, the seconds of each step."""
    import torch
    from contenders import RACES, Ours, Task, chain, take_turns
    from lines import Line
    from naps import WIDTH, Nap, nap_in_parts
    from torch import nn
    from torch.nn import functional as F

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    span, found = args.milliseconds / 1e3, []
    batch = torch.randn(args.microbatches, WIDTH)
    for race in RACES:
        if race.ours not in args.schedules:
            continue
        stages = race.stages(world)
        model = nn.Sequential(*(Nap(span, 2 * span) for _ in stages))
        line = Line(rank, world)
        ours = Ours(line, race, model, chain(model), Task(batch, batch, F.mse_loss, args.microbatches))
        nap_in_parts(ours.engine, span)
        found += take_turns([ours], 1, args.steps, args.warm_up)
        line.close()
    return found


def rows(args: Any) -> list[Row]:
    """Measure all."""
    from contenders import RACES, slowest
    from naps import seconds
    from rich.progress import track

    from lightning_lwpm.pipeline.simulate import bound, simulate

    found = []
    costs = partial(seconds, args.milliseconds / 1e3)
    for world in track(args.ranks, "scaling"):
        ranks = run(world, measure, args)
        for i, race in enumerate(race for race in RACES if race.ours in args.schedules):
            table, stages = race.table(args.microbatches, world), race.stages(world)
            measured = slowest([rank[i] for rank in ranks])
            makespan = simulate(table, stages, costs).makespan
            found.append(Row(world, race.label, measured, makespan, bound(table, stages, costs)))
    return found


def main() -> None:
    """Measure and print a table."""
    from contenders import RACES
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(race.ours for race in RACES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=names, choices=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--milliseconds", type=float, default=40, help="of a forward pass of a stage")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--json", action="store_true", help="print numbers for programs instead of a table")
    args = parser.parse_args()

    found = rows(args)
    if args.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    title = f"{args.microbatches} micro-batches, {args.milliseconds:g} ms a forward pass"
    table = Table(title=f"steps of stages that sleep: {title}")
    for column in ("ranks", "schedule", "step, s", "bound, s", "of bound", "over simulated"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for i, row in enumerate(found):
        times = f"{row.measured:.3f}", f"{row.bound:.3f}", f"{row.bound / row.measured:.1%}"
        table.add_row(str(row.ranks), row.schedule, *times, f"{row.measured / row.simulated:.3f}")
        if i + 1 == len(found) or found[i + 1].ranks != row.ranks:
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
