"""What stages need is what counting by hand gives."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.memory import Memory
from lightning_lwpm.partition.merge import NothingFits, merge


def to_the_end(stage, num_stages):
    return num_stages - stage


@st.composite
def memories(draw):
    n = draw(st.integers(1, 7))
    numbers = st.lists(st.integers(0, 9), min_size=n, max_size=n)
    uses = st.lists(st.integers(0, n - 1), max_size=4).map(tuple)
    parameters = draw(st.lists(st.tuples(uses, st.integers(0, 9)), max_size=6))
    shared = draw(st.lists(st.tuples(uses, st.integers(0, 9)), max_size=3))
    limit = draw(st.integers(1, 60))
    return Memory(parameters, draw(numbers), draw(numbers), draw(numbers), to_the_end, limit, shared)


def by_hand(memory, stage, num_stages, begin, end):
    n, flying = len(memory.kept), num_stages - stage
    inside = set(range(begin, end))
    weights = sum(nbytes for where, nbytes in memory.parameters if set(where) & inside)
    working = flying * sum(memory.kept[begin:end]) + max(memory.transient[begin:end])
    if begin > 0:
        working += flying * memory.boundary[begin]
    if end < n:
        working += flying * memory.boundary[end]
    exchange = sum(
        (1 + len(set(where) - inside)) * nbytes
        for where, nbytes in memory.shared
        if set(where) & inside and set(where) - inside
    )
    return weights + max(working, exchange)


@given(memories(), st.integers(1, 5), st.data())
def test_need_equals_counting(memory, num_stages, data):
    stage, n = data.draw(st.integers(0, num_stages - 1)), len(memory.kept)
    need, feasible = memory.need(stage, num_stages), memory.feasible(stage, num_stages)
    assert need.shape == feasible.shape == (n + 1, n + 1)
    for begin in range(n + 1):
        for end in range(n + 1):
            if end <= begin:
                assert not feasible[begin, end]
                continue
            expected = by_hand(memory, stage, num_stages, begin, end)
            assert need[begin, end] == expected
            assert sum(memory.breakdown(stage, num_stages, begin, end).values()) == expected
            assert feasible[begin, end] == (expected <= memory.limits)


@given(memories(), st.integers(1, 5), st.none() | st.integers(1, 9))
def test_no_stage_of_a_plan_exceeds_its_device(memory, num_stages, microbatches):
    n = len(memory.kept)
    ones = [1.0] * n
    try:
        cuts = merge(ones, ones, [True] * n, num_stages, microbatches, memory.feasible)
    except NothingFits:
        return
    edges = [0, *cuts, n]
    for stage, (begin, end) in enumerate(pairwise(edges)):
        assert begin < end
        assert by_hand(memory, stage, len(edges) - 1, begin, end) <= memory.limits


def test_a_tied_parameter_counts_once_in_each_stage_that_uses_it():
    memory = Memory([((0, 2), 100), ((1,), 1)], [0] * 3, [0] * 3, [0] * 3, to_the_end)
    whole, first, middle, last = ((0, 3), (0, 1), (1, 2), (2, 3))
    assert [memory.breakdown(0, 1, *span)["weights"] for span in (whole, first, middle, last)] == [101, 100, 1, 100]
    assert [memory.need(0, 1)[span] for span in (whole, first, middle, last)] == [101, 100, 1, 100]


def test_breakdown_names_the_parts():
    memory = Memory([((1,), 1000)], [1, 2, 3], [0, 10, 20], [7, 5, 6], to_the_end)
    assert memory.breakdown(1, 3, 1, 2) == {
        "weights": 1000,
        "activations": 2 * 2,
        "received": 2 * 10,
        "sent": 2 * 20,
        "transient": 5,
    }


def test_shared_gradients_are_exchanged_when_the_rest_is_done():
    memory = Memory([((0, 2), 100)], [1, 2, 3], [0, 0, 0], [0, 0, 0], to_the_end, shared=[((0, 2), 40)])
    assert memory.breakdown(0, 3, 0, 1) == {
        "weights": 100,
        "activations": 3,
        "received": 0,
        "sent": 0,
        "transient": 0,
        "exchange": 2 * 40 - 3,
    }
    assert "exchange" not in memory.breakdown(0, 1, 0, 3)


def test_each_stage_has_its_own_limit():
    memory = Memory([], [1, 1, 1], [0] * 3, [0] * 3, lambda stage, num_stages: 1, limits=[1, 2])
    assert memory.feasible(0, 2)[0].tolist() == [False, True, False, False]
    assert memory.feasible(1, 2)[0].tolist() == [False, True, True, False]
    assert merge([1, 1, 1], [0] * 3, [True] * 3, 2, feasible=memory.feasible) == [1]
    with pytest.raises(ConfigurationError, match=r"limits for 2 stage\(s\), but 3 stage\(s\)"):
        memory.limit(0, 3)


def test_smaller_micro_batches_keep_less():
    memory = Memory([((0,), 100)], [8, 8], [0, 4], [2, 2], to_the_end).scaled(0.5)
    assert memory.breakdown(0, 2, 0, 1) == {
        "weights": 100,
        "activations": 8.0,
        "received": 0,
        "sent": 4.0,
        "transient": 1.0,
    }


def test_without_limits_everything_fits():
    memory = Memory([((0, 1), 1e30)], [1, 1], [1, 1], [1, 1], to_the_end)
    assert np.array_equal(memory.feasible(0, 1), np.triu(np.ones((3, 3), bool), k=1))
    assert not memory.limited
    assert replace(memory, limits=[float("inf"), 5]).limited


def test_bad_input_is_quoted():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        Memory([], [1, 1], [0], [1, 1], to_the_end)
    with pytest.raises(ValueError, match=r"parameters\[0\] takes inf bytes"):
        Memory([((0,), float("inf"))], [1], [0], [1], to_the_end)
    with pytest.raises(ValueError, match=r"kept\[1\] takes -1 bytes"):
        Memory([], [1, -1], [0, 0], [1, 1], to_the_end)
    with pytest.raises(ConfigurationError, match="a device of 0 bytes"):
        Memory([], [1], [0], [1], to_the_end, limits=[8, 0])
