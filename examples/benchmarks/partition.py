"""How even the stages are, and how well they are predicted, for seven models cut in several ways.

    python examples/benchmarks/partition.py                                        # all of it: about 25 minutes
    python examples/benchmarks/partition.py --models unet gpt2 --stages 2 4        # a part of it
    python examples/benchmarks/partition.py --memory                               # the memory of each stage

Four methods cut the same layers: "ours" merges by measured time; the others make the largest stage's number of layer
calls, of parameters, or of FLOPs as small as can be. Each stage runs in a process of its own, with one thread. A step
is one micro-batch, so that one stage works at a time and nothing disturbs it; what it waits for others is left out.
The methods take turns in the same processes.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import partition_memory
from partition_models import CASES
from partition_runs import METHODS, Outcome, compare
from ranks import run
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_lwpm.partition.units import human_bytes, human_seconds

EVEN = 1.10
"""Slowest over mean that counts as even."""

SMALL = 0.05
"""Stages with less of the work than this are left out of the worst prediction."""

COLOURS = {"ours": "#1f5fa8", "layers": "#f2b880", "parameters": "#8fbf7f", "flops": "#c48fde"}


@dataclass(frozen=True)
class Row:
    """What came of one method.

    Args:
        model: Key of the model.
        stages: Number of stages.
        method: "ours", "layers", "parameters" or "flops".
        cuts: The layers with which stages 1, 2, ... begin.
        bytes_cut: Bytes alive at all cuts, for one micro-batch.
        predicted: Seconds of each stage, forward and backward.
        measured: The same, medians over steps.
        possible: Slowest over mean of the best cuts for the measured layer times, if transfers cost nothing.
    """

    model: str
    stages: int
    method: str
    cuts: list[str]
    bytes_cut: int
    predicted: list[list[float]]
    measured: list[list[float]]
    possible: float

    @property
    def seconds(self) -> list[float]:
        """Measured seconds of each stage."""
        return [sum(pair) for pair in self.measured]

    @property
    def evenness(self) -> float:
        """Slowest stage over mean stage."""
        return max(self.seconds) / statistics.mean(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """Predicted over measured seconds of each stage."""
        return [sum(told) / seen for told, seen in zip(self.predicted, self.seconds, strict=True)]

    @property
    def of_slowest(self) -> float:
        """Predicted over measured for the slowest stage."""
        return self.ratios[self.seconds.index(max(self.seconds))]

    @property
    def worst(self) -> float:
        """The ratio that is furthest from 1 among stages that matter."""
        total = sum(self.seconds)
        matter = [r for r, seen in zip(self.ratios, self.seconds, strict=True) if seen > SMALL * total]
        return max(matter, key=lambda ratio: max(ratio, 1 / ratio))


def rows_of(model: str, outcome: Outcome) -> list[Row]:
    """The rows of one number of stages."""
    rows = []
    for method, plan in outcome.plans.items():
        medians = [[statistics.median(kind) for kind in zip(*steps, strict=True)] for steps in outcome.seconds[method]]
        rows.append(
            Row(
                model,
                len(plan.stages),
                method,
                [stage.begins for stage in plan.stages[1:]],
                sum(stage.bytes_onward for stage in plan.stages),
                [[stage.forward_seconds, stage.backward_seconds] for stage in plan.stages],
                medians,
                outcome.possible,
            )
        )
    return rows


def table_of(title: str, rows: Sequence[Row]) -> Table:
    """The rows of a model."""
    table = Table(
        title=title,
        caption=f"possible: with the best cuts for the measured layer times; * the sizes of the layers do not allow "
        f"{EVEN:.2f}. predicted over measured: of the slowest stage, and the worst of all stages with over {SMALL:.0%} "
        "of the work",
    )
    columns = ("stages", "cut by", "slowest", "slowest / mean", "possible", "over best other", "over cuts")
    for column in (*columns, "predicted / measured", "worst"):
        table.add_column(column, justify="left" if column == "cut by" else "right")
    for row, following in pairwise([*rows, None]):
        assert row is not None
        others = [max(r.seconds) for r in rows if r.stages == row.stages and r.method != "ours"]
        table.add_row(
            str(row.stages),
            row.method,
            human_seconds(max(row.seconds)),
            f"{row.evenness:.2f}",
            f"{row.possible:.2f}{'*' if row.possible > EVEN else ''}" if row.method == "ours" else "",
            f"{max(row.seconds) / min(others):.2f}" if row.method == "ours" and others else "",
            human_bytes(row.bytes_cut),
            f"{row.of_slowest:.2f}",
            f"{row.worst:.2f}",
            end_section=following is not None and following.stages != row.stages,
        )
    return table


def draw(rows: Sequence[Row], path: Path) -> None:
    """A figure of slowest over mean: a panel for each number of stages, a group of bars for each model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    counts = sorted({row.stages for row in rows})
    figure, panels = pyplot.subplots(len(counts), 1, figsize=(9, 1.0 + 1.7 * len(counts)), squeeze=False, sharex=True)
    for axes, count in zip(panels[:, 0], counts, strict=True):
        for number, method in enumerate(methods):
            found = {row.model: row for row in rows if row.method == method and row.stages == count}
            places = [i + (number - (len(methods) - 1) / 2) * 0.2 for i, model in enumerate(models) if model in found]
            heights = [found[model].evenness - 1 for model in models if model in found]
            axes.bar(places, heights, 0.18, bottom=1, color=COLOURS[method], label=method)
        best = {row.model: row.possible for row in rows if row.stages == count}
        for i, model in enumerate(models):
            if model in best:
                axes.plot([i - 0.45, i + 0.45], [best[model]] * 2, color="black", linewidth=0.8)
        axes.set_ylabel(f"{count} stages", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xticks(range(len(models)), [CASES[model].title for model in models], fontsize=7)
    panels[0, 0].legend(fontsize=7, ncols=len(methods), frameon=False)
    title = "Slowest stage over mean stage, measured; black: the best that the sizes of the layers allow"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--methods", nargs="+", choices=["ours", *METHODS], default=["ours", *METHODS])
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the methods")
    parser.add_argument("--steps", type=int, default=3, help="steps a round, after two that are not counted")
    parser.add_argument("--memory", action="store_true", help="measure the memory of each stage, not its time")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--svg", type=Path, help="where to draw slowest over mean")
    args = parser.parse_args()

    console = Console()
    rows: list[Row] = []
    for model in track(args.models, "models", console=Console(stderr=True)):
        if args.memory:
            console.print(
                partition_memory.table_of(
                    CASES[model].title, run(max(args.stages), partition_memory.measure, model, args)[0]
                )
            )
            continue
        outcomes = run(max(args.stages), compare, model, args)[0]
        found = [row for outcome in outcomes for row in rows_of(model, outcome)]
        console.print(table_of(CASES[model].title, found))
        rows += found
        if args.json:
            args.json.write_text(json.dumps([vars(row) for row in rows], indent=1))
    if args.svg:
        draw(rows, args.svg)


if __name__ == "__main__":
    main()
