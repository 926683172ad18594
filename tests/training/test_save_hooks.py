"""What hooks put into checkpoints and read from them, and what is kept beside the model, is what one device has."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from training.modules import Classifier, data
from training.runs import Runs, same, stock, weights

from lightning_lwpm.cli import main


class Hooked(Classifier):
    """Looks at weights, adds some, renames them and leaves one out."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["norms"] = {name: float(v.float().norm()) for name, v in state.items() if v.is_floating_point()}
        checkpoint["half"] = {name: v.half() for name, v in state.items() if name.startswith(("inlet", "head"))}
        checkpoint["vector"] = torch.cat([p.detach().flatten() for p in self.parameters()])
        checkpoint["listed"] = self.inlet.weight.detach().numpy().tolist()
        state.pop("blocks.0.0.bias")
        checkpoint["state_dict"] = {f"model.{name}": v for name, v in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {name.removeprefix("model."): v for name, v in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {**state, "blocks.0.0.bias": torch.full((12,), 0.25)}


class Averages:
    """An object with a list of averages, as in packages for them."""

    def __init__(self) -> None:
        self.shadows: list[torch.Tensor] = []

    def update(self, parameters: Any) -> None:
        parameters = [parameter.detach() for parameter in parameters]
        self.shadows = self.shadows or [parameter.clone() for parameter in parameters]
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            shadow.mul_(0.5).add_(parameter, alpha=0.5)


class Averaging(L.Callback):
    """Averages after each batch; saved, read while saving, put into the model at the end."""

    def __init__(self) -> None:
        self.shadow: dict[str, torch.Tensor] = {}
        self.others = Averages()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.others.update(pl_module.parameters())
        for name, tensor in pl_module.state_dict().items():
            if tensor.is_floating_point():
                self.shadow.setdefault(name, tensor.clone()).mul_(0.9).add_(tensor, alpha=0.1)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = pl_module.state_dict()
        checkpoint["shadow"], checkpoint["shadows"] = self.shadow, self.others.shadows
        checkpoint["apart"] = {name: (v - state[name]).abs().max().item() for name, v in self.shadow.items()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.shadow, self.others.shadows = dict(checkpoint["shadow"]), list(checkpoint["shadows"])

    def state_dict(self) -> dict[str, Any]:
        return {"means": {name: tensor.mean() for name, tensor in self.shadow.items()}}

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended = {name: float(tensor.norm()) for name, tensor in self.shadow.items()}, self.others.shadows
        pl_module.load_state_dict(self.shadow, strict=False)


class Fits:
    """Saves while it trains, goes on from what was saved, and from there without it."""

    def __init__(self, folder: Path, kind: str, resume: Path | None = None) -> None:
        self.folder, self.kind, self.resume = folder, kind, resume

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        del kwargs["enable_checkpointing"]
        averaging, keep = Averaging(), ModelCheckpoint(self.folder, "a", every_n_train_steps=3)
        if not stock(kwargs):
            kwargs["strategy"].state_dict_type = self.kind
        trainer, module, ends = L.Trainer(**kwargs, max_epochs=2, callbacks=[averaging, keep]), Hooked(), []
        for epochs, path in ((2, None), (3, self.folder / "a.ckpt"), (4, None)):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, DataLoader(data(32), 8), ckpt_path=path, weights_only=True)
            ends.append((weights(module), averaging.ended))
        return ends


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_hooks_of_checkpoints(runs: Runs, kind: str) -> None:
    folders = [runs.folder / f"hooks-{kind}-{name}" for name in ("one", "two")]
    expected = runs.on(0, Fits(folders[0], kind))[0]
    for rank, found in enumerate(runs.on(2, Fits(folders[1], kind))):
        same(expected, found, f"rank {rank}")
    paths = [folder / "a.ckpt" for folder in folders]
    if kind == "sharded":
        main(["merge", str(paths[1]), str(folders[1] / "merged.ckpt"), "--trusted"])
        paths[1] = folders[1] / "merged.ckpt"
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert [*one, "random_states"] == list(two)
    for name in ("state_dict", "norms", "half", "vector", "listed", "shadow", "shadows", "apart", "optimizer_states"):
        same(dict(one)[name], dict(two)[name], name)
    same(one["callbacks"]["Averaging"], two["callbacks"]["Averaging"])


class Best(L.Callback):
    """Copies the weights after each epoch, on every rank or on rank 0 alone; they are put back after the run."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0 and not (self.alone and trainer.global_rank):
            self.best = copy.deepcopy(trainer.strategy.lightning_module_state_dict())


class PutsBack:
    def __init__(self, alone: bool) -> None:
        self.alone = alone

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module, best = Classifier(), Best(self.alone)
        L.Trainer(**kwargs, max_epochs=2, callbacks=[best]).fit(module, DataLoader(data(32), 8))
        if hasattr(best, "best"):
            try:
                module.load_state_dict(best.best)
            except RuntimeError as error:
                return str(error)
        return weights(module)


def test_copies_of_weights(runs: Runs) -> None:
    expected = runs.on(0, PutsBack(False))[0]
    for found in runs.on(2, PutsBack(False)):
        same(expected, found)
    assert "on rank 0 alone" in runs.on(2, PutsBack(True))[0]
