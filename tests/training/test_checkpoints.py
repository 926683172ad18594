"""Checkpoints: the file of several ranks is the one of one device, and each resumes the other's."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from training.modules import Classifier, data
from training.runs import Runs, same, weights


class Tied(Classifier):
    """BatchNorm, and a weight used at both ends."""

    def __init__(self) -> None:
        super().__init__(width=6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.inlet.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(self.last(self.inlet(x))))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def train(kwargs: dict[str, Any], kind: Any, save: str, resume: str | None, epochs: int) -> dict[str, torch.Tensor]:
    """Train up to some epoch, from a checkpoint if one is named; save and return the weights."""
    L.seed_everything(5)
    module = kind()
    trainer = L.Trainer(**kwargs, max_epochs=epochs)
    trainer.fit(module, DataLoader(data(32), 8), ckpt_path=resume)
    trainer.save_checkpoint(save)
    return weights(module)


class Saved:
    """A scenario with arguments, named for the store of results."""

    def __init__(self, kind: Any, save: str, resume: str | None = None, epochs: int = 2) -> None:
        self.arguments = kind, save, resume, epochs

    def __call__(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return train(kwargs, *self.arguments)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", [Classifier, Tied])
def test_the_file_is_the_one_of_one_device(runs: Runs, world: int, kind: Any) -> None:
    one, many = str(runs.folder / f"{kind.__name__}-1.ckpt"), str(runs.folder / f"{kind.__name__}-{world}.ckpt")
    runs.on(0, Saved(kind, one))
    runs.on(world, Saved(kind, many))
    expected, found = (torch.load(path, weights_only=False) for path in (one, many))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops"):
        same(_plain(expected[key]), _plain(found[key]), key)
    assert list(expected) == list(found)
    loaded = kind.load_from_checkpoint(many)
    same({n: t for n, t in expected["state_dict"].items()}, weights(loaded))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_resume_on_another_number_of_ranks(runs: Runs, before: int, after: int) -> None:
    """What one run would have computed without a break."""
    half = str(runs.folder / f"half-{before}-{after}.ckpt")
    whole = runs.on(0, Saved(Tied, str(runs.folder / "whole.ckpt"), None, 4))[0]
    runs.on(before if before > 1 else 0, Saved(Tied, half, None, 2))
    resumed = runs.on(after if after > 1 else 0, Saved(Tied, str(runs.folder / "end.ckpt"), half, 4))
    for rank, found in enumerate(resumed):
        same(whole, found, f"rank {rank}")


def _plain(value: Any) -> Any:
    """Containers as plain dicts and lists, so that only content and order are compared."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
