"""What training code does to parameters, it may do to those of another rank: nothing happens."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing.context import set_spawning_popen

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_lwpm import ConfigurationError
from lightning_lwpm.staging.placeholder import Placeholder, is_placeholder
from lightning_lwpm.staging.placement import named_tensors, place

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, foreach=False),
    "adamw foreach": partial(torch.optim.AdamW, foreach=True),
    "adamw fused": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "sgd foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adagrad": torch.optim.Adagrad,
}


def model() -> nn.Sequential:
    """Layer 0 lives here, layer 1 does not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    place(net, lambda name: (0,) if name.startswith("0") else (1,), 0)
    return net


def test_only_what_is_held_has_data() -> None:
    net = model()
    held = {name for name, tensor in named_tensors(net) if not is_placeholder(tensor.detach())}
    assert held == {"0.weight", "0.bias"}
    weight = net[1].weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (
        (3, 3),
        torch.float32,
        torch.device("cpu"),
        True,
    )
    for ask in (lambda: weight.sum().item(), lambda: torch.equal(weight, net[2].weight)):
        with pytest.raises(RuntimeError, match="lives on another rank"):
            ask()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_pass_over_them(name: str) -> None:
    net, alone = model(), nn.Linear(3, 3)
    alone.load_state_dict({"weight": net[0].weight.detach(), "bias": net[0].bias.detach()})
    make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[name]
    optimizer, other = make(net.parameters()), make(alone.parameters())
    for _ in range(3):
        for layer, optim in ((net[0], optimizer), (alone, other)):
            optim.zero_grad()
            layer(torch.ones(2, 3)).square().sum().backward()
            optim.step()
    assert torch.equal(net[0].weight, alone.weight)
    states = optimizer.state_dict()["state"]
    assert set(states) - set(other.state_dict()["state"]) <= {2, 3, 4, 5}, (
        "numbers of parameters are those of the whole"
    )
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("foreach", [False, True])
def test_clipping_passes_over_them(foreach: bool) -> None:
    net = model()
    net[0](torch.ones(2, 3)).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1, foreach=foreach)
    expected = torch.stack([p.grad.norm() for p in net[0].parameters()]).norm()  # type: ignore[union-attr]
    assert norm > 0.1
    torch.testing.assert_close(expected, torch.tensor(0.1), rtol=1e-4, atol=1e-6)


def test_state_dicts_hold_them_and_load_into_what_is_held() -> None:
    net = model()
    state = net.state_dict()
    assert [is_placeholder(value) for value in state.values()] == [False, False, *[True] * 7]
    state["0.weight"] = torch.ones(3, 3)
    net.load_state_dict(state)
    assert torch.equal(net[0].weight, torch.ones(3, 3))
    assert is_placeholder(net[1].weight.detach())


def test_conversions_and_initialisers() -> None:
    net = model().to(torch.float64)
    assert net[1].weight.dtype == torch.float64
    assert is_placeholder(net[1].weight.detach())
    nn.init.kaiming_uniform_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    nn.init.normal_(net[1].weight, std=0.02)  # not trunc_normal_: it looks at the values it has drawn
    assert net.half()[1].weight.dtype == torch.float16


def test_averages_pass_over_them() -> None:
    net = model()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        averaged.update_parameters(net)
    assert is_placeholder(averaged.module[1].weight.detach())
    assert torch.equal(averaged.module[0].weight, torch.ones(3, 3))


def test_copies() -> None:
    net = model()
    twins = [copy.deepcopy(net)]
    set_spawning_popen(object())  # while a process is started
    try:
        twins.append(pickle.loads(pickle.dumps(net)))
    finally:
        set_spawning_popen(None)
    for twin in twins:
        assert isinstance(twin[1].weight, nn.Parameter)
        assert is_placeholder(twin[1].weight.detach())
        assert torch.equal(twin[0].weight, net[0].weight)


def test_no_file_is_made_of_them() -> None:
    """It would be found out when it is loaded, and the weights would be gone."""
    for saved in (model(), model().state_dict()):
        with pytest.raises(ConfigurationError, match="merged_module"):
            torch.save(saved, io.BytesIO())


def test_nothing_here_is_made_from_them() -> None:
    net = model()
    with pytest.raises(RuntimeError, match="lives on another rank"):
        net[1](torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="writes a parameter of another rank"):
        net[0].weight.detach().copy_(net[1].weight.detach())
    assert type(net[1].weight.detach() * 2) is Placeholder


def test_ties_stay_ties() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    place(net, lambda name: (1,), 0)
    assert net[1].weight is net[0].weight
    place(net, lambda name: (0,), 0, fetch=lambda name, tensor: torch.ones(3, 3))
    assert net[1].weight is net[0].weight
    assert torch.equal(net[1].weight, torch.ones(3, 3))
