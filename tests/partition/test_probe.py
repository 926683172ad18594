"""The probe sees what a step uses and does, and leaves nothing behind."""

import random
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_lwpm.partition.apply import make_layout
from lightning_lwpm.partition.folded import folded
from lightning_lwpm.partition.plan import make_plan
from lightning_lwpm.partition.probe import Probe, probe


class Meter:
    """An object of the user's own, which refers to itself."""

    def __init__(self) -> None:
        self.latest, self.sums = deque([0], maxlen=1), {"all": [torch.zeros(4)]}
        self.itself = (self,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()
        self.token = nn.Parameter(torch.zeros(4))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.unused = nn.Linear(4, 4)
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.meter.latest.append(self.calls)
        self.meter.sums["all"][0] += 1
        self.meter.sums["new"] = [self.calls]
        self.meter.new = self.calls
        self.last = x
        x = x + self.token * random.random()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.norm(x)


def look(net: nn.Module) -> Probe:
    return probe(net, lambda: net(torch.randn(3, 4)).sum())


def units(net: nn.Module, stages: int) -> list[str]:
    seen = look(net)
    return [unit.name for unit in make_layout(net, seen, make_plan(seen.timeline, stages, "auto", range(stages))).units]


def test_names_the_layers_in_order() -> None:
    seen = look(Net())
    names = [f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert [call.name for call in seen.timeline.calls] == [*names, "norm"]
    assert seen.spans["blocks.1"] == ((2, 3),)


def test_says_where_parameters_are_used() -> None:
    seen = look(Net())
    assert seen.parameters["token"] == (0,)
    assert seen.parameters["blocks.2.0.weight"] == (4,)
    assert seen.parameters["unused.weight"] == (6,)  # with its neighbour
    assert seen.buffers["norm.running_mean"] == (6,)


def test_leaves_nothing_behind() -> None:
    net = Net()
    net.blocks[0].register_forward_hook(lambda *_: None)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    hooks = {name: list(module._forward_hooks.values()) for name, module in net.named_modules()}
    states = random.getstate(), torch.get_rng_state()
    probe(net, lambda: net(torch.ones(3, 4)).sum())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert (net.calls, net.log) == (0, [])
    assert set(vars(net.meter)) == {"latest", "sums", "itself"}
    assert net.meter.latest == deque([0]) and list(net.meter.sums) == ["all"] and not net.meter.sums["all"][0].any()
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert {name: list(module._forward_hooks.values()) for name, module in net.named_modules()} == hooks
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_weights_that_the_step_changes_have_one_history() -> None:
    net = Net()
    before = net.blocks[0][0].weight.clone(), net.blocks[2][0].bias.clone()

    def step() -> torch.Tensor:
        out = net(torch.randn(3, 4))
        net.blocks[0][0].weight.data = net.blocks[0][0].weight.data * 0.9
        net.blocks[2][0].bias.data.clamp_(-0.01, 0.01)
        return out.sum()

    seen = probe(net, step)
    assert seen.written == ("blocks.0.0.weight", "blocks.2.0.bias")
    assert not any(seen.timeline.allowed[1:])
    assert torch.equal(net.blocks[0][0].weight, before[0])
    assert torch.equal(net.blocks[2][0].bias, before[1])


def test_hooks_registered_by_the_step_go_with_it() -> None:
    """`transformers` registers hooks in the first forward and marks the model: both or neither must stay."""
    net = Net()
    net.register_forward_pre_hook(lambda module, _: module.blocks[0].register_forward_hook(lambda *_: None) and None)
    look(net)
    assert not net.blocks[0]._forward_hooks


def test_does_not_cut_what_is_recomputed_as_a_whole() -> None:
    allowed = look(Net()).timeline.allowed
    assert allowed == (True, False, True, False, True, False, True)


def test_an_idle_hook_hides_in_a_unit() -> None:
    net = Net()
    net.blocks[0][2].register_forward_hook(lambda module, args, output: None)
    assert units(net, 1) == ["blocks.0", "blocks.1", "blocks.2", "norm", "unused"]


def test_a_hook_that_keeps_its_output_does_not() -> None:
    net, kept = Net(), []
    net.blocks[0][2].register_forward_hook(lambda module, args, output: kept.append(output))
    assert units(net, 1) == ["blocks.0.0", "blocks.0.2", "blocks.1", "blocks.2", "norm", "unused"]


def test_a_hook_that_computes_does_not() -> None:
    net = Net()
    sums: list[Any] = []
    net.blocks[1][1].register_forward_hook(lambda module, args, output: sums.append(output.sum()))
    assert units(net, 1) == ["blocks.0", "blocks.1.0", "blocks.1.2", "blocks.2", "norm", "unused"]


def test_expanded_tensors_in_attributes_are_left_as_they_are() -> None:
    """They cannot be written in place: augmentations keep such."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = torch.ones(1).expand(2)
    model.register_buffer("shift", torch.zeros(1).expand(2))
    probe(model, lambda: model(torch.ones(1, 2)) * model.scale + model.shift)
    assert model.scale.stride() == (0,)


class Forces(nn.Module):
    """A gradient in the midst of layers; the first layer is not on its way, and another one runs in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth, between, after, last = self.layers
        h = second(first(x)).tanh()
        energy = fourth(third(h).tanh()).square()
        other = between(x)
        (forces,) = torch.autograd.grad(energy.sum(), h, create_graph=True)
        (again,) = torch.autograd.grad(forces.sum(), h, create_graph=True)
        return last(after(forces + other) + again)


def test_what_a_gradient_goes_through_is_kept_together() -> None:
    net = Forces()
    seen = look(net)
    assert [where for _, where in seen.derivations] == [(2, 4), (2, 4)]
    assert seen.timeline.allowed == (True, True, True, False, False, True, True)
    sites = [place for place, _ in seen.derivations]
    assert all(place[0][0] == __file__ for place in sites)
    assert sites[0][0][1] + 1 == sites[1][0][1]
    layout = make_layout(net, seen, make_plan(seen.timeline, 3, ["layers.2", "layers.5"], range(3)))
    assert layout.derivations == {(place, 1) for place in sites}


def test_the_same_where_each_layer_has_one_place() -> None:
    net = Forces()
    seen = folded(probe(net, lambda: (net.layers[5](torch.ones(4)) + net(torch.randn(3, 4))).sum()))
    assert [call.name for call in seen.timeline.calls] == [f"layers.{i}" for i in (5, 0, 1, 2, 3, 4, 6)]
    assert [where for _, where in seen.derivations] == [(3, 5), (3, 5)]
    assert seen.timeline.allowed == (True, False, False, False, False, False, True)[:1] + seen.timeline.allowed[1:]
    assert seen.timeline.allowed[4:6] == (False, False)
