"""Traces hold what Perfetto needs, and arrows lead from what was made to what uses it."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest
from timeline.test_spans import spans_of

from lightning_lwpm.pipeline.schedule import place
from lightning_lwpm.timeline.spans import Panel
from lightning_lwpm.timeline.write import write_timeline


@pytest.fixture
def events(tmp_path):
    spans, _, _ = spans_of("1f1b", 3, 4, 0.5)
    ranks = tuple(place(3))
    path = tmp_path / "new" / "trace.json"
    write_timeline([Panel("Planned: 1f1b", tuple(spans), ranks, 3), Panel("Measured: x", tuple(spans), ranks, 3)], path)
    return json.loads(path.read_text())["traceEvents"]


def test_each_rank_of_each_panel_is_a_process(events):
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {f"{panel}: rank {rank}" for panel in ("Planned", "Measured") for rank in range(3)}
    assert len({event["pid"] for event in events}) == 6


def test_slices_are_in_microseconds_and_do_not_overlap(events):
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) == 12  # two panels, three ranks, two threads
    for slices in threads.values():
        slices.sort()
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(slices))
    assert max(end for slices in threads.values() for _, end in slices) > 1e6
    assert any(e["args"].get("waits for") == "the activation of micro-batch 0 from stage 1" for e in events)


def test_arrows_lead_forward_in_time_between_slices(events):
    slices = [event for event in events if event["ph"] == "X" and event["tid"] == 0]

    def inside(event):
        return any(s["pid"] == event["pid"] and s["ts"] - 1e-6 <= event["ts"] < s["ts"] + s["dur"] for s in slices)

    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert (
        starts.keys() == ends.keys() and len(starts) == 2 * 2 * 2 * 4
    )  # panels, boundaries, directions, micro-batches
    for key, start in starts.items():
        assert start["ts"] < ends[key]["ts"] and start["pid"] != ends[key]["pid"]
        assert inside(start) and inside(ends[key])
