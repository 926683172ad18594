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
from lightning_lwpm.partition.timeline import Flow


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
    flows = draw(st.lists(some_flows(n), max_size=5)) if n > 1 else []
    return Memory(parameters, draw(numbers), draw(numbers), to_the_end, flows, limit, shared)


def some_flows(n):
    """Tensors that are used after the call that makes them."""
    positions = st.lists(st.integers(0, n - 1), min_size=2, unique=True).map(sorted)
    return st.tuples(positions, st.integers(0, 9)).map(lambda drawn: Flow(drawn[0][0], tuple(drawn[0][1:]), drawn[1]))


def chain(*nbytes):
    """Each call hands so much to the next."""
    return [Flow(position, (position + 1,), amount) for position, amount in enumerate(nbytes)]


def by_hand(memory, stage, num_stages, begin, end):
    flying = num_stages - stage
    inside = set(range(begin, end))
    weights = sum(nbytes for where, nbytes in memory.parameters if set(where) & inside)
    working = flying * sum(memory.kept[begin:end]) + max(memory.transient[begin:end])
    for flow in memory.flows:
        received = flow.born < begin and set(flow.uses) & inside
        sent = flow.born in inside and max(flow.uses) >= end
        working += flying * flow.nbytes if received or sent else 0
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
    memory = Memory([((0, 2), 100), ((1,), 1)], [0] * 3, [0] * 3, to_the_end)
    whole, first, middle, last = ((0, 3), (0, 1), (1, 2), (2, 3))
    assert [memory.breakdown(0, 1, *span)["weights"] for span in (whole, first, middle, last)] == [101, 100, 1, 100]
    assert [memory.need(0, 1)[span] for span in (whole, first, middle, last)] == [101, 100, 1, 100]


def test_breakdown_names_the_parts():
    memory = Memory([((1,), 1000)], [1, 2, 3], [7, 5, 6], to_the_end, chain(10, 20))
    assert memory.breakdown(1, 3, 1, 2) == {
        "weights": 1000,
        "activations": 2 * 2,
        "received": 2 * 10,
        "sent": 2 * 20,
        "transient": 5,
    }


def test_shared_gradients_are_exchanged_when_the_rest_is_done():
    memory = Memory([((0, 2), 100)], [1, 2, 3], [0, 0, 0], to_the_end, shared=[((0, 2), 40)])
    assert memory.breakdown(0, 3, 0, 1) == {
        "weights": 100,
        "activations": 3,
        "received": 0,
        "sent": 0,
        "transient": 0,
        "exchange": 2 * 40 - 3,
    }
    assert "exchange" not in memory.breakdown(0, 1, 0, 3)


def test_stages_below_a_long_skip_hold_no_copy_of_it():
    memory = Memory([], [0] * 4, [0] * 4, lambda stage, num_stages: 1, [Flow(0, (3,), 100)])
    parts = [memory.breakdown(0, 4, position, position + 1) for position in range(4)]
    assert [part["sent"] for part in parts] == [100, 0, 0, 0]
    assert [part["received"] for part in parts] == [0, 0, 0, 100]


def test_each_stage_has_its_own_limit():
    memory = Memory([], [1, 1, 1], [0] * 3, lambda stage, num_stages: 1, limits=[1, 2])
    assert memory.feasible(0, 2)[0].tolist() == [False, True, False, False]
    assert memory.feasible(1, 2)[0].tolist() == [False, True, True, False]
    assert merge([1, 1, 1], [0] * 3, [True] * 3, 2, feasible=memory.feasible) == [1]
    with pytest.raises(ConfigurationError, match=r"limits for 2 stage\(s\), but 3 stage\(s\)"):
        memory.limit(0, 3)


def test_smaller_micro_batches_keep_less():
    memory = Memory([((0,), 100)], [8, 8], [2, 2], to_the_end, chain(4)).scaled(0.5)
    assert memory.breakdown(0, 2, 0, 1) == {
        "weights": 100,
        "activations": 8.0,
        "received": 0,
        "sent": 4.0,
        "transient": 1.0,
    }


def test_without_limits_everything_fits():
    memory = Memory([((0, 1), 1e30)], [1, 1], [1, 1], to_the_end, chain(1))
    assert np.array_equal(memory.feasible(0, 1), np.triu(np.ones((3, 3), bool), k=1))
    assert not memory.limited
    assert replace(memory, limits=[float("inf"), 5]).limited


def test_bad_input_is_quoted():
    with pytest.raises(ValueError, match="got 2 and 1"):
        Memory([], [1, 1], [0], to_the_end)
    with pytest.raises(ValueError, match=r"parameters\[0\] takes inf bytes"):
        Memory([((0,), float("inf"))], [1], [1], to_the_end)
    with pytest.raises(ValueError, match=r"kept\[1\] takes -1 bytes"):
        Memory([], [1, -1], [1, 1], to_the_end)
    with pytest.raises(ConfigurationError, match="a device of 0 bytes"):
        Memory([], [1], [1], to_the_end, limits=[8, 0])
