"""Activations that are computed again: the same numbers, and side effects once."""

from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, Case, pairs
from compare import compare
from harness import train_pipelined, train_single
from models import Residual
from pool import Pool, WorkerError
from test_transparency import adamw, sgd
from torch import nn

from lightning_lwpm.staging.recompute import layers_of

SETTINGS = [
    # the rank of each stage, micro-batches, schedule
    ([1, 0], 4, "gpipe"),
    ([2, 1, 0], 3, "1f1b"),
    ([0, 1, 1, 0], 4, "zbv"),
]

DIFFICULT = [
    "residual",
    "batch norm",
    "structures",
    "long skip",
    "tied weights",
    "in place",
    "mixture of experts",
    "checkpointed",
    "late inputs",
    "siamese",
    "hooks on gradients",
]


def check(pool: Pool, case: Case, placement: list[int], count: int, schedule: str, mode: str) -> None:
    stages = len(placement)
    optimizer = adamw if count % 2 else sgd
    expected = train_single(case.build, case.step, case.batches(), count, optimizer)
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), count, schedule, partition, optimizer, placement, mode)
    results = pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=40)
    compare(expected, results, 1e-5 if case.rounding(stages, count) else 0.0)


@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
@pytest.mark.parametrize("mode", ["layer", "stage"])
@pytest.mark.parametrize("name", DIFFICULT)
def test_equals_one_device(pool: Pool, name: str, mode: str, placement: list[int], count: int, schedule: str) -> None:
    check(pool, CASES[name], placement, count, schedule, mode)


@pytest.mark.parametrize("mode", ["layer", "stage"])
def test_what_was_changed_in_place_cannot_be_computed_again(pool: Pool, mode: str) -> None:
    with pytest.raises(WorkerError, match=r"was changed in place.*write `x = x \+ y`"):
        check(pool, CASES["in place, inputs of units"], [1, 0], 4, "gpipe", mode)


def centred(model: nn.Module, batch: Any) -> torch.Tensor:
    """Changes the batch itself."""
    x, y = batch
    x -= x.mean() * 0.5
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("mode", ["layer", "stage"])
def test_a_batch_that_is_changed_in_place_is_changed_once(pool: Pool, mode: str) -> None:
    expected = train_single(Residual, centred, pairs(), 4)
    run = partial(train_pipelined, checkpointing=mode)
    compare(expected, pool.run(2, run, Residual, centred, pairs(), 4, "gpipe"))


class Teacher(nn.Module):
    """What an earlier stage has made is used without gradients first, and with them later."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x).tanh()
        with torch.no_grad():
            aim = self.layers[1](x)
        x = self.layers[2](x + aim).tanh()
        return (self.layers[3](x) - aim).square().mean()


def direct(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("mode", ["none", "layer", "stage"])
def test_the_first_use_may_be_without_gradients(pool: Pool, mode: str) -> None:
    batches = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = train_single(Teacher, direct, batches, 2, sgd)
    arguments = (Teacher, direct, batches, 2, "1f1b", ["layers.1", "layers.3"], sgd, None, mode)
    compare(expected, pool.run(3, train_pipelined, *arguments, timeout=40))


class Blocks(nn.Module):
    """Dropout, BatchNorm and a counter in each of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.calls, self.seen = 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return x + self.dropout(self.norm(self.linear(x))) * self.calls


def blocks(rank: int, world: int, mode: str) -> dict[str, Any]:
    """What training leaves behind; every process draws from the same generators in every mode."""
    counts: dict[str, Any] = {}

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        counts.update({name: (block.calls, list(block.seen)) for name, block in model.blocks.named_children()})
        return model(x).square().mean()

    batches = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found = train_pipelined(rank, world, Blocks, step, batches, 4, "gpipe", "auto", sgd, [1, 0], mode)
    return {key: found[key] for key in ("losses", "gradients", "buffers")} | {"counts": counts}


@pytest.mark.parametrize("mode", ["layer", "stage"])
def test_random_numbers_and_side_effects_come_once(pool: Pool, mode: str) -> None:
    expected, found = (pool.run(2, blocks, each) for each in ("none", mode))
    for before, after in zip(expected, found, strict=True):
        assert before["losses"] == after["losses"] and before["counts"] == after["counts"]
        for kind in ("gradients", "buffers"):
            for one, other in zip(
                *([each[kind]] if isinstance(each[kind], dict) else each[kind] for each in (before, after)), strict=True
            ):
                assert all(torch.equal(one[name], other[name]) for name in one), kind


def test_blocks_are_worth_computing_again_and_single_layers_are_not() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Blocks(), nn.ReLU())
    assert layers_of(model) == [model[1], model[2]]
    assert layers_of(model, ["2.blocks.0", "2.blocks.1", "0", "3"]) == list(model[2].blocks[:2])
    assert layers_of(nn.Linear(2, 2)) == []
