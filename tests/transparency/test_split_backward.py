"""The promise where weight gradients are deferred: the difficulties that concern them, and models of `transformers`."""

import pytest
from cases import CASES
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool
from test_transformers import MODELS, SHARED, SHARED_OFTEN, step
from test_transparency import adamw, sgd

SETTINGS = [([2, 1, 0], 4, "zb1p"), ([0, 1, 1, 0], 3, "zbv")]

DIFFICULT = [
    "long skip",
    "tied weights",
    "siamese",
    "recurrence",
    "batch norm, channels last",
    "frozen between",
    "requires_grad toggled",
    "in place, inputs of units",
    "cross attention",
    "mixture of experts",
    "checkpointed",
    "function of the user's own",
    "hooks on gradients",
    "recurrent layers",
    "transformer layers",
    "unused parameters",
    "stopped gradient",
    "last batch smaller",
]


@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", DIFFICULT)
def test_equals_one_device(pool: Pool, name: str, placement: list[int], count: int, schedule: str) -> None:
    case, stages = CASES[name], len(placement)
    optimizer = adamw if count % 2 else sgd
    expected = train_single(case.build, case.step, case.batches(), count, optimizer)
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), count, schedule, partition, optimizer, placement)
    results = pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=40)
    compare(expected, results, 1e-5 if case.rounding(stages, count) else 0.0)


@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", ["gpt2, tied", "gpt2, untied", "llama, padded", "t5", "resnet"])
def test_transformers(pool: Pool, name: str, placement: list[int], count: int, schedule: str) -> None:
    make, batches, inexact = MODELS[name]
    expected = train_single(make, step, batches(), count, sgd)
    arguments = (make, step, batches(), count, schedule, "auto", sgd, placement)
    results = pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=80)
    compare(expected, results, 1e-5 if inexact in (SHARED, SHARED_OFTEN) else 0.0)
