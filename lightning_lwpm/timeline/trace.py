"""Timelines as Chrome traces, to be opened at https://ui.perfetto.dev or in ``chrome://tracing``.

::

    process     a rank of a panel: "measured: rank 0"
    threads     compute (actions, optimizer, data) and waits
    arrows      from the action that made a tensor, on another rank, to the one that uses it

The format is that of "Trace Event Format" (Google, 2016): complete events (X), metadata (M) and flows (s, f).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_lwpm.pipeline.schedule import Action, dependencies
from lightning_lwpm.timeline.spans import COMPUTE, KINDS, Panel, Span, longest_pieces

__all__ = ["save_trace"]

_COMPUTE, _WAITS = 0, 1
_APART = 1000  # process numbers of the panels


def save_trace(panels: Sequence[Panel], path: str | os.PathLike[str], seconds: float = 1.0) -> None:
    """Write panels as one trace.

    Args:
        panels: What to write.
        path: Where to; folders that are missing are made.
        seconds: How long the spans' unit of time is.
    """
    events: list[dict[str, Any]] = []
    for number, panel in enumerate(panels):
        first = _APART * number
        events += _names(panel, first)
        events += (_slice(span, first, 1e6 * seconds) for span in panel.spans)
        events += _arrows(panel, first, 1e6 * seconds, f"{number}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _names(panel: Panel, first: int) -> Iterator[dict[str, Any]]:
    label = panel.title.split(":")[0].split(",")[0]
    for rank in range(panel.num_ranks):
        event = {"ph": "M", "pid": first + rank}
        yield {**event, "name": "process_name", "args": {"name": f"{label}: rank {rank}"}}
        yield {**event, "name": "process_sort_index", "args": {"sort_index": first + rank}}
        for thread, name in ((_COMPUTE, "compute"), (_WAITS, "waits")):
            yield {**event, "tid": thread, "name": "thread_name", "args": {"name": name}}
            yield {**event, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _slice(span: Span, first: int, scale: float) -> dict[str, Any]:
    """A span, in microseconds."""
    args = {"kind": KINDS[span.kind], "batch": span.batch}
    if span.stage >= 0:
        args["stage"] = span.stage
    if span.microbatch >= 0:
        args["micro-batch"] = span.microbatch
    if span.what:
        args["waits for"] = span.what
    return {
        "ph": "X",
        "pid": first + span.rank,
        "tid": _WAITS if span.kind == "wait" else _COMPUTE,
        "name": f"wait for {span.name}" if span.kind == "wait" else span.name,
        "cat": KINDS[span.kind],
        "ts": span.begin * scale,
        "dur": span.seconds * scale,
        "args": args,
    }


def _arrows(panel: Panel, first: int, scale: float, label: str) -> Iterator[dict[str, Any]]:
    """From each action to those of other ranks that need its result."""
    pieces = longest_pieces(panel.spans)
    ends = _last_pieces(panel.spans)
    present = {action for _, action in ends}
    for (batch, action), span in pieces.items():
        for source in dependencies(action, len(panel.ranks), present):
            made = ends.get((batch, source))
            if made is None or made.rank == span.rank:
                continue
            name = f"{label}.{batch}.{source}>{action}"
            flow = {"cat": "tensor", "name": "activation" if source.kind == "F" else "gradient", "id": name}
            # shortly before its end: an arrow belongs to the slice that its time lies in
            leaves = made.end - made.seconds / 100
            yield {**flow, "ph": "s", "pid": first + made.rank, "tid": _COMPUTE, "ts": leaves * scale}
            yield {**flow, "ph": "f", "bp": "e", "pid": first + span.rank, "tid": _COMPUTE, "ts": span.begin * scale}


def _last_pieces(spans: Iterable[Span]) -> dict[tuple[int, Action], Span]:
    """Of each action, the piece with which it ends."""
    return {(s.batch, Action(s.kind, s.stage, s.microbatch)): s for s in spans if s.kind in COMPUTE}
