"""Large tensors that only odd places hold on to reach later stages; what nothing holds on to is let go."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool, WorkerError
from torch import Tensor, nn

WIDTH = 64  # a micro-batch of 96 samples: 24 KiB a tensor, which is not kept for being small


class Reaching(nn.Module):
    """Every way to come back to a tensor that was made layers ago."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.note: Any = None

    def skips(self, x: Tensor) -> Iterator[Tensor]:
        wide = torch.cat([x, x.sin()], dim=1)
        yield x * 2
        yield wide.cos()[:, :WIDTH]
        yield wide[:, WIDTH:]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x).tanh()
        generator = self.skips(x)
        first = x * next(generator)
        later = lambda value: value + first.exp() * 0.01  # noqa: E731
        self.note = {"a": [x * 3]}
        x = self.layers[1](x + next(generator))
        rows = x.view(-1, 2, WIDTH).transpose(0, 1)  # views of what has no name any more
        x = self.layers[2](x * 1.5) + self.layers[3](x * 0.5)
        try:
            self.stop(x)
        except LookupError as error:
            caught = error
        total = torch.zeros(len(x), WIDTH)
        total[:, ::2] = x[:, ::2] * 2  # the product is gone at once
        if float((x * 0.1).detach().abs().sum()) > 0:
            x = self.layers[4](x)
        x = later(x) + caught.args[0] + self.note["a"][0] + total + rows.transpose(0, 1).reshape(x.shape)
        return self.layers[5](x + next(generator))

    def stop(self, x: Tensor) -> None:
        raise LookupError(x.square())


def step(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def batches() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(192, WIDTH) for _ in range(3)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("partition", "placement"),
    [
        (["layers.2"], [1, 0]),
        (["layers.1", "layers.2", "layers.5"], [3, 2, 1, 0]),
        (["layers.1", "layers.3", "layers.4", "layers.5"], [1, 0, 1, 0, 1]),
    ],
)
def test_what_the_step_can_reach_is_there(pool: Pool, partition: list[str], placement: list[int]) -> None:
    expected = train_single(Reaching, step, batches(), 2, sgd)
    arguments = (Reaching, step, batches(), 2, "1f1b", partition, sgd, placement)
    # many tensors that are made from one go to later stages: their gradients come together in another order
    compare(expected, pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=40), 1e-5)


class Peeping(nn.Module):
    """One rank copies a large tensor, which the code of the others has no more use for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        large = torch.cat([x, x]).detach()
        if os.environ.get("RANK") == "0":
            copy.deepcopy(large)
        del large
        return self.layers[1](x)


def test_what_it_cannot_is_let_go_and_said(pool: Pool) -> None:
    arguments = (Peeping, step, batches(), 2, "1f1b", ["layers.1"], sgd)
    with pytest.raises(WorkerError, match="was let go by stage 0, where the step does not refer to it any more"):
        pool.run(2, train_pipelined, *arguments, timeout=40)
