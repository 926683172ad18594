"""Models drawn at random give the bits of one device, whatever is written between their layers."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool
from programs import WIDTH, Program
from torch import nn

PLACEMENTS: list[list[int] | None] = [None, None, [1, 0, 1, 0], [0, 1, 1, 0]]


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9)


@pytest.mark.parametrize("seed", range(40))
def test_equals_one_device(pool: Pool, seed: int) -> None:
    draw = random.Random(seed)
    placement = draw.choice(PLACEMENTS)
    world, count = 2 if placement else draw.choice([2, 3, 4]), draw.choice([1, 2, 3, 4])
    schedule, mode = draw.choice(["1f1b", "1f1b", "zb1p"]), draw.choice(["none", "none", "layer", "stage"])
    generator = torch.Generator().manual_seed(seed)
    batches = [tuple(torch.randn(2, size, WIDTH, generator=generator)) for size in (12, 12, 9)]
    build = partial(Program, seed)
    expected = train_single(build, step, batches, count, sgd)
    assert torch.tensor(expected["losses"][:2]).isfinite().all(), "else it shows nothing"
    arguments = (build, step, batches, count, schedule, "auto", sgd, placement, mode)
    results = pool.run(world, train_pipelined, *arguments, timeout=40)
    uses = results[0]["layout"].parameters["scale"]
    compare(expected, results, 1e-5 if len(uses) > 1 else 0.0)  # what stages share is summed in another order
