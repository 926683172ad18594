"""What is computed again draws the same numbers, and changes nothing a second time."""

import random
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.recompute import Recompute, again, layers_of


class Meter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.total, self.latest = 0, deque(maxlen=2)

    def update(self, value: int) -> float:
        self.latest.append(value)
        self.total += sum(self.latest)
        return 1 / self.total


class Block(nn.Module):
    """Draws from every generator, counts its calls, and has buffers: one changes, one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("constant", torch.ones(4))
        self.calls = 0
        self.seen: list[int] = []
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen.append(self.calls)
        y = self.dropout(self.norm(self.inner(x).tanh())) * self.constant * self.calls
        y = y * self.meter.update(self.calls)
        return self.outer(y) * random.random() if random.random() < 0.5 else self.outer(y.sin())


def train(mode: str, device: str = "cpu") -> dict[str, Any]:
    """Three micro-batches: their forward passes, then their backward passes."""
    torch.manual_seed(0)
    random.seed(3)
    root = nn.Module()
    root.blocks = nn.ModuleList(Block() for _ in range(4))
    root.to(device)
    recompute = Recompute(mode, root)

    def step(_: Any) -> Tensor:
        x = torch.ones(5, 4, device=device).cumsum(0)
        for block in root.blocks:
            x = x + block(x)
        return x.square().sum()

    with recompute.batch():
        losses = [recompute.run(step, None, True) for _ in range(3)]
        for loss in losses:
            loss.backward()
    return {
        "losses": losses,
        "gradients": [p.grad for p in root.parameters()],
        "buffers": list(root.buffers()),
        "counts": [(block.calls, block.seen, block.meter.total, block.meter.latest) for block in root.blocks],
        "next": (random.random(), torch.rand(1)),
    }


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_as_if_computed_once(device: str) -> None:
    expected, found = train("none", device), train("layer", device)
    for kind in ("losses", "gradients", "buffers"):
        assert all(map(torch.equal, expected[kind], found[kind])), kind
    assert expected["counts"] == found["counts"]
    assert expected["next"] == found["next"]


def test_constants_are_not_copied() -> None:
    """What a layer keeps besides its input is as large as the buffers that it changes."""
    block = nn.Module()
    block.register_buffer("constant", torch.ones(4))
    block.register_buffer("count", torch.zeros(1))
    held: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        held.append(block.constant)
        return (x * block.constant).exp() + block.count.add_(1).item()

    out = again(call, [block], (torch.ones(4, requires_grad=True),))
    out.sum().backward()
    assert held[0] is held[1] is block.constant
    assert block.count == 1


def test_a_constant_that_changes_is_told() -> None:
    block = nn.Module()
    block.register_buffer("constant", torch.ones(4))
    out = again(lambda x: (x * block.constant).exp(), [block], (torch.ones(4, requires_grad=True),))
    block.constant.mul_(2)
    with pytest.raises(PipelineError, match="of a layer was changed"):
        out.sum().backward()


def test_an_input_that_changes_is_told() -> None:
    x = torch.ones(4, requires_grad=True).clone()
    out = again(torch.exp, [], (x,)).sum()
    x.add_(1)
    with pytest.raises(PipelineError, match="changed in place"):
        out.backward()


def test_layers_are_blocks_in_lists_or_else_what_has_several_layers() -> None:
    root = nn.Module()
    root.inlet = nn.Linear(4, 4)
    root.blocks = nn.ModuleList(Block() for _ in range(2))
    root.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert layers_of(root) == [*root.blocks, root.tail]
