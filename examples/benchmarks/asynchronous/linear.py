"""How near to linear training without flushes comes: stages that sleep for a known time, and what 1F1B makes of them.

    python examples/benchmarks/asynchronous/linear.py --ranks 2 4 8 16         # about 5 minutes

A forward pass of a stage sleeps for 40 ms, a backward pass twice as long. Linear is a step in which every rank does
nothing but the work of its stage. The first batches, in which the pipeline fills, are left out.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import run


@dataclass(frozen=True)
class Row:
    """What came of a number of ranks and micro-batches.

    Args:
        ranks: Number of ranks.
        microbatches: Micro-batches of a batch.
        step: The median time from step to step, of the slowest rank, in seconds.
        linear: The work of a stage in a step, in seconds.
        exact: The bound of 1F1B's step.
    """

    ranks: int
    microbatches: int
    step: float
    linear: float
    exact: float


def measure(rank: int, world: int, args: Any) -> list[float]:
    """For each number of micro-batches the median time from step to step on this rank."""
    import time

    import torch
    from contenders import chain
    from lines import Line
    from naps import WIDTH, Nap
    from torch import nn
    from torch.nn import functional as F

    from lightning_lwpm.pipeline.asynchronous.continuous import Continuous, Work
    from lightning_lwpm.pipeline.asynchronous.in_place import writable
    from lightning_lwpm.pipeline.engine import Engine
    from lightning_lwpm.staging.batch import Batch
    from lightning_lwpm.staging.placement import place

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    span, medians = args.milliseconds / 1e3, []
    for count in args.microbatches:
        line = Line(rank, world)
        model = nn.Sequential(*(Nap(span, 2 * span) for _ in range(world)))
        layout = chain(model)
        engine = Engine(line.mailbox, line.transport, model, layout, torch.device("cpu"), continuous=True)
        place(model, lambda name, layout=layout: layout.parameters.get(name), engine.stages)
        own = list(model[engine.stage or 0].parameters())
        optimizer = torch.optim.AdamW(own)
        data = torch.randn(count, WIDTH)
        filling = -(-(world - 1) // count)  # steps until the last stage has as many behind it as it ever has

        def forward(values: Any, _: int, model: nn.Module = model) -> Any:
            return F.mse_loss(model(values[0]), values[1])

        steps = args.steps + filling + 1
        works = [Work(Batch.of((data, data), count), i, forward, lambda loss, _: loss.backward()) for i in range(steps)]
        pipeline = Continuous(engine, [world - 1 - stage for stage in range(world)])
        ends = []
        for number in range(steps):
            pipeline.train(works[number : number + 1 + filling])
            with writable(own):
                optimizer.step()
            optimizer.zero_grad()
            ends.append(time.perf_counter())
        kept = ends[filling : filling + args.steps + 1]
        medians.append(statistics.median(b - a for a, b in pairwise(kept)))
        line.close()
    return medians


def rows(args: Any) -> list[Row]:
    """Measure all."""
    from rich.progress import track

    span, found = args.milliseconds / 1e3, []
    for world in track(args.ranks, "ranks"):
        ranks = run(world, measure, args)
        for i, count in enumerate(args.microbatches):
            step = max(rank[i] for rank in ranks)
            found.append(Row(world, count, step, 3 * span * count, 3 * span * (count + world - 1)))
    return found


def main() -> None:
    """Measure and print a table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--milliseconds", type=float, default=40, help="of a forward pass of a stage")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print numbers for programs instead of a table")
    args = parser.parse_args()

    found = rows(args)
    if args.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    table = Table(title=f"training without flushes: stages that sleep, {args.milliseconds:g} ms a forward pass")
    for column in ("ranks", "micro-batches", "step, s", "linear, s", "of linear", "speed-up", "1f1b at most"):
        table.add_column(column, justify="right")
    for i, row in enumerate(found):
        share = row.linear / row.step
        speeds = f"{share:.1%}", f"{share * row.ranks:.2f}", f"{row.linear / row.exact * row.ranks:.2f}"
        table.add_row(str(row.ranks), str(row.microbatches), f"{row.step:.3f}", f"{row.linear:.3f}", *speeds)
        if i + 1 == len(found) or found[i + 1].ranks != row.ranks:
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
