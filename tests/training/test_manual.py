"""Manual optimization: the user's step makes backward passes and steps by itself, with the numbers of one device."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, weights


class ByHand(Classifier):
    """One optimizer: accumulates, clips, toggles and schedules by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hooks: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        out = super().training_step(batch, batch_idx)
        self.manual_backward(out["loss"] / 2)
        if batch_idx % 2:
            if out["loss"].item() > 0.5:
                self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            norm = torch.nn.utils.clip_grad_norm_(self.blocks.parameters(), 0.1)
            self.log("norm", norm)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return out

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.hooks.append(f"before backward {loss.item():.6f}")

    def on_after_backward(self) -> None:
        self.hooks.append("after backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.append(f"before step {optimizer.param_groups[0]['lr']:.6f}")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Gan(L.LightningModule):
    """Two networks and two optimizers, as in Lightning's own example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, images: torch.Tensor, real: bool) -> torch.Tensor:
        answer = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(answer, torch.full_like(answer, float(real)))

    def noise(self, batch: Any) -> torch.Tensor:
        return torch.randn(len(batch[0]), 4).type_as(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        z = self.noise(batch)
        self.toggle_optimizer(first)
        loss = self.loss(self.generator(z), True)
        self.log("g", loss, prog_bar=True, on_step=True, on_epoch=True)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)

        self.toggle_optimizer(second)
        loss = (self.loss(batch[0], True) + self.loss(self.generator(z).detach(), False)) / 2
        second.zero_grad()
        self.manual_backward(loss)
        if loss > 0.6:
            second.step()
        self.untoggle_optimizer(second)
        self.log_dict(
            {"d": loss, "random": torch.rand(()) if self.trainer.is_global_zero else 0.0} if False else {"d": loss}
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("real", self.loss(batch[0], True))
        self.log("fake", self.loss(self.generator(self.noise(batch)), False))

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        return [first, torch.optim.AdamW(self.discriminator.parameters(), lr=0.02)], []


class Wasserstein(Gan):
    """Clips weights by hand, steps in closures and without Lightning's wrappers, accumulates over two losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers(use_pl_optimizer=False)
        wrapped = self.optimizers()[0]
        fake = self.generator(self.noise(batch))
        second.zero_grad(set_to_none=False)
        self.manual_backward(self.discriminator(fake.detach()).mean())
        self.manual_backward(-self.discriminator(batch[0]).mean())
        second.step()
        for parameter in self.discriminator.parameters():
            parameter.data.clamp_(-0.1, 0.1)

        def closure() -> torch.Tensor:
            loss = -self.discriminator(self.generator(self.noise(batch))).mean()
            first.zero_grad()
            self.manual_backward(loss)
            return loss

        wrapped.step(closure=closure)
        return {"loss": self.discriminator(fake).mean(), "kind": "critic"}


def fit(kwargs: dict[str, Any], kind: Any, **more: Any) -> Any:
    L.seed_everything(5)
    module, recorder = kind(), Recorder()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "logger": recorder, "log_every_n_steps": 1} | more)
    trainer.fit(module, train_loader(36), val_loader())
    found = {"weights": weights(module), "metrics": metrics(trainer), "steps": trainer.global_step}
    return {**found, "hooks": getattr(module, "hooks", []), "rows": recorder.rows, "next": torch.rand(2)}


def by_hand(kwargs):
    return fit(kwargs, ByHand)


def gan(kwargs):
    return fit(kwargs, Gan)


def wasserstein(kwargs):
    return fit(kwargs, Wasserstein)


@pytest.mark.parametrize("scenario", [by_hand, gan, wasserstein])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_numbers_of_one_device(runs: Runs, scenario: Any, world: int) -> None:
    expected = runs.one(scenario)
    results = runs.on(world, scenario)
    same(expected, results[0], "rank 0")
    for rank, found in enumerate(results[1:], 1):
        same({**expected, "rows": []}, {**found, "rows": []}, f"rank {rank}")
