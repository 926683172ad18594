"""``auto`` is never worse than a schedule that has a name, and keeps to the memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.schedule import POLICIES, Memory, build, place, unit
from lightning_lwpm.pipeline.simulate import bound, kept_by_ranks, rendezvous, simulate


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_never_worse_than_a_named_schedule_that_fits(data):
    num_ranks, count = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 8), "micro-batches")
    placement = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=8), "placement")
    weights = data.draw(st.lists(st.sampled_from([1, 2, 5]), min_size=len(placement), max_size=len(placement)))
    times = data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=len(placement), max_size=len(placement)))
    latency = data.draw(st.sampled_from([0.0, 0.25, 2.0]))
    least = [sum(w for w, rank in zip(weights, placement, strict=True) if rank == r) for r in range(num_ranks)]
    memory = Memory(weights, [amount * data.draw(st.sampled_from([1, 1.5, 3, 9]), "limit") for amount in least])

    def costs(action):
        return times[action.stage] * unit(action)

    def made(name):
        return build(name, len(placement), count, num_ranks, placement, costs, latency, memory)

    auto = made("auto")
    assert all(k <= limit for k, limit in zip(kept_by_ranks(auto, weights), memory.limits, strict=True))
    rendezvous(auto, placement)
    makespan = simulate(auto, placement, costs, latency).makespan
    assert makespan >= bound(auto, placement, costs, latency) - 1e-9
    for name in POLICIES:
        try:
            named = made(name)
        except ConfigurationError as error:
            assert "limit" in str(error)
            continue
        assert makespan <= simulate(named, placement, costs, latency).makespan


def test_latency_is_hidden_by_deeper_warm_ups():
    def makespan(name):
        return simulate(build(name, 4, 16, 4, latency=0.5, split=False), place(4), latency=0.5).makespan

    assert makespan("auto") == makespan("gpipe") < makespan("1f1b")
    memory = Memory([1] * 4, [7] * 4)
    table = build("auto", 4, 16, 4, latency=0.5, split=False, memory=memory)
    assert max(kept_by_ranks(table, [1] * 4)) <= 7
    assert simulate(table, place(4), latency=0.5).makespan < makespan("1f1b")


def test_whole_backward_passes_where_they_must_not_be_split():
    assert {a.kind for row in build("auto", 3, 4, 3, split=False) for a in row} == {"F", "B"}
    assert {a.kind for row in build("auto", 3, 4, 3) for a in row} == {"F", "B", "I", "W"}


def test_passes_are_split_only_where_that_pays():
    costs = {"F": 1.0, "B": 2.0, "I": 1.3, "W": 0.8}
    for num_ranks, count in ((2, 8), (4, 8), (4, 16)):
        table = build("auto", num_ranks, count, num_ranks, None, lambda action: costs[action.kind])
        split = {(a.stage, a.microbatch) for row in table for a in row if a.kind == "I"}
        assert split and min(microbatch for _, microbatch in split) >= count // 4


def test_of_equally_long_tables_the_one_that_keeps_least():
    table = build("auto", 3, 8, 3, split=False)
    assert kept_by_ranks(table, [1, 1, 1]) == [1, 2, 3]


def test_what_does_not_fit_says_so():
    tight = Memory([2.0, 2.0], [4.0, 4.0])
    with pytest.raises(ConfigurationError, match=r"'gpipe' keeps up to 16 on rank 0, whose limit is 4; .*'auto'"):
        build("gpipe", 2, 8, 2, memory=tight)
    assert build("1f1b", 2, 8, 2, memory=tight)
    with pytest.raises(ConfigurationError, match="'auto' keeps up to 2 on rank 0, whose limit is 1; use smaller micro"):
        build("auto", 2, 8, 2, memory=Memory([2.0, 2.0], [1.0, 4.0]))
