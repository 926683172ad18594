"""What layers leave behind beside what they return, and what only one rank does."""

from typing import Any

import pytest
import torch
from compare import compare
from harness import train_pipelined, train_single
from pool import Pool
from torch import nn


class Router(nn.Module):
    """Stores an auxiliary loss on itself, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.auxiliary: Any = 0.0
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inner(x)
        self.auxiliary = (h**2).mean()
        self.kept["last"] = h.mean(0)
        return torch.relu(h) + x


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Router() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        auxiliary = sum(layer.auxiliary for layer in self.layers)
        kept = torch.stack([layer.kept["last"] for layer in self.layers]).mean()
        return self.head(x).square().mean() + 0.1 * auxiliary + 0.01 * kept


def batches() -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(8, 8) for _ in range(3)]


def step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("stages", [2, 3])
def test_tensors_stored_on_layers_reach_later_stages(pool: Pool, stages: int) -> None:
    """Without this the last stage would add an auxiliary loss of the initial 0.0, and nobody would notice."""
    expected = train_single(Routed, step, batches(), 4, sgd)
    results = pool.run(stages, train_pipelined, Routed, step, batches(), 4, "1f1b", "auto", sgd)
    compare(expected, results)


def test_code_that_only_one_rank_runs_is_noticed(pool: Pool) -> None:
    """A torch function more on one rank shifts the names of those after it: an error, never another tensor."""

    def lopsided(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        import os

        h = model[0](batch)
        if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] != "1":
            h.abs()
        h = torch.tanh(h) + 1
        return model[2](model[1](h)).square().mean()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    partition = ["2"]
    outcomes = pool.outcomes(2, train_pipelined, build, lopsided, batches(), 4, "1f1b", partition, sgd)
    assert all("took another path on different ranks" in value[1] for ok, value in outcomes if not ok)
    assert not any(ok for ok, _ in outcomes)


def test_modules_that_are_imported_in_a_step_do_not_count(pool: Pool) -> None:
    """Rank 0 has looked at the step, and imported what it imports; what that calls on others shifted their names."""

    def importing(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        import os

        h = model[0](batch)
        if os.environ.get("RANK") == "1":
            torch.zeros(3), torch.device("cpu")  # as the first line of many modules
        h = torch.tanh(h) + 1
        return model[2](model[1](h)).square().mean()

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    expected = train_single(build, importing, batches(), 4, sgd)
    compare(expected, pool.run(2, train_pipelined, build, importing, batches(), 4, "1f1b", ["2"], sgd))
