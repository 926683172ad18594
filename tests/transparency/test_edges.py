"""Fewer layers than ranks, what cannot be cut, and what is said about it."""

import pytest
import torch
from cases import classify, pairs
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH, Residual
from pool import Pool, WorkerError
from torch import Tensor, nn


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_surplus_ranks_stay_empty(pool: Pool) -> None:
    results = pool.run(4, train_pipelined, Two, classify, pairs(), 4, timeout=40)
    assert [result["stage"] for result in results] == [1, 0, None, None]
    assert not results[2]["weights"]
    compare(train_single(Two, classify, pairs(), 4), results)


class Penalised(Residual):
    """Wants gradients within the step."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        out = super().forward(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out + slope.square().mean()


def test_gradients_within_the_step(pool: Pool) -> None:
    results = pool.run(2, train_pipelined, Penalised, classify, pairs(), 2, timeout=40)
    assert [result["stage"] for result in results] == [0, None]
    compare(train_single(Penalised, classify, pairs(), 2), results)


class Backward(Residual):
    """Lets gradients be left in ``.grad``."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        out.sum().backward(retain_graph=True)
        return out


def test_backward_passes_within_the_step_are_refused(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="`backward` inside a step that is cut into"):
        pool.run(2, train_pipelined, Backward, classify, pairs(), 2, timeout=40)
