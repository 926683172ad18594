"""How many micro-batches' activations a stage holds at once, counted on the tensors themselves, and what was promised.

    python examples/benchmarks/in_flight.py --ranks 2 4

Each stage's activation of a micro-batch is followed from its forward pass until its memory is let go of. Activations
that weight gradients still need (schedules with I and W) are followed beyond the input gradients.
"""

import argparse
import json
import weakref
from dataclasses import asdict, dataclass
from typing import Any

from ranks import run


@dataclass(frozen=True)
class Row:
    """What came of one schedule on a number of ranks; one number a stage.

    Args:
        ranks: Number of ranks.
        schedule: What tables call it.
        counted: The most activations that were alive at once.
        promised: Micro-batches that the simulated schedule keeps at most: from F to B, or to W.
    """

    ranks: int
    schedule: str
    counted: list[int]
    promised: list[int]


class Count:
    """The activations of one stage that are alive."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def follow(self, tensor: Any) -> None:
        """Count a tensor until its memory is let go of, whatever views of it there are."""
        weakref.finalize(tensor.untyped_storage(), self._gone)
        self.alive += 1
        self.peak = max(self.peak, self.alive)

    def _gone(self) -> None:
        self.alive -= 1


def measure(rank: int, world: int, args: Any) -> list[dict[int, int]]:
    """For each schedule, the peak of each stage of this rank."""
    import torch
    from contenders import RACES, Ours, Task, chain, take_turns
    from lines import Line
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Stage(nn.Module):
        """A stage whose weight gradient needs what it makes first: that is alive as long as it is needed."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))
            self.count = Count()

        def forward(self, x: Tensor) -> Tensor:
            made = x + 1
            self.count.follow(made)
            return F.linear(made, self.weight)

    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    batch = torch.randn(args.microbatches, 8)
    found = []
    for race in RACES:
        if race.ours not in args.schedules:
            continue
        parts = [Stage() for _ in race.stages(world)]
        model = nn.Sequential(*parts)
        line = Line(rank, world)
        ours = Ours(line, race, model, chain(model), Task(batch, batch, F.mse_loss, args.microbatches))
        take_turns([ours], 1, 2)
        found.append({stage: parts[stage].count.peak for stage in ours.engine.stages})
        line.close()
    return found


def rows(args: Any) -> list[Row]:
    """Count all."""
    from contenders import RACES

    from lightning_lwpm.pipeline.simulate import simulate

    found = []
    for world in args.ranks:
        ranks = run(world, measure, args)
        for i, race in enumerate(race for race in RACES if race.ours in args.schedules):
            stages = race.stages(world)
            peaks = {stage: peak for rank in ranks for stage, peak in rank[i].items()}
            promised = simulate(race.table(args.microbatches, world), stages).peak_kept
            found.append(Row(world, race.label, [peaks[stage] for stage in range(len(stages))], list(promised)))
    return found


def main() -> None:
    """Count and print a table."""
    from contenders import RACES
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(race.ours for race in RACES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=names, choices=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print numbers for programs instead of a table")
    args = parser.parse_args()

    found = rows(args)
    if args.json:
        print(json.dumps([asdict(row) for row in found]))
        return
    table = Table(title=f"activations alive at once, by stage: {args.microbatches} micro-batches")
    for column in ("ranks", "schedule", "counted", "promised", "kept"):
        table.add_column(column, justify="right" if column == "ranks" else "left")
    for row in found:
        kept = all(counted <= promised for counted, promised in zip(row.counted, row.promised, strict=True))
        numbers = (" ".join(map(str, row.counted)), " ".join(map(str, row.promised)))
        table.add_row(str(row.ranks), row.schedule, *numbers, "yes" if kept else "no")
    Console().print(table)


if __name__ == "__main__":
    main()
