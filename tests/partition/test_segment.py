"""Segments run by themselves as they did in the step, and leave the model alone."""

import copy
import dataclasses
import pickle
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lwpm.partition.measure import time_segment
from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.partition.segment import Segment

CPU = torch.device("cpu")


def look(net: nn.Module, *inputs: Any) -> Probe:
    return probe(net, lambda: net(*inputs).sum())


def run(segment: Segment, net: nn.Module, backward: bool = True) -> tuple[list[Tensor], dict[str, nn.Module]]:
    """Run a segment by itself, forward and backward; its results, and the copies of its layers."""
    modules = segment.modules(net, CPU)
    results = segment.run(modules, segment.inputs(CPU))
    if backward and results:
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return results, modules


# -- segments run by themselves ----------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Indices near the end of the table, so that invented ones would be out of range or of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten(), reduction="none")


class Views(nn.Module):
    """Views and in-place functions between layers, and a tensor that is filled part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 12)
        self.middle = nn.Linear(4, 6)
        self.outlet = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.inlet(x).chunk(3, -1)
        a = a.transpose(0, 1).contiguous().t().mul_(2)
        y = self.middle(a + b * c).relu_()
        filled = x.new_zeros(y.shape)  # not made from weights
        filled[:, :3] = y[:, 3:]
        return self.outlet(filled)


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor
    scale: float = 2.0


Both = namedtuple("Both", "first second")


class Structured(nn.Module):
    """Takes and gives dicts, dataclasses, named tuples and keyword arguments."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, pair: Pair, *, extra: dict[str, Tensor], negate: bool = False) -> Both:
            first = (pair.left * self.weight + pair.right) * pair.scale
            return Both(-first if negate else first, {"sum": first + extra["x"], "kept": [first.detach()]})

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Part(), self.Part()

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(Pair(x, x + 1), extra={"x": x}, negate=True)
        out = self.second(Pair(out.first, out.second["sum"], 0.5), extra={"x": out.second["kept"][0]})
        return out.first + out.second["sum"]


class Tied(nn.Module):
    """Embedding and head share a weight; the head is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.mix(self.table(ids))
        return self.head(hidden) + F.linear(hidden, self.table.weight)


class Buffers(nn.Module):
    """Running statistics, a buffer that code between layers counts up, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.norm, self.outlet = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.register_buffer("scale", torch.full((4,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.inlet(x)), 0.5)
        self.steps.add_(1)
        return self.outlet(x * self.scale)


class Twice(nn.Module):
    """A layer that is called twice, with inputs of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([self.layer(x), x]))


class Recurrent(nn.Module):
    """A layer that returns a tuple in a tuple, and one that returns integers."""

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x * self.weight).max(-1)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.choice, self.table = nn.LSTM(4, 5), self.Choice(), nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, (hidden, _) = self.lstm(x)
        best, which = self.choice(out + hidden)
        return self.table(which) * best.unsqueeze(-1)


IDS = torch.tensor([[6, 5, 6], [0, 6, 4]])
X = torch.randn(3, 4)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding with real indices": (Tokens, IDS),
    "views and in-place functions": (Views, X),
    "dicts, dataclasses, keywords": (Structured, X),
    "tied weights": (Tied, IDS),
    "buffers and dropout": (Buffers, X),
    "called twice": (Twice, X),
    "tuples and integers": (Recurrent, torch.randn(2, 3, 4)),
}


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, x = NETS[request.param]
    return build(), x


def test_every_segment_runs_by_itself(net: tuple[nn.Module, Tensor]) -> None:
    """With gradients for the weights of its layers, also where outputs are changed in place or put into others."""
    model, x = net
    seen = look(model, x)
    assert len(seen.segments) == len(seen.timeline.calls)
    for call, segment in zip(seen.timeline.calls, seen.segments, strict=True):
        assert segment.layers == (call.name,)
        results, modules = run(segment, model)
        assert results and all(result.isfinite().all() for result in results)
        for name, weight in modules[call.name].named_parameters():
            assert weight.grad is not None, f"{call.name}.{name} has no gradient"


def test_what_comes_out_is_what_comes_in_behind(net: tuple[nn.Module, Tensor]) -> None:
    """The results of a segment have the shapes that the segments behind it take; the last ones end in one number."""
    model, x = net
    segments = look(model, x).segments
    taken = {(o.shape, o.dtype) for segment in segments for o in segment.operands.values()}
    for segment in segments[:-1]:
        for result in run(segment, model)[0]:
            assert (tuple(result.shape), result.dtype) in taken
    assert [tuple(result.shape) for result in run(segments[-1], model)[0]] == [()]


def test_nothing_of_the_model_is_changed(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 2.0)
    before, given = copy.deepcopy(model), x.clone()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    segments = look(model, x).segments
    for _ in range(2):
        for segment in segments:
            for train in (True, False):
                time_segment(segment, model, CPU, train, seconds=0.0)
    for (name, tensor), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, old), name
    for name, weight in model.named_parameters():
        assert weight.grad is gradients[name] and (weight.grad == 2).all() and weight.requires_grad
    assert torch.equal(x, given)


def test_a_segment_can_be_sent(net: tuple[nn.Module, Tensor]) -> None:
    """What arrives does the same with another process's copy of the model, and has the same digest."""
    model, x = net
    segments = look(model, x).segments
    other = copy.deepcopy(model)
    for segment, sent in zip(segments, pickle.loads(pickle.dumps(segments)), strict=True):
        assert sent.digest == segment.digest
        torch.manual_seed(3)
        expected = run(segment, model)[0]
        torch.manual_seed(3)
        for one, two in zip(expected, run(sent, other)[0], strict=True):
            assert torch.equal(one, two)


def test_values_are_those_of_the_step() -> None:
    """Of integers: floating-point inputs are invented."""
    model = Tokens()
    first = look(model, IDS).segments[0]
    assert [o.values.tolist() for o in first.operands.values() if o.values is not None] == [IDS.tolist()]
    results, modules = run(first, model)
    assert torch.equal(results[0], model.table(IDS))
    assert not modules["table"].weight.grad[1:4].any(), "only rows that the step used have a gradient"


def test_inputs_have_the_strides_of_the_step() -> None:
    """What is transposed costs more to multiply; what is expanded takes no more room."""
    net = nn.Sequential(nn.Linear(3, 2))
    for x in (torch.randn(3, 4).t(), torch.randn(1, 3).expand(4, 3)):
        (made,) = look(net, x).segments[0].inputs(CPU).values()
        assert (made.shape, made.stride()) == (x.shape, x.stride())


def test_a_function_may_change_integers_in_place() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet, self.outlet = nn.Linear(4, 4), nn.Embedding(5, 4)
            self.register_buffer("last", torch.tensor([[4, 1]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.outlet(self.last.sub_(1).clamp_(min=0)) * self.inlet(x).sum()

    model = Clamped()
    first = look(model, X).segments[0]
    given = {n: o.values.tolist() for n, o in first.operands.items() if o.values is not None}
    assert list(given.values()) == [[[4, 1]]]
    for _ in range(3):
        assert all(first.inputs(CPU)[n].tolist() == values for n, values in given.items())
        run(first, model)
    assert model.last.tolist() == [[4, 1]]


def test_what_has_no_gradient_has_none_alone() -> None:
    """A frozen layer in front, and a part of the step without autograd, have nothing to send back."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.teacher = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
            self.trained = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.frozen(x)
            with torch.no_grad():
                aim = self.teacher(x) * 2
            return (self.trained(x) - aim).square()

    model = Partly()
    segments = look(model, X).segments
    results = [run(segment, model)[0] for segment in segments]
    assert [len(found) for found in results] == [0, 0, 1]
    env = segments[1].inputs(CPU)
    segments[1].run(segments[1].modules(model, CPU), env)
    assert not any(made.requires_grad for made in env.values()), "autograd did not follow it"
    costs = [time_segment(segment, model, CPU, seconds=0.0) for segment in segments]
    assert costs[0].weight == 0 and costs[2].backward > costs[1].backward


def test_precision_context_is_entered() -> None:
    """Both where the step runs and where the segment does: the layer behind takes 16 bits."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with context():
        second = look(model, X).segments[1]
    assert [o.dtype for o in second.operands.values()] == [torch.bfloat16]
    with pytest.raises(RuntimeError):
        time_segment(second, model, CPU, context=nullcontext)
    assert time_segment(second, model, CPU, seconds=0.0, context=context).forward > 0


# -- timing ------------------------------------------------------------------------------------------------------


class Slow(torch.autograd.Function):
    """Work of a known length, so that what a busy machine adds is small beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


def test_more_work_takes_longer() -> None:
    class Works(nn.Linear):
        seconds = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return Slow.apply(super().forward(x), self.seconds)

    model = nn.Sequential(Works(4, 4), Works(4, 4))
    segments = look(model, X).segments
    model[1].seconds = 0.05
    quick, slow = (time_segment(segment, model, CPU, seconds=0.0) for segment in segments)
    assert slow.forward >= 0.05 and slow.backward >= 0.1
    assert quick.forward < slow.forward and quick.backward < slow.backward
    assert 0 <= slow.weight <= slow.backward


def test_weights_from_memory() -> None:
    """Copies of a layer take turns; each is timed with its gradients."""
    net = nn.Sequential(nn.Linear(64, 64))
    cost = time_segment(look(net, torch.randn(8, 64)).segments[0], net, CPU, cold=True, seconds=0.0)
    assert cost.forward > 0 and cost.backward > 0 and 0 <= cost.weight <= cost.backward
    assert net[0].weight.grad is None


def test_evaluation_has_no_backward_pass() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        segment = look(net, X).segments[0]
    cost = time_segment(segment, net, CPU, train=False, seconds=0.0)
    assert cost.forward > 0 and (cost.backward, cost.weight) == (0, 0)
