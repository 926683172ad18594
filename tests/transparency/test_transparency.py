"""The promise: over any number of stages, what one device computes from the same micro-batches, to the last bit."""

from typing import Any

import pytest
import torch
from cases import CASES, Case
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool

SETTINGS = [
    # stages, micro-batches, schedule
    (1, 3, "gpipe"),
    (2, 1, "1f1b"),
    (2, 4, "gpipe"),
    (3, 3, "1f1b"),
    (4, 8, "1f1b"),
    (4, 4, "gpipe"),
]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def check(pool: Pool, case: Case, stages: int, count: int, schedule: str) -> None:
    """Train both ways and compare."""
    optimizer = adamw if (stages + count) % 2 else sgd
    expected = train_single(case.build, case.step, case.batches(), count, optimizer)
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), count, schedule, partition, optimizer)
    results = pool.run(stages, train_pipelined, *arguments, timeout=40)
    compare(expected, results, 1e-5 if case.rounding(stages, count) else 0.0)


@pytest.mark.parametrize(("stages", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(pool: Pool, name: str, stages: int, count: int, schedule: str) -> None:
    check(pool, CASES[name], stages, count, schedule)
