"""Models of which no rank builds more than its share: the weights of one device, made where they are held."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from training.modules import Classifier, train_loader, val_loader
from training.runs import Runs, same, weights
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_lwpm import ConfigurationError
from lightning_lwpm.staging import lazy
from lightning_lwpm.staging.lazy import built_lazily, is_lazy, realised
from lightning_lwpm.staging.placement import named_tensors, swap


class Net(nn.Module):
    """Tied weights, a table made in ``__init__``, values read while building, weights changed after their making."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inlet = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight
        self.position = nn.Parameter(torch.randn(8, width) * 0.02)
        table = torch.zeros(8, width)
        table[:, ::2] = torch.sin(torch.arange(8.0)[:, None] * torch.exp(-torch.arange(0.0, width, 2)))
        self.register_buffer("table", table, persistent=False)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)
        self.scale = 1.0 + float(self.blocks[1].weight.detach().abs().max())
        self.apply(self.drawn)
        self.head.weight.data[0].zero_()

    def drawn(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            module.weight.data *= 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x) + self.position[: len(x)] + self.table[: len(x)]
        for block in self.blocks:
            h = h + torch.tanh(block(h)) / self.scale
        return self.head(self.norm(h))


class Configured(Classifier):
    def __init__(self) -> None:
        super().__init__(width=4, depth=1)
        del self.inlet, self.blocks, self.head
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Parts(Classifier):
    """Its layers built on a device."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(width=4, depth=1)
        with torch.device(device):
            self.inlet = nn.Linear(6, 32)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)) for _ in range(3))
            self.head = nn.Linear(32, 3)


class Empty(Parts):
    """With a parameter that nothing fills."""

    def __init__(self) -> None:
        super().__init__("meta")
        self.blocks[1].scale = nn.Parameter(torch.ones(32, device="meta"))


@contextmanager
def small(limit: int = 64) -> Iterator[None]:
    before, lazy.SMALL_BYTES = lazy.SMALL_BYTES, limit
    try:
        yield
    finally:
        lazy.SMALL_BYTES = before


def trained(kwargs: dict[str, Any], build: Any, seeds: bool = True) -> dict[str, Any]:
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    torch.manual_seed(5 if seeds else trainer.global_rank)
    with small():
        module = build(trainer)
        trainer.fit(module, train_loader(32), val_loader(16))
        assert not any(is_lazy(tensor) for _, tensor in named_tensors(module))
    path = trainer.default_root_dir + "/end.ckpt"
    trainer.save_checkpoint(path)
    return {"weights": weights(module), "saved": torch.load(path, weights_only=False)["state_dict"]}


def configured(kwargs: dict[str, Any]) -> Any:
    return trained(kwargs, lambda trainer: Configured())


def parts(trainer: L.Trainer) -> L.LightningModule:
    with trainer.init_module():
        module = Parts()
    assert trainer.num_devices == 1 or is_lazy(module.blocks[0][0].weight)
    return module


def differently_seeded(kwargs: dict[str, Any]) -> Any:
    """Rank 0's weights are everybody's."""
    return trained(kwargs, parts, seeds=False)


def init_module(kwargs: dict[str, Any]) -> Any:
    return trained(kwargs, parts)


def on_meta(kwargs: dict[str, Any]) -> Any:
    return trained(kwargs, lambda trainer: Parts("cpu" if kwargs["strategy"] == "auto" else "meta"))


@pytest.mark.parametrize("scenario", [configured, differently_seeded, init_module, on_meta])
def test_like_one_device(runs: Runs, scenario: Any) -> None:
    expected = runs.on(0, scenario)[0]
    for world in (1, 3) if scenario is configured else (2,):
        for rank, found in enumerate(runs.on(world, scenario, costs="measured" if world == 3 else "estimated")):
            same(expected, found, f"rank {rank} of {world}")


def refused(kwargs: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        L.Trainer(**kwargs).fit(Empty(), train_loader(32))
    return str(caught.value)


def test_what_nothing_fills_is_named(runs: Runs) -> None:
    for message in runs.on(2, refused):
        assert "'blocks.1.scale'" in message and "1 parameters or buffers of Empty" in message


@pytest.mark.parametrize(
    "build",
    [
        Net,
        lambda: nn.LSTM(20, 20),
        lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=60, eos_token_id=0, bos_token_id=0)
        ),
    ],
)
def test_the_same_bits_wherever_they_are_made(build: Any) -> None:
    torch.manual_seed(3)
    expected, after = build(), torch.rand(2)
    torch.manual_seed(3)
    with small(), built_lazily():
        built = build()
    assert torch.equal(after, torch.rand(2)), "the generator goes on as if the model had been built whole"
    assert any(is_lazy(tensor) for _, tensor in named_tensors(built))
    sent = pickle.loads(pickle.dumps(built))
    copied = copy.deepcopy(built)
    for module in (built, sent, copied):
        swap(module, lambda _, tensor: realised(tensor))
        same(dict(named_tensors(expected)), dict(named_tensors(module)))
        assert [p.requires_grad for p in expected.parameters()] == [p.requires_grad for p in module.parameters()]
