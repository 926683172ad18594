"""Merging finds the exact optimum."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.merge import NothingFits, merge


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


@st.composite
def limited_instances(draw):
    """An instance in which each stage takes calls of a limited weight, and the weights of calls differ by stage."""
    work, boundary, allowed, num_stages = draw(instances())
    weights = draw(st.lists(st.integers(0, 4), min_size=len(work), max_size=len(work)))
    limits = draw(st.lists(st.integers(2, 20), min_size=num_stages, max_size=num_stages))
    return (work, boundary, allowed, num_stages), weights, limits


def limited(weights, limits, slack=0):
    prefix = np.concatenate([[0], np.cumsum(weights)])

    def feasible(stage, num_stages):
        assert stage < num_stages
        return (prefix[None, :] - prefix[:, None]) * (num_stages - stage) <= limits[stage] + slack

    return feasible


def step_time(work, boundary, cuts, microbatches):
    """The time of a step, and the slowest stage, which breaks a tie."""
    maximum, total = objective(work, boundary, cuts)
    return (microbatches - 1) * maximum + sum(work) + 2 * total, maximum


def fitting(instance, feasible):
    """All partitions that fit."""
    work, _, allowed, num_stages = instance
    options = [i for i in range(1, len(work)) if allowed[i]]
    num_stages = min(num_stages, len(options) + 1)
    for cuts in combinations(options, num_stages - 1):
        if all(feasible(s, num_stages)[i, j] for s, (i, j) in enumerate(pairwise([0, *cuts, len(work)]))):
            yield list(cuts)


@given(instances(), st.integers(1, 40), st.sampled_from([1, 0.1]))
def test_the_time_of_a_step_equals_brute_force(instance, microbatches, unit):
    work, boundary, allowed, num_stages = instance
    cuts = merge([unit * t for t in work], [unit * t for t in boundary], allowed, num_stages, microbatches)
    everything = fitting(instance, limited([0] * len(work), [0] * num_stages))
    assert step_time(work, boundary, cuts, microbatches) == min(
        step_time(work, boundary, other, microbatches) for other in everything
    )


@given(limited_instances(), st.none() | st.integers(1, 40), st.sampled_from([1, 0.1]))
def test_equals_brute_force_within_limits(limited_instance, microbatches, unit):
    instance, weights, limits = limited_instance
    work, boundary, allowed, num_stages = instance
    feasible = limited(weights, limits)
    arguments = [unit * t for t in work], [unit * t for t in boundary], allowed, num_stages, microbatches, feasible
    options = list(fitting(instance, feasible))
    if not options:
        with pytest.raises(NothingFits, match=r"no partition of \d layer calls fits"):
            merge(*arguments)
        return
    cuts = merge(*arguments)
    assert cuts in options
    if microbatches is None:
        assert objective(work, boundary, cuts) == min(objective(work, boundary, other) for other in options)
    else:
        times = [step_time(work, boundary, other, microbatches) for other in options]
        assert step_time(work, boundary, cuts, microbatches) == min(times)


@given(limited_instances(), st.integers(1, 40), st.integers(1, 20))
def test_more_memory_never_gives_a_slower_plan(limited_instance, microbatches, more):
    (work, boundary, allowed, num_stages), weights, limits = limited_instance
    times = []
    for slack in (0, more):
        try:
            cuts = merge(work, boundary, allowed, num_stages, microbatches, limited(weights, limits, slack))
        except NothingFits:
            times.append(float("inf"))
        else:
            times.append(step_time(work, boundary, cuts, microbatches)[0])
    assert times[1] <= times[0]


@given(instances(), st.integers(1, 40))
def test_more_micro_batches_weigh_the_slowest_stage_more(instance, microbatches):
    """More micro-batches shift the weight to the slowest stage: it never gets slower, the boundaries never cheaper."""
    work, boundary, allowed, num_stages = instance
    few, more, many = (
        objective(work, boundary, merge(work, boundary, allowed, num_stages, m))
        for m in (microbatches, microbatches + 5, None)
    )
    assert few[0] >= more[0] >= many[0]
    assert few[1] <= more[1] <= many[1]


@given(instances(), st.integers(1, 40))
def test_without_boundaries_more_stages_are_never_slower(instance, microbatches):
    work, _, allowed, num_stages = instance
    free = [0] * len(work)
    times = [
        step_time(work, free, merge(work, free, allowed, stages, microbatches), microbatches)[0]
        for stages in range(1, num_stages + 1)
    ]
    assert times == sorted(times, reverse=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 12))
def test_real_times_equal_brute_force(seed, num_stages, microbatches):
    random = np.random.default_rng(seed)
    work, boundary = random.random(16).tolist(), (2 * random.random(16)).tolist()
    feasible = limited(random.random(16), random.random(num_stages) * 20 + 5)
    options = list(fitting((work, boundary, [True] * 16, num_stages), feasible))
    if options:
        cuts = merge(work, boundary, [True] * 16, num_stages, microbatches, feasible)
        best = min(step_time(work, boundary, other, microbatches)[0] for other in options)
        assert cuts in options
        assert step_time(work, boundary, cuts, microbatches)[0] == pytest.approx(best, rel=1e-8)


def test_few_micro_batches_prefer_cheap_boundaries():
    # cut at 1: stages of 4 + 1 and 4 + 1, T = 5 (m - 1) + 10; cut at 2: of 6 and 2, T = 6 (m - 1) + 8
    work, boundary, allowed = [4, 2, 2], [0, 1, 0], [True] * 3
    assert merge(work, boundary, allowed, 2, microbatches=2) == [2]
    assert merge(work, boundary, allowed, 2, microbatches=3) == [1]  # both take 20: the least maximum wins
    assert merge(work, boundary, allowed, 2, microbatches=4) == [1]


def test_one_stage_has_to_fit_too():
    assert merge([1, 1], [0, 0], [True] * 2, 1, feasible=limited([1, 1], [2])) == []
    with pytest.raises(NothingFits, match="num_stages=1"):
        merge([1, 1], [0, 0], [True] * 2, 1, feasible=limited([1, 1], [1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0], [True], 0), "num_stages=0"),
        (([1], [0], [True], 1, 0), "microbatches=0: at least one micro-batch"),
        (([1, 2], [0], [True, True], 2), "got 2, 1 and 2"),
        (([1, -2.5], [0, 0], [True, True], 2), r"work\[1\]=-2.5"),
        (([1, 2], [0, float("nan")], [True, True], 2), r"boundary_seconds\[1\]=nan"),
    ],
)
def test_bad_input_is_quoted(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        merge(*arguments)
