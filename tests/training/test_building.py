"""Models of which no rank builds more than its share: the weights of one device, made where they are held."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.data import DataLoader
from training.modules import Classifier, data, small, train_loader, val_loader
from training.runs import Runs, same, stock, weights
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_lwpm import ConfigurationError
from lightning_lwpm.staging.lazy import built_lazily, is_lazy, realised
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors, swap
from lightning_lwpm.training.building import initialise


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


class Averaged(EMAWeightAveraging):
    """Calls ``configure_model`` itself, before Lightning does."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        kept = [pl_module.net, self._average_model.module.net]
        assert all(is_lazy(net.blocks[0].weight) for net in kept) == (trainer.num_devices > 1)


def averaged(kwargs: dict[str, Any]) -> Any:
    return trained(kwargs | {"callbacks": [Averaged(decay=0.8)]}, lambda trainer: Configured())


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
    return trained(kwargs, lambda trainer: Parts("cpu" if stock(kwargs) else "meta"))


class GoesOn:
    """A model that is built on the meta device, or parts of one, and a checkpoint."""

    def __init__(self, path: str, function: str, kind: Any = Parts) -> None:
        self.path, self.function, self.kind = path, function, kind

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        torch.manual_seed(8)
        trainer = L.Trainer(**kwargs | {"max_epochs": 3})
        with small():
            module = self.kind("cpu") if stock(kwargs) else self.kind("meta")
            out = getattr(trainer, self.function)(module, DataLoader(data(32), 8), ckpt_path=self.path)
        return out or weights(module)


class Scaled(Parts):
    """With a parameter that only a checkpoint fills."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.head.scale = nn.Parameter(torch.ones(3, device=device))


def scaled(kwargs: dict[str, Any]) -> None:
    trainer = L.Trainer(**kwargs | {"max_epochs": 1})
    trainer.fit(Scaled(), DataLoader(data(32), 8))
    trainer.save_checkpoint(trainer.default_root_dir + "/end.ckpt")


def test_on_the_meta_device_from_a_checkpoint(runs: Runs) -> None:
    runs.on(0, scaled, folder="scaled")
    for function in ("fit", "test"):
        goes_on = GoesOn(str(runs.folder / "scaled" / "end.ckpt"), function, Scaled)
        expected = runs.on(0, goes_on)[0]
        for world in (1, 2):
            same(expected, runs.on(world, goes_on)[0], f"{function}, {world}")


@pytest.mark.parametrize("scenario", [configured, averaged, differently_seeded, init_module, on_meta])
def test_like_one_device(runs: Runs, scenario: Any) -> None:
    expected = runs.on(0, scenario)[0]
    for world in (1, 3) if scenario is configured else (2,):
        for rank, found in enumerate(runs.on(world, scenario, costs="measured" if world == 3 else "estimated")):
            same(expected, found, f"rank {rank} of {world}")


class Pretrained(L.LightningModule):
    """Weights from the shards of a published model."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = GPT2LMHeadModel.from_pretrained(self.folder)

    def on_train_start(self) -> None:
        held = {n: p for n, p in self.net.named_parameters() if not is_placeholder(p)}
        self.mapped = {name: bool(mapped_file(parameter)) for name, parameter in held.items()}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that the kernel reads a tensor's values from, where they are touched."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split()[5] if "safetensors" in line else ""
    return ""


class FromShards:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        module = Pretrained(self.folder)
        batches = DataLoader(torch.arange(64).view(8, 8) % 60, 4, collate_fn=lambda rows: (torch.stack(rows),))
        L.Trainer(**kwargs, max_epochs=1).fit(module, batches)
        return weights(module), module.mapped


def test_safetensors_shards(runs: Runs) -> None:
    """Mapped, and read by rank 0, which sends the others their share; nobody holds a copy of the model."""
    folder = runs.folder / "shards"
    torch.manual_seed(5)
    config = {"n_layer": 3, "n_embd": 32, "n_head": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2LMHeadModel(GPT2Config(**config, **still)).save_pretrained(folder, max_shard_size="40KB")
    files = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert len(files) > 2
    expected, _ = runs.on(0, FromShards(folder))[0]
    for rank, (found, mapped) in enumerate(runs.on(2, FromShards(folder))):
        same(expected, found, f"rank {rank}")
        assert all(mapped.values()), "in the memory of the file"
        assert 0 < len(mapped) < len(expected) - 10, "its share"
    assert files == {path: path.read_bytes() for path in files}


def refused(kwargs: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        L.Trainer(**kwargs).fit(Empty(), train_loader(32))
    return str(caught.value)


@pytest.mark.parametrize("public", [False, True])
def test_attention_on_the_meta_device(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.MultiheadAttention, "reset_parameters", raising=False)
    if public:  # as after an import of Lightning's demonstration of a transformer
        private = nn.MultiheadAttention._reset_parameters
        monkeypatch.setattr(nn.MultiheadAttention, "reset_parameters", private, raising=False)
    torch.manual_seed(3)
    expected = nn.Sequential(nn.MultiheadAttention(32, 4), nn.TransformerEncoderLayer(32, 2, 40))
    with torch.device("meta"):
        found = nn.Sequential(nn.MultiheadAttention(32, 4), nn.TransformerEncoderLayer(32, 2, 40))
        whole = nn.Transformer(32, 2, 1, 1, 40)
    torch.manual_seed(3)
    for module in (found, whole):
        initialise(module)
        swap(module, lambda _, tensor: realised(tensor))
    same(dict(named_tensors(expected)), dict(named_tensors(found)))
    assert whole.encoder.layers[0].linear1.weight.abs().max() > 32**-0.5, "drawn anew by the transformer, more widely"


def test_metrics_on_the_meta_device_are_named() -> None:
    with torch.device("meta"):
        module = Classifier()
    with pytest.raises(ConfigurationError, match=r"'train_acc' \(MulticlassAccuracy\), 'val_acc'.*outside of"):
        initialise(module)


def test_what_nothing_fills_is_named(runs: Runs) -> None:
    for message in runs.on(2, refused):
        assert "'blocks.1.scale'" in message and "1 parameters or buffers of Empty" in message


@pytest.mark.parametrize(
    "build",
    [
        Net,
        lambda: nn.LSTM(20, 20),
        lambda: nn.Sequential(*(wrap(nn.Linear(20, 20)) for wrap in (spectral_norm, orthogonal, weight_norm))),
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
    twins = [built, copy.deepcopy(built)]
    if not any(map(is_parametrized, built.modules())):  # torch does not pickle them
        twins.append(pickle.loads(pickle.dumps(built)))
    for module in twins:
        swap(module, lambda _, tensor: realised(tensor))
        same(dict(named_tensors(expected)), dict(named_tensors(module)))
        assert [p.requires_grad for p in expected.parameters()] == [p.requires_grad for p in module.parameters()]
