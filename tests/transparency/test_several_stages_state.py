"""What a step changes beside its result, where a rank runs the step once for each of its stages."""

from typing import Any

import pytest
import torch
from cases import classify, pairs, regress
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH
from pool import Pool
from torch import Tensor, nn

PLACEMENTS = [[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0]]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def check(pool: Pool, build: Any, step: Any, batches: list[Any], placement: list[int], count: int = 4) -> None:
    """Train both ways and compare to the last bit."""
    expected = train_single(build, step, batches, count, sgd)
    arguments = (build, step, batches, count, "1f1b", "auto", sgd, placement)
    compare(expected, pool.run(2, train_pipelined, *arguments, timeout=40))


class Base(nn.Module):
    """Four layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)


class Counting(Base):
    """Counts its calls in a number, a list, a set and a dict, and looks at the counts at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.history: list[int] = []
        self.notes: dict[str, int] = {}
        self.flags: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.history.append(self.seen * 2)
        self.flags.add(self.seen % 3)
        self.notes["last"] = len(self.history)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * (1 + 0.01 * len(self.history))
        return self.head(x) / (self.seen + self.history[-1] + len(self.flags) + self.notes["last"])


class Buffered(Base):
    """Buffers and tensors that code between layers changes, in place and anew, read in other stages."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", torch.zeros(WIDTH))  # changes only after the model was looked at
        self.register_buffer("fresh", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros(()))
        self.moving = torch.ones(WIDTH)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.moving.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.count += 1
        x = x / self.count.clone()
        if self.steps > 2:
            self.late += x.detach().mean(0)
            self.fresh = self.fresh * 0.5 + x.detach().mean(0)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.moving.clone() + self.late - self.fresh
        return self.head(x)


class Overwriting(Base):
    """Changes the batch itself."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2).sub_(0.1)
        y = x
        for layer in self.layers:
            y = y + torch.tanh(layer(y)) * x
        return self.head(y)


class Storing(Base):
    """Stores tensors on itself in one stage and reads them in another, and in the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = None
        self.before: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if i == 0:
                self.kept = {"early": x * 2}
        out = self.head(x + self.kept["early"]) + self.before
        self.before = float(out.detach().mean())
        return out


class Modes(Base):
    """Switches a module between layers, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x))
            if i == 1:
                self.training = not self.training
                x = self.norm(x)
            if i == 2:
                x = x * (2 if self.training else 3)
        return self.head(x)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("build", [Counting, Buffered, Overwriting, Modes])
def test_each_stage_sees_what_one_device_sees(pool: Pool, build: Any, placement: list[int]) -> None:
    check(pool, build, classify, pairs(), placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tensors_stored_on_the_model(pool: Pool, placement: list[int]) -> None:
    # what the end of a step leaves for the next one, only the last stage knows before a batch has ended
    check(pool, Storing, regress, [x for x, _ in pairs()], placement, count=1)


def test_the_batch_is_changed_once(pool: Pool) -> None:
    """One sample: every stage is given the batch itself, or a copy where a later stage is still to come."""
    check(pool, Overwriting, classify, pairs(1, 1), [1, 0, 1, 0], count=1)
