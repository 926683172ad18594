"""Layers that are called again later: another stage on the same rank, so that their weights are held once.

::

    timeline    left.0  left.1 | left.0@1 left.1@1 | head         two ranks, a tower that is called twice
    merged as   left.0  left.1                       head         each layer once, with the work of all its calls
    rank          1       0        1        0         0
    stages        0   |   1    |   2    |   3                     a stage ends where the rank changes
"""

from collections.abc import Iterable, Sequence

from lightning_lwpm.partition.merge import merge
from lightning_lwpm.partition.timeline import Timeline

__all__ = ["again"]

_MOST_STAGES = 4  # a rank: with more, tensors travel more than they are worked on


def again(
    timeline: Timeline, work: Sequence[float], uses: Iterable[Sequence[int]], num_ranks: int
) -> tuple[list[int], list[int]] | None:
    """Partition so that every call of a layer with weights is on one rank.

    A layer without weights goes with the call before it.

    Args:
        timeline: The layer calls of a step.
        work: Seconds of each.
        uses: For each parameter the positions of the calls that use it.
        num_ranks: Number of ranks.

    Returns:
        The positions at which stages 1, 2, ... begin, and the rank of each stage; the last one is on rank 0. ``None``
        if no layer is called again in another stage, or a stage cannot begin where one would have to.
    """
    homes = _homes(timeline, uses)
    first = sorted(set(homes))
    index = {home: i for i, home in enumerate(first)}
    sums = [0.0] * len(first)
    for home, seconds in zip(homes, work, strict=True):
        sums[index[home]] += seconds
    groups = merge(sums, [0.0] * len(first), [timeline.allowed[position] for position in first], num_ranks)
    group_of = [sum(cut <= index[home] for cut in groups) for home in homes]
    cuts = [position for position in range(1, len(homes)) if group_of[position] != group_of[position - 1]]
    if len(cuts) == len(groups) or len(cuts) >= _MOST_STAGES * num_ranks:
        return None
    if not all(timeline.allowed[cut] for cut in cuts):
        return None
    # ranks count from the end, as they do elsewhere
    last = list(dict.fromkeys(reversed(group_of)))
    return cuts, [last.index(group_of[begin]) for begin in [0, *cuts]]


def _homes(timeline: Timeline, uses: Iterable[Sequence[int]]) -> list[int]:
    """For each call, the position of the first call with which it has to be."""
    weighty = {timeline.calls[position].name for positions in uses for position in positions}
    homes: list[int] = []
    firsts: dict[str, int] = {}
    for position, call in enumerate(timeline.calls):
        if call.name in weighty:
            homes.append(firsts.setdefault(call.name, position))
        else:
            homes.append(homes[-1] if homes else 0)
    return homes
