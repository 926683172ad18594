"""Draws the README's figure: layers on several devices without and with micro-batches, from the tables that are run.

python examples/figures/schedules.py
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from lightning_lwpm.pipeline.schedule import Table, build, place, unit
from lightning_lwpm.pipeline.simulate import simulate

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
from matplotlib import pyplot  # noqa: E402

COLOURS = {"F": "#8fb8de", "B": "#f2b880"}


def draw(axes: Axes, title: str, table: Table, stages: int, scale: float, end: float) -> None:
    """One schedule: a row a device, a box an action, numbered by micro-batch; what is left white is idle."""
    placement = place(stages)
    found = simulate(table, placement, lambda action: scale * unit(action))
    for action, start in found.starts.items():
        row = action.stage
        seconds = scale * unit(action)
        axes.broken_barh([(start, seconds)], (row - 0.42, 0.84), facecolors=COLOURS[action.kind], edgecolor="white")
        axes.text(start + seconds / 2, row, str(action.microbatch), ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, end), ylim=(stages - 0.4, -0.6), yticks=range(stages), xticks=[])
    axes.set_yticklabels([f"stage {s}, rank {placement[s]}" for s in range(stages)], fontsize=7)
    axes.set_title(f"{title}: {found.makespan:.0f} units, {found.bubble:.0%} idle", loc="left", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("schedules.svg"))
    args = parser.parse_args()
    stages, count = args.stages, args.microbatches
    end = 3.0 * count * stages
    figure, rows = pyplot.subplots(2, 1, figsize=(9, 3.2), layout="constrained")
    draw(rows[0], "the whole batch at once", build("gpipe", stages, 1, stages), stages, count, end)
    draw(rows[1], f"{count} micro-batches, schedule 1f1b", build("1f1b", stages, count, stages), stages, 1.0, end)
    title = f"One training step, layers on {stages} devices: forward (blue) and backward (orange) of each micro-batch"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
