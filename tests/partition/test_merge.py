"""Merging finds the exact optimum."""

import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.merge import merge


def objective(work, boundary, cuts):
    """The slowest stage, and the sum of the boundaries that breaks a tie."""
    cost = {0: 0, len(work): 0} | {cut: boundary[cut] for cut in cuts}
    stages = pairwise([0, *cuts, len(work)])
    return max(sum(work[i:j]) + cost[i] + cost[j] for i, j in stages), sum(cost.values())


def brute_force(work, boundary, allowed, num_stages):
    places = [i for i in range(1, len(work)) if allowed[i]]
    num_cuts = min(num_stages - 1, len(places))
    return min(objective(work, boundary, cuts) for cuts in combinations(places, num_cuts))


@st.composite
def instances(draw):
    n = draw(st.integers(1, 9))
    times = st.lists(st.integers(0, 6), min_size=n, max_size=n)
    return (
        draw(times),
        draw(times),
        draw(st.lists(st.booleans(), min_size=n, max_size=n)),
        draw(st.integers(1, 6)),
    )


@given(instances(), st.sampled_from([1, 0.1]))
def test_equals_brute_force(instance, unit):
    work, boundary, allowed, num_stages = instance
    # in tenths, equal stages differ by rounding (0.1 + 0.2 > 0.3), which must not decide a tie
    cuts = merge([unit * seconds for seconds in work], [unit * seconds for seconds in boundary], allowed, num_stages)
    places = [i for i in range(1, len(work)) if allowed[i]]
    assert len(cuts) == min(num_stages - 1, len(places))
    assert cuts == sorted(set(cuts)) and set(cuts) <= set(places)
    assert objective(work, boundary, cuts) == brute_force(*instance)


def test_balances_work():
    assert merge([3, 1, 1, 5, 2, 2], [0] * 6, [True] * 6, 3) == [3, 4]


def test_avoids_an_expensive_boundary():
    assert merge([1, 1, 1, 1], [0, 0, 5, 0], [True] * 4, 2) in ([1], [3])


def test_a_tie_goes_to_the_cheaper_boundaries():
    # the last stage (10) decides the maximum, so the first cut may go wherever it is cheapest
    assert merge([1, 1, 1, 1, 10], [0, 3, 1, 2, 0], [True] * 5, 3) == [2, 4]


def test_a_prefix_with_the_worse_maximum_may_win():
    # alone, calls 0-2 are best cut at 1 (5 against 6), but the cheaper cut at 2 wins: the last stage takes 9 anyway.
    assert merge([3, 3, 1, 9], [0, 1, 0, 0], [True] * 4, 3) == [2, 3]


def test_rounding_does_not_decide_a_tie():
    # either cut makes a stage of 0.5, but in floating point the free one comes out slower by the last bit
    assert merge([0.1, 0.3, 0.2], [0, 0, 0.1], [True] * 3, 2) == [1]


def test_too_few_places_give_fewer_stages():
    assert merge([1, 1, 1], [0, 0, 0], [True, False, True], 8) == [2]
    assert merge([1, 1, 1], [0, 0, 0], [True, False, False], 8) == []
    assert merge([], [], [], 2) == []


def test_a_thousand_calls_and_64_stages_are_fast():
    n = 1000
    work = [1 + (i * 7919 % 13) / 13 for i in range(n)]
    boundary = [0.1 + (i * 104729 % 7) / 70 for i in range(n)]
    begin = time.process_time()
    assert len(merge(work, boundary, [True] * n, 64)) == 63
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0], [True], 0), "num_stages=0"),
        (([1, 2], [0], [True, True], 2), "got 2, 1 and 2"),
        (([1, -2.5], [0, 0], [True, True], 2), r"work\[1\]=-2.5"),
        (([1, 2], [0, float("nan")], [True, True], 2), r"boundary_seconds\[1\]=nan"),
    ],
)
def test_bad_input_is_quoted(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        merge(*arguments)
