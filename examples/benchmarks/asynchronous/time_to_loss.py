"""How long training takes to the loss of exact training: steps until then, times the step of stages that sleep.

    C="python examples/benchmarks/asynchronous/corrections.py --every 25 --microbatches 8 --stages 4 8"
    $C --out losses.json --steps 1500 --corrections look_ahead+discount          # as many steps as exact training
    $C --out losses.json --steps 1575 --corrections look_ahead+discount          # a run planned to be longer
    python examples/benchmarks/asynchronous/time_to_loss.py losses.json --picture time_to_loss.svg       # 3 minutes

Learning rates follow the number of steps that a run is planned to have, so a loss that a run does not reach may be
reached by one that is planned to be a little longer: of all that do, the quickest counts. Exact training takes the best
of all exact schedules. What a forward pass sleeps says nothing here: both sides are measured with the same stages, and
time is told in the steps of a pipeline that never idles.
"""

import argparse
import json
import statistics
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import linear
import scaling
from corrections import DEFAULT

SCHEDULES = ["1f1b", "interleaved_1f1b", "zb1p", "zbv"]


@dataclass(frozen=True)
class Course:
    """Scores over time, of one seed.

    Args:
        step: Duration of a step, in steps of a pipeline that never idles.
        every: Steps between two scores.
        scores: Validation losses.
        goal: What exact training ends with.
    """

    step: float
    every: int
    scores: list[float]
    goal: float

    @property
    def times(self) -> list[float]:
        """When each score was reached."""
        return [self.step * self.every * (i + 1) for i in range(len(self.scores))]

    @property
    def arrival(self) -> float | None:
        """When the goal was reached first."""
        return next((t for t, score in zip(self.times, self.scores, strict=True) if score <= self.goal), None)


@dataclass(frozen=True)
class Duel:
    """Both sides at a number of stages.

    Args:
        stages: Number of stages, one a rank.
        schedule: The fastest exact schedule.
        exact_step: Duration of its step, in steps of a pipeline that never idles.
        late_step: The same of asynchronous training.
        exact: Exact training with it, by seed.
        late: Asynchronous training, by seed.
    """

    stages: int
    schedule: str
    exact_step: float
    late_step: float
    exact: list[Course]
    late: list[Course]


def duel(results: list[dict[str, Any]], stages: int, args: Any) -> Duel:
    """Measure both sides' steps, and lay the courses over them of all seeds in which the loss is reached."""
    timed = Namespace(ranks=[stages], milliseconds=args.milliseconds, steps=args.steps, warm_up=1)
    late = linear.rows(Namespace(**vars(timed) | {"microbatches": [args.microbatches]}))[0]
    rows = scaling.rows(Namespace(**vars(timed), microbatches=args.microbatches, schedules=SCHEDULES))
    best = min(rows, key=lambda row: row.measured)
    exact, quickest = [], []
    steps = max(run["steps"] for run in results if run["correction"] == "exact" and run["model"] == "characters")
    for own in results:
        if (own["model"], own["correction"], own["steps"]) != ("characters", "exact", steps):
            continue
        wanted = ("characters", args.correction, stages, args.microbatches, own["seed"])
        keys = ("model", "correction", "stages", "microbatches", "seed")
        runs = [run for run in results if tuple(run[key] for key in keys) == wanted]
        courses = [Course(late.step / late.linear, run["every"], run["scores"], own["score"]) for run in runs]
        reached = [course for course in courses if course.arrival is not None]
        if reached:
            exact.append(Course(best.measured / late.linear, own["every"], own["scores"], own["score"]))
            quickest.append(min(reached, key=lambda course: course.arrival or 0.0))
    return Duel(stages, best.schedule, best.measured / late.linear, late.step / late.linear, exact, quickest)


def draw(duels: list[Duel], path: Path) -> None:
    """One panel for each number of stages: mean loss over time."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(duels), figsize=(4.6 * len(duels), 3.2), layout="constrained", sharey=True)
    for panel, both in zip(panels if len(duels) > 1 else [panels], duels, strict=True):
        for courses, label, color in ((both.exact, both.schedule, "0.45"), (both.late, "async", "C0")):
            for course in courses:
                panel.plot(course.times, course.scores, color=color, label=label if course is courses[0] else None)
        panel.axhline(statistics.fmean(course.goal for course in both.exact), color="0.7", lw=0.8, ls=":")
        panel.set(title=f"{both.stages} stages", xlabel="time, in steps that never idle", ylim=(1.2, 2.2))
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    (panels[0] if len(duels) > 1 else panels).set_ylabel("validation loss")
    figure.savefig(path)


def main() -> None:
    """Measure, and print a table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of corrections.py")
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--correction", default=DEFAULT)
    parser.add_argument("--milliseconds", type=float, default=40, help="of a forward pass of a stage")
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()

    results = [run for path in args.results for run in json.loads(path.read_text())]
    duels = [duel(results, stages, args) for stages in args.stages]
    reached = [both for both in duels if both.late]
    table = Table(title=f"time to the loss of exact training, {args.microbatches} micro-batches")
    for column in ("stages", "exact schedule", "its step", "async step", "steps to the loss", "times as fast"):
        table.add_column(column, justify="left" if column == "exact schedule" else "right")
    for both in duels:
        steps, gains = [], []
        for exact, late in zip(both.exact, both.late, strict=True):
            assert exact.arrival is not None
            arrival = late.arrival
            steps.append(
                "never" if arrival is None else f"{arrival / late.step:.0f} / {exact.arrival / exact.step:.0f}"
            )
            gains.append("-" if arrival is None else f"{exact.arrival / arrival:.2f}")
        told = ", ".join(steps) or "not reached", ", ".join(gains) or "-"
        cells = f"{both.exact_step:.3f}", f"{both.late_step:.3f}", *told
        table.add_row(str(both.stages), both.schedule, *cells)
    Console(width=120).print(table)
    if args.picture is not None and reached:
        draw(reached, args.picture)


if __name__ == "__main__":
    main()
