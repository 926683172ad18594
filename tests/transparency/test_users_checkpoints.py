"""The user's own activation checkpointing, of either kind: inside layers, around them, in transformers."""

from functools import partial
from typing import Any

import pytest
import torch
from cases import classify, pairs
from compare import compare
from harness import train_pipelined, train_single
from models import WIDTH, block
from pool import Pool, WorkerError
from test_transformers import LLAMA, NO_DROPOUT, TEXT, gpt2, tokens
from test_transformers import build as transformer
from test_transformers import step as run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Around(nn.Module):
    """Checkpoints around layers, and around layers with code between them."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.inlet = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def pair(self, x: Tensor, i: int, scale: float = 1.0) -> Tensor:
        return x + self.blocks[i + 1](torch.tanh(self.blocks[i](x))) * scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        x = checkpoint(self.blocks[0], x, use_reentrant=self.use_reentrant)
        x = checkpoint(self.pair, x, 1, use_reentrant=self.use_reentrant)
        return self.head(checkpoint(self.blocks[3], x.square(), use_reentrant=self.use_reentrant))


class Inside(nn.Module):
    """Layers that compute parts of themselves again."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(use_reentrant) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Layer(nn.Module):
    """Two products; the second is computed again."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x).relu(), use_reentrant=self.use_reentrant)


class Lists(nn.Module):
    """torch's own function for lists of layers."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.inlet = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint_sequential(self.body, 3, self.inlet(x), use_reentrant=self.use_reentrant))


class Again(torch.autograd.Function):
    """A checkpoint of a project's own, as diffusion models have it: it calls layers in a function of autograd."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, *weights: Tensor) -> Any:
        ctx.function, ctx.x, ctx.weights = function, x, weights
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x.view_as(x))
        return None, *torch.autograd.grad(out, [x, *ctx.weights], gradient, allow_unused=True)


class OwnFunction(Around):
    """Applies it to two layers at once."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.inlet(x))
        weights = [*self.blocks[1].parameters(), *self.blocks[2].parameters()]
        x = Again.apply(partial(self.pair, i=1), x, *weights)
        return self.head(self.blocks[3](x))


class FromTheStart(nn.Module):
    """Reentrant checkpoints of an input without a gradient: torch gives their layers none (and warns)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.head(x)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model", [Around, Inside, Lists])
def test_equals_one_device(pool: Pool, model: type[nn.Module], use_reentrant: bool, world: int) -> None:
    build: Any = partial(model, use_reentrant)
    compare(train_single(build, classify, pairs(), 4), pool.run(world, train_pipelined, build, classify, pairs(), 4))


def test_inputs_without_a_gradient(pool: Pool) -> None:
    expected = train_single(FromTheStart, classify, pairs(), 2)
    compare(expected, pool.run(2, train_pipelined, FromTheStart, classify, pairs(), 2))


def test_a_function_that_calls_layers(pool: Pool) -> None:
    """A stage began within it, where no step sees the layers: their weights were missed."""
    build: Any = partial(OwnFunction, True)
    expected = train_single(build, classify, pairs(), 2)
    compare(expected, pool.run(3, train_pipelined, build, classify, pairs(), 2))
    with pytest.raises(WorkerError, match=r"no stage can begin at 'blocks\.2'"):
        pool.run(2, partial(train_pipelined, partition=["blocks.2"]), build, classify, pairs(), 2)


def drawn_next(rank: int, world: int, *args: Any) -> Tensor:
    """What torch's generator gives after training in which numbers depend on layers."""
    train_pipelined(rank, world, *args, layers_draw=True)
    return torch.rand(2)


def test_layers_computed_again_draw_nothing(pool: Pool) -> None:
    """The order of the next epoch's data depended on how many such layers rank 0 had."""
    args = partial(OwnFunction, True), classify, pairs(), 2
    assert torch.equal(pool.run(1, drawn_next, *args)[0], pool.run(2, drawn_next, *args)[0])


@pytest.mark.parametrize("schedule", ["gpipe", "zb1p"])
def test_other_schedules(pool: Pool, schedule: str) -> None:
    build: Any = partial(Around, True)
    expected = train_single(build, classify, pairs(), 4)
    compare(expected, pool.run(2, train_pipelined, build, classify, pairs(), 4, schedule))


@pytest.mark.parametrize("schedule", ["gpipe", "zb1p"])
@pytest.mark.parametrize("mode", ["layer", "stage"])
@pytest.mark.parametrize("model", [Around, Inside])
def test_beside_the_option(pool: Pool, model: type[nn.Module], mode: str, schedule: str) -> None:
    """What the user computes again lies within what the option computes again, or around it."""
    build: Any = partial(model, False)
    expected = train_single(build, classify, pairs(), 4)
    pipelined = partial(train_pipelined, checkpointing=mode)
    compare(expected, pool.run(2, pipelined, build, classify, pairs(), 4, schedule))


MODELS = {
    "gpt2": gpt2(),
    "llama": partial(transformer, "LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "bert": partial(transformer, "BertForMaskedLM", "BertConfig", num_hidden_layers=4, **TEXT, **NO_DROPOUT),
}


def with_checkpoints(name: str, use_reentrant: bool | None) -> nn.Module:
    """A model of `transformers` that computes its layers again."""
    model: Any = MODELS[name]()
    options = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("name", MODELS)
def test_transformers(pool: Pool, name: str, use_reentrant: bool | None) -> None:
    build = partial(with_checkpoints, name, use_reentrant)
    expected = train_single(build, run, tokens(), 2)
    compare(expected, pool.run(3, train_pipelined, build, run, tokens(), 2), tolerance=TOLERANCE.get(name, 0.0))


TOLERANCE = {"gpt2": 1e-6, "bert": 1e-6}
"""Of models with an embedding that is also the head: each stage adds up its own uses first."""
