"""Spans: actions without their waits, planned waits, and the bubble."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.pipeline.schedule import POLICIES, Action, build, place, unit
from lightning_lwpm.pipeline.simulate import simulate
from lightning_lwpm.timeline.spans import COMPUTE, Span, bubble, busy, longest_pieces, measured, planned, reason


def spans_of(name: str, ranks: int, count: int, latency: float = 0.0) -> tuple[list[Span], float, float]:
    """The planned spans of a schedule, its bubble and its makespan."""
    each = 2 if name in ("interleaved_1f1b", "zbv") else 1
    placement = place(each * ranks, ranks, "v" if name == "zbv" else "loop")
    table = build(name, each * ranks, count, ranks, placement, latency=latency)
    run = simulate(table, placement, unit, latency)
    return planned(table, placement, run, unit, latency), run.bubble, run.makespan


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("ranks", "count", "latency"), [(1, 3, 0.0), (3, 1, 0.5), (4, 8, 0.25)])
def test_planned_spans_fill_each_rank_up_to_its_last_action(name, ranks, count, latency):
    spans, idle, makespan = spans_of(name, ranks, count, latency)
    for rank in range(ranks):
        mine = sorted((span for span in spans if span.rank == rank), key=lambda span: span.begin)
        assert mine[0].begin == 0.0
        assert all(a.end == pytest.approx(b.begin) for a, b in pairwise(mine))
        waits = [span for span in mine if span.kind == "wait"]
        assert all(span.name in ("activation", "gradient") and f"stage {span.stage}" in span.what for span in waits)
    assert max(span.end for span in spans) == pytest.approx(makespan)
    assert bubble(spans) == pytest.approx(idle)


def test_a_wait_says_what_it_is_for():
    spans, _, _ = spans_of("1f1b", 2, 2)
    waits = {(span.rank, span.begin): span.what for span in spans if span.kind == "wait"}
    assert waits[0, 0.0] == "the activation of micro-batch 0 from stage 0"
    assert waits[1, 2.0] == "the gradient of micro-batch 0 from stage 1"


def test_measured_actions_lose_what_they_waited():
    actions = [(Action("F", 1, 0), 0.0, 4.0), (Action("B", 1, 0), 4.0, 6.0)]
    waits = [
        ("the activation (output 0 of layer 'a') of micro-batch 0 from stage 0 (rank 1)", 1.0, 3.0),
        ("batch 3 from rank 0, which reads the data", -2.0, -1.0),
    ]
    spans = measured(0, actions, [("data", -3.0, 0.0), ("optimizer", 6.0, 7.0)], waits, batch=5)
    told = [(span.name, span.begin, span.end) for span in spans]
    assert told == [
        ("data", -3.0, -2.0),
        ("data", -2.0, -1.0),  # the wait
        ("data", -1.0, 0.0),
        ("1F0", 0.0, 1.0),
        ("activation", 1.0, 3.0),
        ("1F0", 3.0, 4.0),
        ("1B0", 4.0, 6.0),
        ("optimizer", 6.0, 7.0),
    ]
    assert busy(spans) == 4.0
    assert bubble(spans) == pytest.approx(1 / 3)
    assert {span.batch for span in spans} == {5}
    assert (spans[4].stage, spans[4].microbatch) == (0, 0)


@given(
    st.lists(st.floats(0.01, 2.0), min_size=1, max_size=8),
    st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.01, 1.0)), max_size=8),
)
def test_pieces_and_waits_never_overlap(lengths, gaps):
    actions, now = [], 0.0
    for number, length in enumerate(lengths):
        actions.append((Action("F", 0, number), now, now + length))
        now += length
    waits, at = [], 0.0
    for gap, length in gaps:
        waits.append(("the gradient", at + gap, at + gap + length))
        at += gap + length
    spans = measured(0, actions, [], waits)
    assert all(a.end <= b.begin + 1e-9 for a, b in pairwise(spans))
    inside = sum(max(0.0, min(end, now) - begin) for _, begin, end in waits)
    assert busy(spans) == pytest.approx(now - inside)


def test_the_bubble_of_several_batches_is_that_of_all_their_time():
    spans, idle, makespan = spans_of("1f1b", 2, 4)
    later = [Span(**{**vars(span), "batch": 1}).moved(5 * makespan) for span in spans]
    assert bubble([*spans, *later]) == pytest.approx(idle)
    assert bubble([]) == 0.0


def test_the_longest_piece_stands_for_an_action():
    actions = [(Action("F", 0, 2), 0.0, 10.0)]
    spans = measured(0, actions, [], [("the gradient", 1.0, 2.0), ("the gradient", 8.0, 9.0)])
    assert [(s.begin, s.end) for s in longest_pieces(spans).values()] == [(2.0, 8.0)]
    assert len([s for s in spans if s.kind in COMPUTE]) == 3


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("the gradient norms of all ranks: rank 1", "optimizer"),
        ("the shared gradients of rank 1", "gradient"),
        ("the end of backward of micro-batch 0 from stage 1 (rank 0)", "gradient"),
        ("the end of forward of micro-batch 0 from stage 1 (rank 0)", "activation"),
        ("word from rank 0 whether there is a batch 3", "data"),
        ("all ranks at 'barrier'", "other"),
    ],
)
def test_reasons(what, name):
    assert reason(what) == name


def test_a_device_works_while_the_host_waits() -> None:
    actions = [(Action("F", 0, 0), 1.0, 3.0), (Action("F", 0, 1), 4.0, 6.0)]
    waits = [("the gradient of micro-batch 0 from stage 1 (rank 0)", 2.0, 5.0)]
    spans = measured(1, actions, [], waits, 0, on_device=True)
    assert [(span.kind, span.begin, span.end) for span in spans] == [("F", 1, 3), ("wait", 3, 4), ("F", 4, 6)]
