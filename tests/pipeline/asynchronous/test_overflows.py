"""Which stages skip a step, and when the scale is lowered for all."""

import random
import time
from typing import Any

import pytest
from harness import connect
from pool import Pool

from lightning_lwpm.pipeline.asynchronous.overflows import Overflows

TURNS = 12


def table(world: int) -> list[list[bool]]:
    """By turn and stage: whether gradients overflow."""
    draw = random.Random(world)
    return [[draw.random() < 0.15 for _ in range(world)] for _ in range(TURNS)]


def follow(rank: int, world: int, m: int, drains: tuple[int, ...], seed: int) -> list[tuple[bool, float]]:
    """What a stage does at each step: whether it skips it, and the scale after it."""
    mailbox, _ = connect(rank, world)
    ranks = list(reversed(range(world)))
    stage, made, scale, draw = ranks.index(rank), Overflows(mailbox, ranks, m), 1024.0, random.Random(seed + rank)
    found = []
    for turn, overflows in enumerate(table(world), 1):
        time.sleep(0.01 * rank * draw.random())  # earlier stages come later
        skips = made.skip(overflows[stage], scale, turn in drains)
        if made.lower(turn in drains):
            scale /= 2
        found.append((skips, scale))
        if turn in drains:
            made.begin()
    mailbox.gather("end", None)
    mailbox.close()
    return found


def formula(world: int, m: int, drains: tuple[int, ...]) -> list[tuple[list[bool], float]]:
    """The same for all stages."""
    overflows, scales, counted, found = table(world), [1024.0], set(), []
    since = 0
    for turn in range(1, TURNS + 1):
        now = overflows[turn - 1]
        skips = [any(now) if turn in drains else any(now[stage:]) for stage in range(world)]
        lower = False
        for stage in range(world):
            late = 0 if turn in drains else -(-(world - 1 - stage) // m)
            news = {(stage, t) for t in range(since + 1, turn - late + 1)} - counted
            lower |= any(overflows[t - 1][stage] and scales[t - 1] <= scales[turn - 1] for _, t in news)
            counted |= news
        scales.append(scales[-1] / 2 if lower else scales[-1])
        found.append((skips, scales[-1]))
        if turn in drains:
            since = turn
    return found


@pytest.mark.parametrize(("world", "m", "drains"), [(3, 1, (5,)), (3, 2, ()), (2, 4, (3, 7)), (3, 1, range(1, 13))])
def test_all_stages_lower_the_scale_after_the_same_step(pool: Pool, world: int, m: int, drains: Any) -> None:
    results = pool.run(world, follow, m, tuple(drains), 1, timeout=60)
    expected = formula(world, m, tuple(drains))
    assert expected[-1][1] < 1024
    for rank, found in enumerate(results):
        assert found == [(skips[world - 1 - rank], scale) for skips, scale in expected]
