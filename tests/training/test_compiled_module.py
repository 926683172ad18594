"""Training of what ``torch.compile`` returns, and of modules with compiled parts."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from training.modules import train_loader, val_loader
from training.runs import Runs, metrics, same, weights


class Body(nn.Module):
    """Blocks with code between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Plain(L.LightningModule):
    """A module without metrics: the compiler fails in those of torchmetrics."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.body, self.head = nn.Linear(6, 12), Body(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.inlet(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Parts(Plain):
    """A compiled model that is cut, and a layer compiled in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager", dynamic=False)
        self.head.compile(backend="eager", dynamic=False)


def fit(kwargs: dict[str, Any], whole: bool) -> dict[str, Any]:
    """Train, with a checkpoint, and evaluate."""
    torch._dynamo.reset()
    L.seed_everything(5)
    module: Any = Plain() if whole else Parts()
    keeper = ModelCheckpoint(kwargs["default_root_dir"], "last")
    trainer = L.Trainer(**{**kwargs, "enable_checkpointing": True}, max_epochs=2, callbacks=[keeper])
    given = torch.compile(module, backend="eager", dynamic=False) if whole else module
    trainer.fit(given, train_loader(36), val_loader())
    saved = torch.load(Path(kwargs["default_root_dir"]) / "last.ckpt", weights_only=True)["state_dict"]
    return {"weights": weights(module), "metrics": metrics(trainer), "saved": saved}


def fit_whole(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The whole LightningModule, compiled."""
    return fit(kwargs, whole=True)


def fit_parts(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A LightningModule with compiled parts, one of which is cut."""
    return fit(kwargs, whole=False)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scenario", [fit_whole, fit_parts])
def test_fit(runs: Runs, scenario: Any, world: int) -> None:
    expected = runs.one(scenario, 2)
    names = list(expected["saved"])
    assert any("_orig_mod" in name for name in names) == (scenario is fit_parts)
    for rank, result in enumerate(runs.on(world, scenario, 2, partition=["body.blocks.1", "head"][: world - 1])):
        same(expected, result, f"rank {rank}")
