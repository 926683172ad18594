"""Checkpoints of Lightning's other ways to train and to save, and of several stages a rank."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torch.utils.data import DataLoader
from training.modules import data
from training.runs import Runs, same, weights
from training.test_checkpoints import Continues, Saved, SavesBoth, Tied

from lightning_lwpm.cli import main


class Plain(L.LightningModule):
    """No metrics: under DDP those would be of both processes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Trains:
    """Trains up to some epoch, under plain DDP if that is asked for; from a checkpoint if one is named; saves."""

    def __init__(self, save: str, resume: str | None = None, epochs: int = 2, ddp: bool = False) -> None:
        self.save, self.resume, self.epochs, self.ddp = save, resume, epochs, ddp

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs["strategy"] = "ddp" if self.ddp else kwargs["strategy"]
        L.seed_everything(5)
        module = Plain()
        trainer = L.Trainer(**kwargs, max_epochs=self.epochs)
        loader = DataLoader(data(32), 4 if self.ddp else 8)
        trainer.fit(module, loader, ckpt_path=self.resume, weights_only=True)
        trainer.save_checkpoint(self.save)
        return {"weights": weights(module), "steps": trainer.global_step}


def test_plain_ddp(runs: Runs) -> None:
    """What DDP has saved goes on here as on one device, and what was saved here goes on under DDP as one device's."""
    one, here, ddp, end = (str(runs.folder / f"ddp-{name}.ckpt") for name in ("one", "here", "ddp", "end"))
    runs.on(2, Trains(ddp, ddp=True))
    expected = runs.on(0, Trains(end, ddp, 4))[0]
    for found in runs.on(2, Trains(end, ddp, 4)):
        same(expected, found)
    runs.on(0, Trains(one))
    runs.on(2, Trains(here))
    expected = runs.on(2, Trains(end, one, 4, ddp=True))
    for rank, found in enumerate(runs.on(2, Trains(end, here, 4, ddp=True))):
        same(expected[rank], found, f"rank {rank}")


class InTheBackground:
    """Saves after each step by Lightning's own plugin that writes on a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        del kwargs["enable_checkpointing"]
        keep = ModelCheckpoint(self.folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        L.seed_everything(5)
        L.Trainer(**kwargs, max_epochs=1, callbacks=[keep], plugins=[AsyncCheckpointIO()]).fit(
            Plain(), DataLoader(data(32), 8)
        )


def test_lightnings_plugin_that_saves_in_the_background(runs: Runs) -> None:
    """Training goes on while a file is written, and none of it is in the file."""
    folders = [runs.folder / f"background-{kind}" for kind in ("one", "two")]
    for world, folder in zip((0, 2), folders, strict=True):
        runs.on(world, InTheBackground(folder))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir()) == [f"step={n}.ckpt" for n in (1, 2, 3, 4)]
    for name in names:
        expected, found = (torch.load(folder / name, weights_only=True) for folder in folders)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
            same(expected[key], found[key], f"{name}: {key}")


def test_several_stages_a_rank(runs: Runs) -> None:
    """Saved by two ranks of two stages each, sharded and in a file; both go on as a run without a break."""
    runs.on(2, SavesBoth(Tied, runs.folder), virtual_stages=2)
    whole = runs.on(0, Saved(Tied, str(runs.folder / "whole.ckpt"), None, 3))[0]
    merged, shards = (str(runs.folder / f"saved-2.{kind}") for kind in ("ckpt", "shards"))
    for world, paths, options in (
        (0, [merged], {}),
        (2, [merged, shards], {}),
        (2, [shards], {"virtual_stages": 2}),
        (3, [shards], {}),
    ):
        for rank, ends in enumerate(runs.on(world, Continues(Tied, paths), **options)):
            for path, found in zip(paths, ends, strict=True):
                same(whole, found, f"{path} on rank {rank} of {world}")


class Composed(Plain):
    """Made of a module that it is given and keeps among its hyperparameters, as in many of Lightning's examples."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(backbone, nn.Linear(12, 3))


class Keeps:
    """Saves while it trains, and then goes on from that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        del kwargs["enable_checkpointing"]
        L.seed_everything(5)
        module = Composed(nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 12)))
        keep = ModelCheckpoint(self.folder, "kept", every_n_train_steps=3)
        trainer = L.Trainer(**kwargs, max_epochs=1, callbacks=[keep])
        for path in (None, self.folder / "kept.ckpt"):
            trainer.fit(module, DataLoader(data(32), 8), ckpt_path=path, weights_only=False)
        return weights(module)


def test_modules_among_the_hyperparameters(runs: Runs) -> None:
    """Their weights are in the file too, as on one device: once."""
    folders = {kind: runs.folder / f"composed-{kind}" for kind in ("stock", "full", "sharded")}
    expected = runs.on(0, Keeps(folders["stock"]))[0]
    for kind in ("full", "sharded"):
        for found in runs.on(2, Keeps(folders[kind]), state_dict_type=kind):
            same(expected, found, kind)
    files = [folders["stock"] / "kept.ckpt", folders["full"] / "kept.ckpt", runs.folder / "composed.ckpt"]
    main(["merge", str(folders["sharded"] / "kept.ckpt"), str(files[2]), "--trusted"])
    saved = [torch.load(path, weights_only=False) for path in files]
    backbones = [checkpoint["hyper_parameters"]["backbone"] for checkpoint in saved]
    for backbone in backbones:
        same(backbones[0].state_dict(), backbone.state_dict())
        assert all(parameter.requires_grad for parameter in backbone.parameters())
    for number in (0, 3):  # one of each rank
        for checkpoint, backbone in zip(saved[:2], backbones, strict=False):
            assert (
                checkpoint["state_dict"][f"layers.0.{number}.weight"].data_ptr() == backbone[number].weight.data_ptr()
            )
    loaded = Composed.load_from_checkpoint(files[1], weights_only=False)
    same(saved[0]["state_dict"], weights(loaded))
