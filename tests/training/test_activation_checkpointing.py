"""Activation checkpointing as an option: logs, metrics, hooks and weights stay those of one device."""

import pytest
from training.runs import Runs, same
from training.test_fit import fit


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mode", ["layer", "stage"])
def test_fit(runs: Runs, mode: str, world: int) -> None:
    expected = runs.one(fit, 4)
    results = runs.on(world, fit, 4, activation_checkpointing=mode, schedule="gpipe")
    same(expected, results[0], "rank 0")
    for rank, result in enumerate(results[1:], 1):
        for key in ("weights", "metrics", "hooks", "steps", "output"):
            same(expected[key], result[key], f"rank {rank} {key}")
