"""Hooks that come between batches use the whole model on every rank, or on rank 0 alone, as they do on one device."""

import functools
import io
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from pool import WorkerError
from torch import nn
from training.modules import Classifier, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

_HOOKS = "on_train_start on_train_epoch_start on_train_epoch_end on_validation_start on_validation_end on_train_end"


class Everywhere(L.Callback):
    """Does on every rank what projects do: norms, arrays, samples of the model, averages, checkpoints."""

    def __init__(self, folder: str) -> None:
        self.told: list[Any] = []
        self.shadow: dict[str, torch.Tensor] = {}
        self.folder = folder

    def look(self, pl_module: Any) -> None:
        self.told += [p.norm().item() for p in pl_module.parameters()]
        self.told += [p.detach().cpu().numpy().sum() for p in pl_module.parameters()]
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            out = pl_module(data().tensors[0])
        pl_module.train(training)
        self.told += [out, nn.utils.parameters_to_vector(pl_module.parameters())]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.shadow = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        self.look(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)
        pl_module.log("norm", pl_module.head.weight.norm()) if trainer.state.stage == "validate" else None

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("largest", max(p.abs().max() for p in pl_module.parameters()))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)
        for name, tensor in pl_module.state_dict().items():
            if tensor.is_floating_point():
                self.shadow[name].mul_(0.9).add_(tensor, alpha=0.1)
        path = f"{self.folder}/{trainer.current_epoch}.ckpt"
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=False)["state_dict"]
        for name, tensor in pl_module.state_dict().items():
            self.told.append((name, (tensor - saved[name]).abs().max().item()))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(pl_module)
        pl_module.load_state_dict(self.shadow)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1.5)


def everywhere(kwargs: dict[str, Any], kind: type[Classifier] = Classifier) -> Any:
    L.seed_everything(5)
    callback, module = Everywhere(kwargs["default_root_dir"]), kind()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [callback]})
    trainer.fit(module, train_loader(20), val_loader())
    return metrics(trainer), weights(module), callback.told


def test_every_rank(runs: Runs) -> None:
    expected = runs.one(everywhere)
    for world in (2, 3):
        for rank, found in enumerate(runs.on(world, everywhere)):
            same(expected, found, f"rank {rank} of {world}")


class OnRankZero(L.Callback):
    """The same under `rank_zero_only`, and the model saved as a whole."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    @rank_zero_only
    def look(self, trainer: Any, pl_module: Any) -> None:
        self.told += [float(p.norm()) for p in pl_module.parameters()]
        self.told += [(name, p.detach().cpu().numpy().tolist()) for name, p in pl_module.named_parameters()]
        pl_module.eval()
        with torch.no_grad():
            self.told.append(pl_module(data().tensors[0]))
        pl_module.train()
        for saved in (pl_module.state_dict(), trainer.strategy.lightning_module_state_dict(), pl_module.blocks):
            stream = io.BytesIO()
            torch.save(saved, stream)
            stream.seek(0)
            again = torch.load(stream, weights_only=False)
            self.told.append(again if isinstance(again, dict) else again.state_dict())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.look(trainer, pl_module)


def on_rank_zero(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    callback, module = OnRankZero(), Classifier()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [callback]})
    trainer.fit(module, train_loader(20), val_loader())
    return metrics(trainer), weights(module), [dict(t) if isinstance(t, dict) else t for t in callback.told]


def test_rank_zero_alone(runs: Runs) -> None:
    expected = runs.one(on_rank_zero)
    for world in (2, 3):
        found = runs.on(world, on_rank_zero)[0]
        same(expected, found, f"{world} ranks")


class Scaling(L.Callback):
    """Changes weights on one rank only."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == self.rank:
            for name, parameter in pl_module.named_parameters():
                if name.startswith(self.name):
                    parameter.data.mul_(2)


def scaling(kwargs: dict[str, Any], rank: int, name: str) -> None:
    trainer = L.Trainer(**kwargs | {"max_epochs": 1, "callbacks": [Scaling(rank, name)]})
    trainer.fit(Classifier(), train_loader(20))


@pytest.mark.parametrize("name", ["inlet", "head"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_cannot_change_weights_alone(runs: Runs, rank: int, name: str) -> None:
    message = rf"`on_train_epoch_end` of Scaling changes gradients or weights on rank {rank}.*on every rank"
    with pytest.raises(WorkerError, match=message):
        runs.on(2, functools.partial(scaling, rank=rank, name=name))
