"""Compiled models: what one device computes, compiled stage by stage where a graph would cross a boundary."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import classify, pairs
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH, block
from pool import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

graphs: list[int] = []
"""Of what the backend below was given, in this process: the number of its operations."""


def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A backend that runs graphs as they are, and counts them."""
    graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
    return graph.forward


def fresh() -> None:
    """Forget what was compiled in this process."""
    torch._dynamo.reset()
    graphs.clear()


class Net(nn.Module):
    """Blocks with code between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        fresh()
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = x + inner(x)
        return self.head(x)


class Whole(nn.Module):
    """The whole model, compiled by its owner."""

    def __init__(self, backend: Any = counting) -> None:
        super().__init__()
        self.net = torch.compile(Net(), backend=backend, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class InPlace(Net):
    """The whole model, compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.compile(backend=counting, dynamic=False)


class Blocks(Net):
    """Blocks compiled one by one: two of them wrapped, two in place."""

    def __init__(self) -> None:
        super().__init__()
        for i in (0, 2):
            self.blocks[i] = torch.compile(self.blocks[i], backend=counting, dynamic=False)
        for i in (1, 3):
            self.blocks[i].compile(backend=counting, dynamic=False)


class Decorated(Net):
    """A compiled ``forward``."""

    forward = torch.compile(Net.forward, backend=counting, dynamic=False)


class Function(Net):
    """Compiled functions: one between layers, one in the loss, one inside a layer."""

    def __init__(self) -> None:
        super().__init__()
        compiled = torch.compile(lambda x, y: x + y.tanh(), backend=counting, dynamic=False)
        self.mix = compiled
        self.blocks[1] = Mixing(compiled)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = self.mix(x, inner(x))
        return self.head(x)


class Mixing(nn.Module):
    """A layer that calls a compiled function."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.mix = nn.Linear(WIDTH, WIDTH), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.linear(x))


class Checkpointed(Net):
    """Compiled as a whole, with blocks that are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = x + checkpoint(inner, x, use_reentrant=False)
        return self.head(x)


class Again(nn.Module):
    """That, compiled by its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(Checkpointed(), backend=counting, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Apart(Net):
    """Compiled as a whole, but for one block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].forward = torch.compiler.disable(self.blocks[1].forward)
        self.compile(backend=counting, dynamic=False)


class Deep(nn.Module):
    """A compiled model that lies in one stage, with blocks inside."""

    def __init__(self) -> None:
        super().__init__()
        inner = Net()
        inner.head = nn.Linear(WIDTH, WIDTH)
        self.inner, self.tail = torch.compile(inner, backend=counting, fullgraph=True, dynamic=False), Whole()

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(x))


def counted(rank: int, world: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A pipelined run, and the graphs that this rank has compiled."""
    result = train_pipelined(rank, world, *args, **kwargs)
    return {**result, "graphs": list(graphs)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("model", [Whole, InPlace, Blocks, Decorated, Function, Again, Apart])
def test_compiled_models(pool: Pool, model: type[nn.Module], world: int) -> None:
    expected = train_single(model, classify, pairs(), 2)
    results = pool.run(world, counted, model, classify, pairs(), 2)
    compare(expected, results)
    assert any(result["graphs"] for result in results)
    assert all(result["graphs"] for result in results) or model is Function  # all but the stages without such a layer


@pytest.mark.parametrize("schedule", ["gpipe", "zb1p"])
def test_other_schedules(pool: Pool, schedule: str) -> None:
    expected = train_single(Whole, classify, pairs(), 4)
    compare(expected, pool.run(2, counted, Whole, classify, pairs(), 4, schedule))


def test_units_are_compiled_once_a_form(pool: Pool) -> None:
    """Blocks that are alike share a graph, whatever the number of micro-batches."""
    results = pool.run(2, counted, Whole, classify, pairs(), 4, "1f1b", ["net.blocks.3"])
    graphs_of = {result["last"]: sorted(result["graphs"]) for result in results}
    # a graph of its own for an input without a gradient, as torch has it
    assert graphs_of == {False: [3, 3], True: [1, 3]}


@pytest.mark.parametrize("mode", ["layer", "stage"])
@pytest.mark.parametrize("model", [Whole, InPlace, Blocks, Deep])
def test_activation_checkpointing(pool: Pool, model: type[nn.Module], mode: str) -> None:
    expected = train_single(model, classify, pairs(), 4)
    results = pool.run(2, partial(counted, checkpointing=mode), model, classify, pairs(), 4, "gpipe")
    compare(expected, results)
    assert all(0 < len(result["graphs"]) < 8 for result in results)  # not anew for each micro-batch


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(pool: Pool, backend: str) -> None:
    """A graph for each unit adds the same numbers, maybe in another order than one graph."""
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    build = partial(Whole, backend)
    expected = train_single(build, classify, pairs(), 2)
    compare(expected, pool.run(2, train_pipelined, build, classify, pairs(), 2), tolerance=1e-6)
