"""Backward passes in two parts give the bits of one: each kind of layer, with what people do to layers."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.deferral import Deferral

Build = Callable[[], nn.Module]
Step = Callable[[nn.Module, Any], Tensor]


def regress(model: nn.Module, x: Any) -> Tensor:
    return model(x).float().square().mean()


def gradients(
    build: Build,
    inputs: list[Any],
    step: Step = regress,
    split: bool = True,
    order: Callable[[int], Any] = range,
    amp: bool = False,
) -> tuple[dict[str, Tensor | None], set[str]]:
    """The gradients of a model over some micro-batches, and the names of the weights that waited."""
    torch.manual_seed(0)
    model = build()
    named = dict(model.named_parameters())
    waited: set[str] = set()
    deferral = Deferral()

    def loss(x: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
            return step(model, x)

    if not split:
        for x in inputs:
            loss(x).backward()
        return {name: p.grad for name, p in named.items()}, waited
    with deferral.batch():
        for i, x in enumerate(inputs):
            with deferral.forward():
                out = loss(x)
            with deferral.inputs(i):
                out.backward()
            waited |= {name for name, p in named.items() if p.requires_grad and p.grad is None}
        for i in order(len(inputs)):
            deferral.weights(i)
    return {name: p.grad for name, p in named.items()}, waited


def check(build: Build, inputs: list[Any], step: Step = regress, amp: bool = False) -> set[str]:
    """Compare with an ordinary backward pass; returns the names of the weights that waited."""
    torch.set_num_threads(1)
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    expected, _ = gradients(build, copies, step, split=False, amp=amp)
    waited: set[str] = set()
    for order in (range, lambda count: reversed(range(count))):
        fresh = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        found, waited = gradients(build, fresh, step, order=order, amp=amp)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            mine = found[name]
            assert (gradient is None) == (mine is None), name
            if gradient is not None and mine is not None:
                assert type(mine) is Tensor and mine.dtype == gradient.dtype, name
                mine, gradient = (g.to_dense() if g.is_sparse else g for g in (mine, gradient))
                assert torch.equal(mine, gradient), f"{name}: {(mine - gradient).abs().max()}"
                layouts = zip(mine.shape, mine.stride(), gradient.stride(), strict=True)
                assert all(a == b for size, a, b in layouts if size > 1), name
        for x, y in zip(copies, fresh, strict=True):
            assert (x.grad is None) == (y.grad is None)
            assert x.grad is None or torch.equal(x.grad, y.grad)
    return waited


def floats(*shape: int, count: int = 3, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape).requires_grad_(grad) for _ in range(count)]


def integers(*shape: int, top: int = 9, count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, top, shape) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    grad=st.booleans(),
    turned=st.booleans(),
    amp=st.booleans(),
)
def test_linear(shape: list[int], sizes: tuple[int, int], bias: bool, grad: bool, turned: bool, amp: bool) -> None:
    step: Step = (lambda m, x: regress(m, x.transpose(0, -2))) if turned else regress
    waited = check(lambda: nn.Linear(*sizes, bias=bias), floats(*shape, sizes[0], grad=grad), step, amp)
    assert waited == {"weight"}


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    bias=st.booleans(),
    grad=st.booleans(),
    transposed=st.booleans(),
    amp=st.booleans(),
)
def test_convolutions(
    dims: int, groups: int, kernel: int, stride: int, padding: Any, dilation: int, mode: str, transposed: bool,
    bias: bool, grad: bool, amp: bool,
) -> None:  # fmt: skip
    options: dict[str, Any] = {"groups": groups, "stride": stride, "dilation": dilation, "bias": bias}
    if transposed:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        options["padding"] = padding if isinstance(padding, int) else 0
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        options.update(padding=padding, padding_mode=mode)
        options["stride"] = 1 if padding == "same" else stride
    odd = padding == "same" and dilation * (kernel - 1) % 2 and not transposed and mode == "zeros"
    waited = check(lambda: kind(4, 6, kernel, **options), floats(2, 4, *[7] * dims, grad=grad), amp=amp)
    assert waited == (set() if odd else {"weight", "bias"} if bias else {"weight"})


def test_channels_last() -> None:
    build = lambda: nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)  # noqa: E731
    assert check(build, [x.to(memory_format=torch.channels_last) for x in floats(2, 4, 8, 8, grad=False)])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_of_real_layers(stride: int, amp: bool) -> None:
    assert check(lambda: nn.Conv2d(32, 64, 3, stride, 1), floats(4, 32, 16, 16, count=2), amp=amp)
    assert check(lambda: nn.Conv2d(3, 32, 7, stride, 3, bias=False), floats(4, 3, 32, 32, count=2, grad=False), amp=amp)
    assert check(lambda: nn.Conv2d(64, 64, 3, stride, 1, groups=64), floats(4, 64, 16, 16, count=2), amp=amp)
    assert check(lambda: nn.ConvTranspose2d(32, 16, 2, stride), floats(4, 32, 16, 16, count=2), amp=amp)
    assert check(lambda: nn.Linear(128, 384), floats(8, 64, 128, count=2), amp=amp)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}])
def test_embedding(options: dict[str, Any]) -> None:
    assert check(lambda: nn.Embedding(9, 4, **options), integers(3, 5)) == {"weight"}


def test_what_is_not_deferred() -> None:
    assert not check(lambda: nn.Embedding(9, 4, sparse=True), integers(3, 5))
    assert not check(lambda: nn.Linear(4, 4), floats(4))
    assert not check(lambda: nn.Conv2d(4, 4, 3), floats(4, 5, 5))
    assert not check(lambda: weight_norm(nn.Linear(4, 4)), floats(3, 4))
    assert not check(lambda: nn.LSTM(4, 4), floats(3, 4), lambda m, x: m(x)[0].sum())
    assert not check(lambda: nn.Linear(4, 4).requires_grad_(False), floats(3, 4))


def halve(parameter: Tensor) -> None:
    parameter.grad *= 0.5


def hooked(after: bool) -> nn.Module:
    model = nn.Linear(4, 4)
    if after:
        model.weight.register_post_accumulate_grad_hook(halve)
    else:
        model.weight.register_hook(lambda grad: grad * 2)
    return model


@pytest.mark.parametrize("after", [False, True])
def test_hooks_see_gradients_at_once(after: bool) -> None:
    assert not check(partial(hooked, after), floats(3, 4))


class Tied(nn.Module):
    """Uses a weight in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 9)
        self.inner = nn.Linear(9, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.embedding.weight
        x = self.inner(self.embedding(tokens))
        x = x + (x @ weight).tanh() + self.inner(x)
        x = F.linear(x, weight).tanh() + F.linear(x.tanh(), weight)
        return x + weight.square().sum() + self.inner(x)


@pytest.mark.parametrize("amp", [False, True])
def test_weights_used_often(amp: bool) -> None:
    assert check(Tied, integers(3, 5), amp=amp) == {"embedding.weight", "inner.weight"}


class Blocks(nn.Module):
    """Recomputes its blocks."""

    def __init__(self, reentrant: bool, shared: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU(True), nn.LayerNorm(6)) for _ in range(3))
        self.reentrant, self.shared = reentrant, shared
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(self.run, block, x, use_reentrant=self.reentrant)
        return self.first(x) if self.shared else x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        self.runs += 1
        return x + block(self.first(x) if self.shared else x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_checkpoints(reentrant: bool, shared: bool, amp: bool) -> None:
    made: list[Blocks] = []

    def build() -> Blocks:
        made.append(Blocks(reentrant, shared))
        return made[-1]

    waited = check(build, floats(4, 6), amp=amp)
    assert waited == {"first.weight", *(f"blocks.{i}.0.weight" for i in range(3))}
    assert {model.runs for model in made} == {2 * 3 * 3}  # each block of each micro-batch is recomputed once


def test_attention_and_transformers() -> None:
    layer = partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0)
    waited = check(layer, floats(2, 5, 8))
    assert waited == {f"{name}.weight" for name in ("self_attn.out_proj", "linear1", "linear2")} | {
        "self_attn.in_proj_weight"
    }
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for sizes in ((6, 4), (1, 4), (6, 1), (1, 1)):
        assert check(lambda sizes=sizes: conv1d(*sizes), floats(2, 5, sizes[1])) == {"weight"}
        assert check(lambda sizes=sizes: conv1d(*sizes), floats(2, 5, sizes[1]), amp=True) == {"weight"}


class Forces(nn.Module):
    """Its output is a derivative of its own: gradients of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        energy = self.net(x).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0] + energy


def test_gradients_of_gradients() -> None:
    check(Forces, floats(4, 6))


class PerSample(nn.Module):
    """Uses `torch.func` on its own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x) + torch.func.jacrev(lambda v: self.layer(v).tanh().sum())(x)


def test_function_transforms() -> None:
    check(PerSample, floats(3, 4))


def test_compiled_layers() -> None:
    def build() -> nn.Module:
        inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        return nn.Sequential(nn.Linear(4, 4), torch.compile(inner, backend="aot_eager"), nn.Linear(4, 4))

    assert check(build, floats(3, 4)) == {"0.weight", "2.weight"}


def test_gradients_asked_for_inside_are_real() -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        loss = regress(model, x)
        slope = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        assert all(type(gradient) is Tensor for gradient in slope)
        return loss * slope[0].abs().sum()

    assert check(lambda: nn.Linear(4, 4), floats(3, 4), step) == {"weight"}


def test_only_input_and_gradient_are_held() -> None:
    held: list[Any] = []

    class Big(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.big = torch.zeros(9)
            held.append(weakref.ref(ctx.big))
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 2

    model, deferral = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), Deferral()
    with deferral.batch():
        with deferral.forward():
            hidden = model[0](torch.randn(2, 3))
            between = Big.apply(hidden)
            held.append(weakref.ref(hidden))
            kept = weakref.ref(between)
            loss = model[1](between).sum()
        del hidden, between
        with deferral.inputs(0):
            loss.backward()
        del loss
        assert [ref() for ref in held] == [None, None]
        deferral.weights(0)
        assert kept() is None
        assert all(not ledger.entries for ledger in deferral._ledgers.values())


def test_a_change_of_what_is_held_is_noticed() -> None:
    layer, x, deferral = nn.Linear(3, 3), torch.randn(2, 3), Deferral()
    with pytest.raises(PipelineError, match="was changed in place after its backward pass"), deferral.batch():
        with deferral.forward():
            loss = layer(x).sum()
        with deferral.inputs(0):
            loss.backward()
        x.zero_()
        deferral.weights(0)
    assert not layer.weight._post_accumulate_grad_hooks


def test_nothing_is_left_behind() -> None:
    before = F.linear, torch.embedding, torch.addmm, F.conv2d
    layer = nn.Linear(3, 3)
    check(lambda: layer, floats(2, 3))
    assert (F.linear, torch.embedding, torch.addmm, F.conv2d) == before
    assert not layer.weight._post_accumulate_grad_hooks


def test_what_others_have_put_in_place_of_a_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = F.linear

    def theirs(*args: Any) -> Tensor:
        calls.append(len(args))
        return linear(*args)

    monkeypatch.setattr(F, "linear", theirs)
    assert not check(lambda: nn.Linear(3, 3), floats(2, 3))
    assert calls and F.linear is theirs
