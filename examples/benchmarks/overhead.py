"""What a micro-batch costs beside its work: stages that are one ``Linear(8, 8)``, ours and torch's by turns.

    python examples/benchmarks/overhead.py                    # two ranks, 64 micro-batches

Time per micro-batch is that of a step by the number of micro-batches.
"""

import argparse
import json
from typing import Any

from ranks import run

WIDTH = 8


def measure(rank: int, world: int, args: Any) -> list[list[float]]:
    """Seconds of each step on this rank, for each race ours and torch's."""
    import torch
    from contenders import RACES, Contender, Ours, Task, Torch, chain, take_turns
    from lines import Line
    from torch import nn
    from torch.nn import functional as F

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    samples = args.microbatches * args.samples
    task = Task(torch.randn(samples, WIDTH), torch.randn(samples, WIDTH), F.mse_loss, args.microbatches)
    contenders: list[Contender] = []
    lines = []
    for race in RACES:
        if race.ours not in args.schedules:
            continue
        lines.append(Line(rank, world))
        models = [nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(race.per_rank * world))) for _ in range(2)]
        contenders.append(Ours(lines[-1], race, models[0], chain(models[0]), task))
        contenders.append(Torch(rank, world, race, list(models[1]), task))
    seconds = take_turns(contenders, args.rounds, args.steps)
    for line in lines:
        line.close()
    return seconds


def main() -> None:
    """Measure and print a table."""
    from contenders import RACES, slowest
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(race.ours for race in RACES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=names, choices=names)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side")
    parser.add_argument("--json", action="store_true", help="print numbers for programs instead of a table")
    args = parser.parse_args()

    ranks = run(args.ranks, measure, args)
    each = [slowest([rank[i] for rank in ranks]) / args.microbatches for i in range(len(ranks[0]))]
    races = [race for race in RACES if race.ours in args.schedules]
    if args.json:
        rows = [
            {"schedule": r.label, "ours": a, "torch": b} for r, a, b in zip(races, each[::2], each[1::2], strict=True)
        ]
        print(json.dumps(rows))
        return
    table = Table(title=f"time per micro-batch, {args.ranks} ranks, {args.microbatches} micro-batches")
    for column in ("schedule", "ours, ms", "torch, ms", "ours / torch"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for race, ours, theirs in zip(races, each[::2], each[1::2], strict=True):
        table.add_row(race.label, f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
