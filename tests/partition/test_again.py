"""Layers that are called again later get another stage on the same rank."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lightning_lwpm.partition.again import again
from lightning_lwpm.partition.timeline import LayerCall, Timeline


def timeline(words: str, allowed: list[bool] | None = None) -> Timeline:
    """A step of calls such as ``"a b a c"``."""
    names = words.split()
    calls = [LayerCall(name, names[:i].count(name), 1.0, 0.0, 4, 1) for i, name in enumerate(names)]
    return Timeline(tuple(calls), (0,) * len(calls), tuple(allowed or [True] * len(calls)))


def uses(line: Timeline, without: str = "") -> list[list[int]]:
    names = [call.name for call in line.calls]
    return [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names) if name not in without]


def found(words: str, num_ranks: int = 2, without: str = "", allowed: list[bool] | None = None):
    line = timeline(words, allowed)
    return again(line, [1.0] * len(line.calls), uses(line, without), num_ranks)


def test_a_tower_called_twice() -> None:
    assert found("a b c d a b c d h") == ([2, 4, 6], [1, 0, 1, 0])
    assert found("a b a b c", 3) == ([1, 2, 3, 4], [2, 1, 2, 1, 0])


def test_a_rank_that_comes_to_its_turn_late() -> None:
    """Ranks count from the end: the last stage is on rank 0."""
    assert found("a b c a") == ([1, 3], [0, 1, 0])


def test_nothing_is_called_again_elsewhere() -> None:
    assert found("a b c d") is None
    assert found("a a a b b b") is None
    assert found("a b c d", 1) is None


def test_what_has_no_weights_goes_with_the_call_before() -> None:
    assert found("a r b r a r b r", without="r") == ([2, 4, 6], [1, 0, 1, 0])
    assert found("a r b r", without="r") is None


def test_no_stage_begins_where_none_may() -> None:
    assert found("a b a b", allowed=[True, True, False, True]) is None


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=20), st.integers(1, 4))
def test_every_layer_is_on_one_rank(names: list[str], num_ranks: int) -> None:
    result = found(" ".join(names), num_ranks)
    if result is None:
        return
    cuts, ranks = result
    assert len(ranks) == len(cuts) + 1 and ranks[-1] == 0
    assert all(left != right for left, right in pairwise(ranks))
    homes: dict[str, set[int]] = {}
    for position, name in enumerate(names):
        homes.setdefault(name, set()).add(ranks[sum(cut <= position for cut in cuts)])
    assert all(len(home) == 1 for home in homes.values())
    assert set(ranks) == set(range(len(set(ranks))))
