"""A step at sizes that nobody looked at: exact at known sizes, straight between them, never negative."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning.steps import costs, look, timeline

from lightning_lwpm.partition.costs import CallCost, Costs, Link
from lightning_lwpm.tuning.sized import Look, at

SECONDS = st.floats(0, 10)
BYTES = st.integers(0, 10**9)
COUNT = st.integers(0, 10**6)


@st.composite
def looks(draw: st.DrawFn) -> list[Look]:
    """Two looks at one step of three layers, with any numbers."""
    found = []
    for samples in draw(st.lists(st.integers(1, 64), min_size=2, max_size=2, unique=True)):
        calls = tuple(
            replace(call, flops=draw(COUNT), bytes_moved=draw(COUNT), kept_bytes=draw(BYTES), passing_bytes=draw(BYTES))
            for call in timeline([0, 0, 0]).calls
        )
        edges = (0, draw(BYTES), draw(BYTES))
        times = tuple(CallCost(draw(SECONDS), draw(SECONDS), draw(SECONDS)) for _ in calls)
        found.append(Look(samples, replace(timeline([0, 0, 0]), calls=calls, boundary_bytes=edges), Costs(times)))
    return found


def numbers(found: Look) -> list[float]:
    """All that depends on the size."""
    out: list[float] = list(found.timeline.boundary_bytes)
    for call, cost in zip(found.timeline.calls, found.costs.calls, strict=True):
        out += [call.flops, call.bytes_moved, call.kept_bytes, call.passing_bytes]
        out += [cost.forward, cost.backward, cost.weight]
    return out


@given(looks())
def test_exact_at_known_sizes(pair: list[Look]) -> None:
    for known in pair:
        assert at(pair, known.samples) is known
        assert at(pair[::-1], known.samples) is known


@given(looks(), st.floats(0, 1))
def test_between_two_looks_it_lies_between_them(pair: list[Look], share: float) -> None:
    low, high = sorted(pair, key=lambda one: one.samples)
    samples = low.samples + share * (high.samples - low.samples)
    for a, b, between in zip(numbers(low), numbers(high), numbers(at(pair, samples)), strict=True):
        assert min(a, b) - 1 <= between <= max(a, b) + 1


@given(looks(), st.floats(0.01, 1000))
def test_never_negative_and_the_same_step(pair: list[Look], samples: float) -> None:
    found = at(pair, samples)
    assert found.samples == samples
    assert min(numbers(found)) >= 0
    assert [call.name for call in found.timeline.calls] == ["l0", "l1", "l2"]
    assert found.timeline.boundary_bytes[0] == 0
    assert all(isinstance(nbytes, int) for nbytes in found.timeline.boundary_bytes)


@pytest.mark.parametrize("samples", [1, 2, 6, 8, 20])
def test_overhead_and_slope(samples: float) -> None:
    """Seconds of ``3 + 2 n`` at 4 and 8 samples are so at any size, and bytes of ``100 n`` too."""
    pair = [look(n, [3 + 2 * n], weight=1, kept=100 * n, passing=10 * n) for n in (4, 8)]
    found = at(pair, samples)
    assert found.costs.calls[0].forward == pytest.approx(3 + 2 * samples)
    assert found.costs.calls[0].weight == pytest.approx(3 + 2 * samples)
    assert found.timeline.calls[0].kept_bytes == 100 * samples
    assert found.timeline.calls[0].passing_bytes == 10 * samples


def test_a_step_that_grows_faster_than_its_size_does_not_vanish_below() -> None:
    """Seconds of 1 at 4 samples and 4 at 8: the straight line would be negative at 2."""
    pair = [look(4, [1.0]), look(8, [4.0])]
    assert at(pair, 2).costs.calls[0].forward == pytest.approx(0.5)


def test_one_look_is_taken_in_proportion() -> None:
    found = at([look(4, [2.0, 6.0], kept=40, boundary=8)], 6)
    assert [call.forward for call in found.costs.calls] == [pytest.approx(3), pytest.approx(9)]
    assert [call.kept_bytes for call in found.timeline.calls] == [60, 60]
    assert found.timeline.boundary_bytes == (0, 12)


def test_looks_at_different_calls_are_not_mixed() -> None:
    """Such as a loop over samples: the nearer look counts alone."""
    short, long = look(2, [1.0, 1.0]), look(8, [5.0, 5.0, 5.0])
    assert [call.forward for call in at([short, long], 4).costs.calls] == [pytest.approx(2)] * 2
    assert [call.forward for call in at([short, long], 6).costs.calls] == [pytest.approx(3.75)] * 3


def test_weights_cuts_and_link_stay() -> None:
    base = Look(4, timeline([1, 1], weights=400, allowed=[True, False]), costs([1, 1], Link(0.25, 1e3)))
    found = at([base], 8)
    assert [call.parameter_bytes for call in found.timeline.calls] == [400, 400]
    assert found.timeline.allowed == (True, False)
    assert found.costs.link == Link(0.25, 1e3) and found.costs.measured == 2
