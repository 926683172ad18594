"""Draws the README's figure: layers on several devices without and with micro-batches, from the tables that are run.

python examples/figures/schedules.py
python examples/figures/schedules.py --all    # every schedule, into all_schedules.svg
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from lightning_lwpm.pipeline.schedule import POLICIES, Table, build, place, unit
from lightning_lwpm.pipeline.simulate import bound, simulate

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
from matplotlib import pyplot  # noqa: E402

COLOURS = {"F": "#8fb8de", "B": "#f2b880", "I": "#f2b880", "W": "#a9d18e"}


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


def draw_ranks(axes: Axes, name: str, table: Table, placement: Sequence[int], scale: float, end: float) -> None:
    """One schedule of several stages a rank: a row a rank; later stages of a rank are paler."""
    found = simulate(table, placement, lambda action: scale * unit(action))
    for action, start in found.starts.items():
        rank, seconds = placement[action.stage], scale * unit(action)
        pale = 1.0 - 0.45 * sum(other == rank for other in placement[: action.stage])
        box = {"facecolors": COLOURS[action.kind], "edgecolor": "white", "alpha": pale}
        axes.broken_barh([(start, seconds)], (rank - 0.42, 0.84), **box)
        axes.text(start + seconds / 2, rank, str(action.microbatch), ha="center", va="center", fontsize=5)
    axes.set(xlim=(0, end), ylim=(-0.6, len(table) - 0.4), yticks=range(len(table)), xticks=[])
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(table))], fontsize=7)
    least = scale * bound(table, placement)
    title = f"{name}: {found.makespan:.4g} units, {found.bubble:.0%} idle, {least / found.makespan:.0%} of its bound"
    axes.set_title(title, loc="left", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def draw_all(ranks: int, count: int, out: Path) -> None:
    """Every schedule on the same ranks, with the same work; where stages are many, each takes half the time."""
    figure, rows = pyplot.subplots(len(POLICIES), 1, figsize=(9, 1.5 * len(POLICIES)), layout="constrained")
    end = 3.0 * (count + ranks - 1)
    for axes, (name, policy) in zip(rows, POLICIES.items(), strict=True):
        parts = 2 if name in ("interleaved_1f1b", "zbv") else 1
        placement = place(parts * ranks, ranks, "v" if policy.style == "v" else "loop")
        draw_ranks(axes, name, build(name, parts * ranks, count, ranks), placement, 1 / parts, end)
    title = "Forward (blue), backward or gradients of inputs (orange), gradients of weights (green); second stages pale"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(out)
    print(f"wrote {out}")


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("schedules.svg"))
    parser.add_argument("--all", action="store_true", help="draw every schedule")
    args = parser.parse_args()
    if args.all:
        draw_all(args.stages, args.microbatches, args.out.with_name("all_schedules.svg"))
        return
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
