"""What optimizers keep for each byte of weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lwpm.tuning.optimizer_state import state_factor

WEIGHTS = [nn.Parameter(torch.zeros(8, 8))]


class Averages(Optimizer):
    """Keeps three tensors like the weight, in a structure of its own; needs an argument that is no default."""

    def __init__(self, params: Any, secret: str | None = None) -> None:
        if secret is None:
            raise TypeError("without its secret this optimizer cannot be made")
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD(WEIGHTS, lr=0.1), 0),
        (torch.optim.SGD(WEIGHTS, lr=0.1, momentum=0.9), 1),
        (torch.optim.AdamW(WEIGHTS), 2),
        (torch.optim.AdamW(WEIGHTS, amsgrad=True), 3),
        (torch.optim.AdamW(WEIGHTS, foreach=True), 2),
        (torch.optim.Adafactor(WEIGHTS), 0),  # a row and a column for each matrix
        (torch.optim.RMSprop(WEIGHTS, momentum=0.9, centered=True), 3),
        (Averages(WEIGHTS, "known"), 2),  # as Adam
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Optimizer) else str(value),
)
def test_bytes_of_state_for_each_byte_of_weights(optimizer: Optimizer, expected: float) -> None:
    assert state_factor([optimizer]) == pytest.approx(expected, abs=0.05)
    assert not optimizer.state and WEIGHTS[0].grad is None, "the optimizer itself is left alone"


def test_groups_have_their_own_settings() -> None:
    """What the first group says counts: others cannot be told apart by weight."""
    optimizer = torch.optim.SGD([{"params": WEIGHTS, "momentum": 0.9, "initial_lr": 0.5, "name": "all"}], lr=0.1)
    assert state_factor([optimizer]) == 1


def test_the_largest_counts_and_none_is_nothing() -> None:
    assert state_factor([]) == 0
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    assert state_factor([torch.optim.SGD(WEIGHTS, lr=0.1), adam]) == pytest.approx(2, abs=0.01)


def test_agrees_with_a_real_step() -> None:
    weight = nn.Parameter(torch.zeros(256, 256))
    optimizer = torch.optim.AdamW([weight])
    expected = state_factor([optimizer])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[weight].values())
    assert kept / weight.nbytes == pytest.approx(expected, rel=0.01)
