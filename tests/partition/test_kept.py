"""What the probe says of kept bytes is what autograd keeps, counted by hand and by autograd itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_lwpm.partition.probe import probe

FLOAT = 4


def kept(net: nn.Module, x: Tensor) -> list[int]:
    return [call.kept_bytes for call in probe(net, lambda: net(x).sum()).timeline.calls]


def held_by_autograd(net: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that autograd saves in a step, each storage once, without weights."""
    weights = {w.untyped_storage()._cdata for w in net.parameters()}
    held: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        result = net(x).sum()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def test_a_chain_counted_by_hand() -> None:
    """``Linear`` keeps its input, ``ReLU`` its output, ``LayerNorm`` its input with mean and deviation of each row."""
    rows = 3
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU())
    assert kept(net, torch.randn(rows, 4)) == [
        (4 + 6) * rows * FLOAT,  # the batch; and what ReLU made, which LayerNorm keeps too
        (6 + 1 + 1) * rows * FLOAT,  # what LayerNorm made, which the next layer keeps; mean and deviation
        5 * rows * FLOAT,  # what the last ReLU made
    ]


def test_what_nobody_keeps_is_not_counted() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(6, 5))
    assert kept(net, torch.randn(3, 4)) == [(4 + 6) * 3 * FLOAT, 0]
    with torch.no_grad():
        assert kept(net, torch.randn(3, 4)) == [0, 0]


class Attention(nn.Module):
    """Query, key and value are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(8, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class First(nn.Module):
    """Uses a small part of what a layer made; the whole is kept with it."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inlet(x)[:, 0].contiguous())


class Wide(nn.Module):
    """A tensor that takes no more room for being expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.scale = nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) * self.inlet(x).expand(-1, -1, 8)


MODELS: dict[str, Callable[[], nn.Module]] = {"parts of one": Attention, "a small part": First, "expanded": Wide}


@pytest.mark.parametrize("model", MODELS)
def test_equal_to_what_autograd_holds(model: str) -> None:
    net, x = MODELS[model](), torch.randn(2, 5, 8)
    assert sum(kept(net, x)) == held_by_autograd(net, x)


def test_what_is_recomputed_keeps_its_input_only() -> None:
    class Net(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.again = again
            self.inlet, self.outlet = nn.Linear(4, 4), nn.Linear(4, 4)
            self.block = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inlet(x)
            x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
            return self.outlet(x)

    x, row = torch.randn(3, 4), 3 * FLOAT
    assert kept(Net(again=True), x) == [4 * row + 4 * row, 0, 4 * row, 0]
    assert kept(Net(again=False), x) == [4 * row + 4 * row, 64 * row, 4 * row, 0]
    calls = probe(net := Net(again=True), lambda: net(x).sum()).timeline.calls
    assert [call.recomputed for call in calls] == [False, True, True, False]
