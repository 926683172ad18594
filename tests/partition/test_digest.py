"""Digests of segments: the same for what does the same, another for another layer, code, function or shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lwpm.partition.probe import probe

X = torch.randn(3, 4)


class Block(nn.Module):
    """A layer of the user's own, with a setting that its text does not show."""

    def __init__(self, width: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.relu(x @ self.weight)
        return x


def _digests(net: nn.Module) -> set[str]:
    return {segment.digest for segment in probe(net, lambda: net(X).sum()).segments}


def digest(layer: nn.Module, width: int = 4, dtype: torch.dtype = torch.float32, glue: Any = None) -> str:
    net = nn.Sequential(layer)
    x = torch.randn(3, width, dtype=dtype)
    return probe(net, lambda: (glue or torch.sum)(net(x))).segments[0].digest


def test_equal_blocks_have_one_digest() -> None:
    class Net(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.inlet = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 4)]) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            x = self.inlet(x)
            for norm, linear in self.blocks:
                x = x + torch.relu(linear(norm(x)))
            return x

    shallow, deep = (_digests(Net(depth)) for depth in (3, 9))
    assert shallow == deep and len(deep) == 4  # the inlet, norm, linear, and the last linear with the sum behind it


def test_digest_does_not_depend_on_values_or_names() -> None:
    assert digest(Block()) == digest(Block())
    net = nn.Sequential(nn.Identity(), Block())
    seen = probe(net, lambda: net(torch.randn(3, 4)).sum())
    assert seen.segments[0].digest == digest(Block(), glue=lambda x: x.sum())


def _variant(**changed: Any) -> type[nn.Module]:
    """A class of the same name with another forward."""
    return type("Block", (Block,), {"__module__": Block.__module__, "__qualname__": Block.__qualname__, **changed})


def _longer(self: Any, x: Tensor) -> Tensor:
    for _ in range(200):
        x = F.relu(x @ self.weight)
    return x


def _other_function(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.gelu(x @ self.weight)
    return x


def _other_operator(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.relu(x * self.weight.sum())
    return x


DIFFERENT: dict[str, Callable[[], str]] = {
    "width": lambda: digest(Block(8), 8),
    "dtype": lambda: digest(Block(dtype=torch.float64), dtype=torch.float64),
    "frozen": lambda: digest(Block().requires_grad_(False)),
    "evaluation mode": lambda: digest(Block().eval()),
    "constant in its code": lambda: digest(_variant(forward=_longer)()),
    "name in its code": lambda: digest(_variant(forward=_other_function)()),
    "operator in its code": lambda: digest(_variant(forward=_other_operator)()),
    "class": lambda: digest(nn.Linear(4, 4, bias=False)),
    "function behind it": lambda: digest(Block(), glue=lambda x: x.exp().sum()),
    "argument of a function": lambda: digest(Block(), glue=lambda x: torch.sum(x, 0).sum()),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_digest_tells_apart(what: str) -> None:
    assert DIFFERENT[what]() != digest(Block())


def test_digest_tells_keywords_apart() -> None:
    """The same value for another keyword is another function."""

    def bounded(**keywords: float) -> str:
        return digest(Block(), glue=lambda x: torch.clamp(x, **keywords).sum())

    assert bounded(min=0.5) != bounded(max=0.5)


def test_digest_sees_inside_a_layer() -> None:
    """A layer may contain modules without parameters, whose text does not show what they do."""

    def inside(function: Any) -> nn.Module:
        class Act(nn.Module):
            forward = staticmethod(function)

        Act.__qualname__ = "Act"
        layer = nn.Linear(4, 4)
        layer.add_module("act", Act())
        return layer

    assert digest(inside(lambda x: torch.relu(x))) != digest(inside(lambda x: torch.exp(x)))
