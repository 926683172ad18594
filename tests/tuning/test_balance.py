"""Cuts of stages that share ranks."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from tuning.steps import look

from lightning_lwpm.pipeline.schedule import build, place
from lightning_lwpm.pipeline.simulate import simulate
from lightning_lwpm.tuning.balance import balanced


def makespan(forward: list[float], cuts: list[int], ranks: list[int], count: int) -> float:
    edges = [0, *cuts, len(forward)]
    stages = [sum(forward[begin:end]) for begin, end in pairwise(edges)]
    table = build("interleaved_1f1b", len(ranks), count, max(ranks) + 1, ranks)
    return simulate(table, ranks, lambda a: stages[a.stage] * (1 if a.kind == "F" else 2)).makespan


def moved(forward: list[float], cuts: list[int], ranks: list[int], count: int) -> list[int]:
    seen = look(1, forward)
    table = build("interleaved_1f1b", len(ranks), count, max(ranks) + 1, ranks)
    return balanced(seen.timeline, seen.costs, cuts, table, ranks)


def test_ranks_are_evened_out_not_stages() -> None:
    """Ten layers over four stages on two ranks: 2 + 3 and 3 + 2 is even for ranks, 1 + 3 and 3 + 3 is not."""
    ranks = place(4, 2)
    found = moved([1.0] * 10, [1, 4, 7], ranks, 4)
    sizes = [end - begin for begin, end in pairwise([0, *found, 10])]
    assert sizes[0] + sizes[2] == sizes[1] + sizes[3] == 5


@given(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=6, max_size=14), st.integers(1, 6))
def test_never_worse(forward: list[float], count: int) -> None:
    ranks = place(4, 2)
    cuts = [1, 2, 3]
    found = moved(forward, cuts, ranks, count)
    assert sorted(set(found)) == found and len(found) == 3 and found[0] > 0 and found[-1] < len(forward)
    assert makespan(forward, found, ranks, count) <= makespan(forward, cuts, ranks, count)
