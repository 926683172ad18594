"""The timeline of a run: what its ranks measured, below what was planned for it."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_lwpm.partition.plan import PartitionPlan
from lightning_lwpm.partition.units import human_seconds
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
    table = table_of(plan, told.schedule)(told.num_microbatches)
    # seconds of links have no measure in FLOPs
    costs, latency = seconds_of(plan), latency_of(plan) if told.measured else 0.0
    run = simulate(table, plan.ranks, costs, latency)
    one = planned(table, plan.ranks, run, costs, latency)
    stretch = 1.0 if told.measured else work / len(begins) / (busy(one) or 1.0)
    spans, free = [], 0.0
    for batch, begin in begins.items():
        start = max(begin, free)
        free = start + run.makespan * stretch
        for span in one:
            at = start + span.begin * stretch
            spans.append(replace(span, begin=at, end=at + span.seconds * stretch, batch=batch))
    source = "" if told.measured else " (from FLOPs, as long as measured)"
    title = (
        f"Planned: {told.schedule}, {told.num_microbatches} micro-batches, {human_seconds(run.makespan * stretch)} "
        f"each{source}, bubble {run.bubble:.0%}"
    )
    return Panel(title, tuple(spans), plan.ranks, plan.num_ranks)
