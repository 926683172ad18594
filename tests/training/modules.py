"""Small LightningModules, data and recorders for the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_lwpm.staging import lazy


def data(samples: int = 40, features: int = 6, classes: int = 3) -> TensorDataset:
    """Samples that a small network can tell apart; the same ones whatever has been drawn before."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, x[:, :classes].argmax(1))


def train_loader(samples: int = 40, batch_size: int = 8, **kwargs: Any) -> DataLoader:
    return DataLoader(data(samples), batch_size, shuffle=True, **kwargs)


def val_loader(samples: int = 20, batch_size: int = 8) -> DataLoader:
    return DataLoader(data(samples), batch_size)


@contextmanager
def small(limit: int = 64) -> Iterator[None]:
    """Let tensors of over so many bytes be lazy ones, where a model is built lazily."""
    before, lazy.SMALL_BYTES = lazy.SMALL_BYTES, limit
    try:
        yield
    finally:
        lazy.SMALL_BYTES = before


class Classifier(L.LightningModule):
    """A residual network with the idioms of many projects around it."""

    def __init__(self, width: int = 12, depth: int = 4, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inlet = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.train_acc, self.val_acc = MulticlassAccuracy(3), MulticlassAccuracy(3)
        self.best = MaxMetric()
        self.outputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)

    def loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y = batch
        out = self(x)
        return nn.functional.cross_entropy(out, y), out, y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, out, y = self.loss(batch)
        self.train_acc(out, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return {"loss": loss, "preds": out.argmax(1), "mean": out.mean()}

    def on_validation_epoch_start(self) -> None:
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss, out, y = self.loss(batch)
        self.val_acc.update(out, y)
        self.outputs.append(out)
        self.log("val/loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_end(self) -> None:
        acc = self.val_acc.compute()
        self.best(acc)
        self.log("val/acc", acc)
        self.log("val/best", self.best.compute())
        self.log("val/spread", torch.cat(self.outputs).std())
        self.val_acc.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        loss, out, y = self.loss(batch)
        self.val_acc(out, y)
        self.log_dict({"test/loss": loss, "test/acc": self.val_acc})

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Recorder(Logger):
    """Keeps everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(sorted(metrics.items()))))

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class Keeper(L.Callback):
    """Keeps what each step returned and which hooks ran."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.names.append("on_train_batch_end")
        self.outputs.append({k: v.detach().clone() for k, v in outputs.items()})


def _hook(name: str) -> Any:
    def note(self: Keeper, *_: Any, **__: Any) -> None:
        self.names.append(name)

    return note


for _name in dir(L.Callback):
    if _name.startswith(("on_", "setup", "teardown")) and _name not in (
        *Keeper.__dict__,
        "on_save_checkpoint",
        "on_load_checkpoint",
        "on_exception",
    ):
        setattr(Keeper, _name, _hook(_name))
