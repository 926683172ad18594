"""Costs of calls and links: estimates on the scale of what was measured, and correction by whole stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.partition.costs import CallCost, Costs, Link, estimate, estimate_seconds, filled
from lightning_lwpm.partition.timeline import LayerCall, Timeline

LINK = Link(1e-3, 1e6)
POSITIVE = st.floats(1e-6, 1e6)


def step(*flops: float, weights: int = 1) -> Timeline:
    calls = tuple(LayerCall(f"l{i}", 0, work, 0.0, 4 * weights, weights) for i, work in enumerate(flops))
    return Timeline(calls, (0,) * len(flops), (True,) * len(flops))


def test_a_link_takes_its_latency_and_the_time_of_the_bytes() -> None:
    assert LINK.seconds(0) == 1e-3
    assert LINK.seconds(5e6) == pytest.approx(5.001)


def test_estimates_grow_with_arithmetic_and_with_memory() -> None:
    assert estimate_seconds(2e9, 0) == pytest.approx(2 * estimate_seconds(1e9, 0))
    assert estimate_seconds(0, 2e9) == pytest.approx(2 * estimate_seconds(0, 1e9))
    assert estimate_seconds(1e9, 1e9) == pytest.approx(estimate_seconds(1e9, 0) + estimate_seconds(0, 1e9))
    assert estimate_seconds(1e9, 1e9) == pytest.approx(3 * estimate_seconds(1e9, 1e9, train=False))


def test_an_estimate_is_called_one() -> None:
    found = estimate(step(1e9, 3e9))
    assert found.measured == 0 and not any(call.measured for call in found.calls)
    assert found.work[1] == pytest.approx(3 * found.work[0])
    assert found.calls[0].backward == pytest.approx(2 * found.calls[0].forward)
    assert found.calls[0].weight == found.calls[0].forward
    assert estimate(step(1e9, weights=0)).calls[0].weight == 0, "no weights, so nothing to put off"


def test_estimates_take_the_scale_of_what_was_measured() -> None:
    """A machine a hundred times slower than the nominal one is so for all layers."""
    nominal = estimate(step(1e9, 2e9, 4e9)).calls
    slow = CallCost(100 * nominal[1].forward, 100 * nominal[1].backward, nominal[1].weight)
    found = filled(step(1e9, 2e9, 4e9), [None, slow, None], LINK)
    assert [call.measured for call in found.calls] == [False, True, False] and found.measured == 1
    assert found.calls[1] is slow and found.link is LINK
    for call, guess in ((found.calls[0], nominal[0]), (found.calls[2], nominal[2])):
        assert call.forward == pytest.approx(100 * guess.forward)
        assert call.backward == pytest.approx(100 * guess.backward)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=6))
def test_the_scale_is_that_of_all_measured_calls_together(pairs: list[tuple[float, float]]) -> None:
    """So that a call whose estimate is small, and quite wrong, does not set it."""
    flops = [work for work, _ in pairs]
    timings = [CallCost(seconds, 2 * seconds) for _, seconds in pairs]
    found = filled(step(*flops, sum(flops)), [*timings, None], LINK)
    assert found.work[-1] == pytest.approx(sum(found.work[:-1]))


def test_nothing_measured_leaves_the_estimate() -> None:
    assert filled(step(1e9, 2e9), [None, None], LINK).calls == estimate(step(1e9, 2e9)).calls


def test_measured_calls_without_any_count_set_no_scale() -> None:
    """Such as a step that only looks up embeddings: nothing tells how estimates compare."""
    found = filled(step(0, 1e9), [CallCost(1.0, 2.0), None], LINK)
    assert found.calls[1] == estimate(step(0, 1e9)).calls[1]


def test_correction_by_stage() -> None:
    before = Costs((CallCost(1, 2, 0.5), CallCost(3, 4, 1), CallCost(5, 6, 2, measured=False)), LINK)
    after = before.corrected([2], [(2, 3), (10, 0.5)])
    assert after.calls == (CallCost(2, 6, 1.5), CallCost(6, 12, 3), CallCost(50, 3, 1, measured=False))
    assert after.link is LINK
    with pytest.raises(ValueError, match="shorter"):
        before.corrected([2], [(2, 3)])
