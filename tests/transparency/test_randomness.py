"""What is random cannot be equal to one device in every bit, but it must be sound."""

import math

import torch
from cases import classify, pairs, regress
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH, Dropping, Noise
from pool import Pool
from torch import Tensor, nn


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


class EarlyNoise(nn.Module):
    """Draws all its noise before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.rand(len(x), 1)
        x = x * t + noise * (1 - t)
        for layer in self.layers:
            x = layer(x).tanh()
        return x - noise


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
