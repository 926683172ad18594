"""Ranks that are ahead of others, or behind them, change no number, and nobody waits for ever."""

from typing import Any

import pytest
from cases import CASES
from compare import compare
from harness import train_delayed, train_single
from pool import Pool

FIRST_BATCH = {
    # stage 1 has asked for what it needs of micro-batch 0 before stage 0 begins with the next, so that its list is
    # there for the new size of micro-batch; and stage 1 asks for that list when stage 0 is two micro-batches ahead
    (0, 1): 0.4,
    (1, 1): 0.8,
}


@pytest.mark.parametrize("delays", [FIRST_BATCH, 1, 2, 3], ids=["first batch", "1", "2", "3"])
@pytest.mark.parametrize("name", ["mixture of experts", "shapes from values"])
def test_shapes_that_change(pool: Pool, name: str, delays: Any) -> None:
    case = CASES[name]
    arguments = (case.build, case.step, case.batches(), 5)
    results = pool.run(4, train_delayed, delays, *arguments, timeout=40)
    compare(train_single(*arguments), results, 1e-5 if case.rounding(4, 5) else 0.0)
