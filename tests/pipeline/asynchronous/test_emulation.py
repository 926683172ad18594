"""The benchmark's emulation trains as an engine does that runs 1F1B action by action."""

import sys
from pathlib import Path

import pytest
import torch
from order import train
from problems import batches, same, stages, weights
from torch.nn import functional as F
from torch.nn.utils import get_total_norm as norm_of

from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, DEFAULT

sys.path.insert(0, str(Path(__file__).parents[3] / "examples/benchmarks/asynchronous"))

from emulation import Emulation, Stage


def final(parts):
    """All weights in use."""
    return [weight for stage in parts for weight in weights(stage.module)]


@pytest.mark.parametrize("name", [*CORRECTIONS, DEFAULT])
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 1), (3, 2), (4, 4), (4, 1), (3, 8)])
def test_emulation_equals_1f1b_action_by_action(name, p, m):
    mine, expected = stages(Stage, p, m, name), stages(Stage, p, m, name)
    Emulation(mine, m, F.mse_loss, apart=True).run(batches(6))
    train(expected, m, batches(6), F.mse_loss)
    assert same(final(mine), final(expected))


@pytest.mark.parametrize("name", ["none", "prediction", "stash"])
def test_what_is_computed_at_once_is_what_is_computed_apart(name):
    at_once, apart = stages(Stage, 4, 4, name), stages(Stage, 4, 4, name)
    losses = Emulation(at_once, 4, F.mse_loss).run(batches(6))
    assert losses == pytest.approx(Emulation(apart, 4, F.mse_loss, apart=True).run(batches(6)))
    torch.testing.assert_close(final(at_once), final(apart), rtol=1e-4, atol=1e-5)


def test_stages_clip_by_what_they_know():
    p, m, clip = 3, 1, 0.05
    parts, found = stages(Stage, p, m, "none"), []
    for k, stage in enumerate(parts):
        parameters = list(stage.module.parameters())
        stage.optimizer.register_step_pre_hook(
            lambda *_, k=k, own=parameters: found.append((k, float(norm_of([p.grad for p in own]))))
        )
    emulation = Emulation(parts, m, F.mse_loss, clip=clip)
    emulation.run(batches(5))
    squares = emulation._squares
    for number, (k, norm) in enumerate(found):
        n = number // p
        known = [squares[n - max(0, k - j) if n - max(0, k - j) >= 0 else n][j] for j in range(p)]
        assert norm == pytest.approx(squares[n][k] ** 0.5 * min(1, clip / (sum(known) ** 0.5 + 1e-6)), rel=1e-4)
    assert max(emulation.errors) > 0.01


@pytest.mark.parametrize("name", [*CORRECTIONS, DEFAULT])
def test_gradients_are_exact_while_weights_stand_still(name):
    p, m = 3, 2
    parts = stages(Stage, p, m, name, lr=0.0)
    seen = [[] for _ in parts]
    for stage, gradients in zip(parts, seen, strict=True):
        stage.optimizer.register_step_pre_hook(
            lambda *_, stage=stage, gradients=gradients: gradients.append(
                [parameter.grad.clone() for parameter in stage.module.parameters()]
            )
        )
    Emulation(parts, m, F.mse_loss, apart=True).run(batches(4))

    net = torch.nn.Sequential(*(stage.module for stage in stages(Stage, p, m, "none")))
    for number, (x, y) in enumerate(batches(4)):
        net.zero_grad()
        for some, target in zip(x.chunk(m), y.chunk(m), strict=True):
            (F.mse_loss(net(some), target) / m).backward()
        for stage, gradients in zip(net, seen, strict=True):
            assert same(gradients[number], [parameter.grad for parameter in stage.parameters()])


@pytest.mark.parametrize("name", ["none", "error_feedback", "look_ahead", "prediction", "stash"])
def test_exact_steps_are_those_of_one_device(name):
    """Exact to the end is exact; and then, lateness starts with the first batch after."""
    mine, plain = stages(Stage, 4, 2, name), stages(Stage, 4, 2, "none")
    Emulation(mine, 2, F.mse_loss, exact_steps=6, apart=True).run(batches(5))
    net = torch.nn.Sequential(*(stage.module for stage in plain))
    for x, y in batches(5):
        for some, target in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.mse_loss(net(some), target) / 2).backward()
        for stage in plain:
            stage.optimizer.step()
            stage.scheduler.step()
            stage.optimizer.zero_grad()
    assert same(final(mine), final(plain))
