"""The timeline of a run: what its ranks measured, below what was planned for it."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_lwpm.partition.plan import PartitionPlan, Prediction
from lightning_lwpm.partition.units import counted, human_seconds
from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.pipeline.simulate import simulate
from lightning_lwpm.timeline.spans import COMPUTE, Panel, Span, bubble, busy, planned
from lightning_lwpm.tuning.predict import latency_of, seconds_of, table_of

__all__ = ["run_panels"]


def run_panels(
    spans: Sequence[Span], ranks: Sequence[int], num_ranks: int, plan: PartitionPlan | None
) -> tuple[Panel, ...]:
    """Planned and measured, on one axis of time that begins with the first span.

    The plan of each batch begins where its first action was measured to begin, or at the end of the plan of the batch
    before, if that is later. Where the plan knows FLOPs but no seconds, its times are stretched so that all its work
    takes as long as it was measured to take, and links take no time.

    Args:
        spans: Measured spans of all ranks, by one clock.
        ranks: The rank of each stage.
        num_ranks: Number of ranks.
        plan: The plan; ``None`` where there is none, as with one process.

    Returns:
        The panels; none if no action was measured.
    """
    work = [span for span in spans if span.kind in COMPUTE]
    if not work:
        return ()
    origin = min(span.begin for span in spans)
    begins: dict[int, float] = {}
    for span in sorted(work, key=lambda span: span.begin):
        begins.setdefault(span.batch, span.begin - origin)
    seconds = sum(
        max(s.end for s in work if s.batch == batch) - origin - begin for batch, begin in begins.items()
    ) / len(begins)
    first, last = min(begins), max(begins)
    numbers = f"batch {first}" if first == last else f"batches {first} to {last}"
    title = f"Measured: {numbers}, {human_seconds(seconds)} each without the optimizer, bubble {bubble(work):.0%}"
    found = Panel(title, tuple(span.moved(-origin) for span in spans), tuple(ranks), num_ranks)
    wanted = _planned(plan, begins, busy(work)) if plan is not None and plan.prediction is not None else None
    return (wanted, found) if wanted is not None else (found,)


def _planned(plan: PartitionPlan, begins: dict[int, float], work: float) -> Panel:
    """The plan, once for each batch.

    Args:
        plan: With its prediction.
        begins: When each batch began.
        work: Seconds of work of all batches, over all ranks.
    """
    told = plan.prediction
    assert told is not None
    one, step = _batch(plan, told)
    stretch = 1.0 if told.measured else work / len(begins) / (busy(one) or 1.0)
    spans, free = [], 0.0
    for batch, begin in begins.items():
        start = max(begin, free)
        free = start + step * stretch
        for span in one:
            at = start + span.begin * stretch
            spans.append(replace(span, begin=at, end=at + span.seconds * stretch, batch=batch))
    source = "" if told.measured else " (from FLOPs, as long as measured)"
    title = (
        f"Planned: {told.schedule}, {counted(told.num_microbatches, 'micro-batch', 'micro-batches')}, "
        f"{human_seconds(step * stretch)} "
        f"each{source}, bubble {told.bubble:.0%}"
    )
    return Panel(title, tuple(spans), plan.ranks, plan.num_ranks)


def _batch(plan: PartitionPlan, told: Prediction) -> tuple[list[Span], float]:
    """The spans of a batch, and the seconds from its begin to the next one's.

    Of asynchronous training this is a batch in the middle of others, with the forward passes that it admits; they count
    on. It begins with the last stage's first pass; other stages come to it sooner or later.
    """
    count, middle = told.num_microbatches, told.schedule == "async"
    table = table_of(plan, told.schedule)((3 + len(plan.ranks) // count) * count if middle else count)
    # seconds of links have no measure in FLOPs
    costs, latency = seconds_of(plan), latency_of(plan) if told.measured else 0.0
    run = simulate(table, plan.ranks, costs, latency)
    spans = planned(table, plan.ranks, run, costs, latency)
    if not middle:
        return spans, run.makespan
    last = len(plan.ranks) - 1
    begin, end = (run.starts[Action("F", last, number)] for number in (count, 2 * count))
    chosen = []
    for stage, rank in enumerate(plan.ranks):
        row = [span for span in spans if span.rank == rank]
        own = (Action("F", stage, count + last - stage), Action("B", stage, 2 * count - 1))
        first, final = ([span.name for span in row].index(str(action)) for action in own)
        waited = first > 0 and row[first - 1].kind == "wait"
        chosen += [_renumbered(span.moved(-begin), -count) for span in row[first - waited : final + 1]]
    return chosen, end - begin


def _renumbered(span: Span, by: int) -> Span:
    """A planned span of another micro-batch."""
    number = span.microbatch + by
    name = span.name if span.kind == "wait" else str(Action(span.kind, span.stage, number))
    what = span.what.replace(f"micro-batch {span.microbatch} ", f"micro-batch {number} ")
    return replace(span, microbatch=number, name=name, what=what)
