"""What is random is sound on each stage; on request it is that of one device, to the last bit."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from cases import classify, pairs, regress
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH, Dropping, Noise
from pool import Pool
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


class Masks(nn.Module):
    """Gives back the dropout masks of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drops = nn.ModuleList(nn.Dropout(0.5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        masks = []
        for layer, drop in zip(self.layers, self.drops, strict=True):
            x = layer(x)
            masks.append(drop(torch.ones_like(x)) > 0)
        alike = sum((a == b).all().float() for i, a in enumerate(masks) for b in masks[:i])
        return x.square().mean() * 0 + alike


class MaskSum(Masks):
    """Tells which masks it has drawn."""

    def forward(self, x: Tensor) -> Tensor:
        mask = self.drops[0](torch.ones_like(x)).flatten()
        return self.layers[0](x).sum() * 0 + (mask * torch.arange(len(mask), device=mask.device)).sum()


class EarlyNoise(nn.Module):
    """Draws all its noise before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.rand(len(x), 1, device=x.device)
        x = x * t + noise * (1 - t)
        for layer in self.layers:
            x = layer(x).tanh()
        return x - noise


class Everywhere(nn.Module):
    """Draws in layers, in blocks before their first layer and between, in user's checkpoints, twice in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy = Noise()
        self.layers = nn.ModuleList(Attentive() for _ in range(3))
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.noisy(x)
        for i, layer in enumerate(self.layers):
            x = x + self.drop(checkpoint(layer, x, use_reentrant=i == 1) if i else layer(x))
            x = x * (torch.rand(len(x), 1, device=x.device) > 0.2)
        return self.head(self.drop(x))


class Attentive(nn.Module):
    """A block that draws between its layers, as the attention of ``transformers`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(x, 0.2, self.training)
        scores = functional.dropout(self.query(x).softmax(-1), 0.3, self.training)
        return self.drop(self.out(self.drop(scores * x)))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def inputs() -> list[Tensor]:
    return [x for x, _ in pairs()]


def test_noise_between_layers(pool: Pool) -> None:
    for stages in (2, 4):
        results = pool.run(stages, train_pipelined, Noise, regress, inputs(), 2, "1f1b", timeout=40)
        assert all(math.isfinite(loss) for step in results[0]["losses"] for loss in step)
        assert set().union(*(r["gradients"][-1] for r in results)) == set(results[0]["layout"].parameters)


def test_noise_of_the_first_stage_is_that_of_one_device(pool: Pool) -> None:
    expected = train_single(EarlyNoise, regress, inputs(), 2)
    for stages in (2, 3):
        compare(expected, pool.run(stages, train_pipelined, EarlyNoise, regress, inputs(), 2, timeout=40))


def test_dropout_runs(pool: Pool) -> None:
    build = lambda: Dropping(0.3)  # noqa: E731
    results = pool.run(3, train_pipelined, build, classify, pairs(), 2, "1f1b", timeout=40)
    losses = results[0]["losses"]
    assert all(math.isfinite(loss) for step in losses for loss in step)
    assert losses == pool.run(3, train_pipelined, build, classify, pairs(), 2, "1f1b", timeout=40)[0]["losses"]


def test_each_stage_has_masks_of_its_own(pool: Pool) -> None:
    """All ranks have the same seed: the first dropout of each stage would have the same mask."""
    step = lambda model, x: model(x)  # noqa: E731
    results = pool.run(4, train_pipelined, Masks, step, inputs(), 2, "1f1b", timeout=40)
    assert sum(sum(losses) for losses in results[0]["losses"]) == 0


@pytest.fixture(scope="module")
def on_one_device(pool: Pool) -> dict[str, Any]:
    run = partial(train_pipelined, optimizer=adam, layers_draw=True)
    return pool.run(1, run, Everywhere, classify, pairs(), 2)[0]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (2, {"placement": (1, 0, 1, 0), "schedule": "interleaved_1f1b"}),
        (2, {"checkpointing": "layer"}),
        (3, {"checkpointing": "stage"}),
    ],
)
def test_draws_of_layers_are_those_of_one_device(
    pool: Pool, on_one_device: dict[str, Any], ranks: int, options: dict[str, Any]
) -> None:
    """A seed for each layer call and micro-batch: equal to the last bit, wherever the layers are."""
    arguments = (Everywhere, classify, pairs(), 2)
    run = partial(train_pipelined, optimizer=adam, layers_draw=True, **options)
    compare(on_one_device, pool.run(ranks, run, *arguments, timeout=60))


def test_draws_differ_between_layers_and_microbatches(pool: Pool) -> None:
    step = lambda model, x: model(x)  # noqa: E731
    run = partial(train_pipelined, layers_draw=True)
    for ranks in (1, 3):
        results = pool.run(ranks, run, Masks, step, inputs(), 2, "1f1b", timeout=40)
        assert sum(sum(losses) for losses in results[0]["losses"]) == 0
    masks = [pool.run(1, run, MaskSum, step, inputs(), 2)[0]["losses"] for _ in range(2)]
    assert masks[0] == masks[1]
    assert len({loss for losses in masks[0] for loss in losses}) > 1
