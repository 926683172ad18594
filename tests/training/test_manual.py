"""Manual optimization: the user's step makes backward passes and steps by itself, with the numbers of one device."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training.modules import Classifier, Recorder, data, train_loader, val_loader
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
            self.log("norm", norm.nan_to_num())
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


class Penalised(Gan):
    """A gradient penalty; a layer that is called again after another rank's, with a way around that; large batches."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(1024, 6)
        self.refine = nn.Linear(6, 6)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        real = self.inlet(batch[0])
        hidden = self.refine(real)
        fake = torch.tanh(self.inlet(hidden.repeat(1, 171)[:, :1024]) + hidden)
        share = torch.rand(len(real), 1, device=real.device)
        between = (share * real + (1 - share) * fake).detach().requires_grad_()
        answer = self.discriminator(between)
        (slope,) = torch.autograd.grad(answer.sum(), between, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        loss = self.loss(real, True) + self.loss(fake, False) + 0.1 * penalty
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()
        self.log("penalty", penalty)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("real", self.loss(batch[0], True))

    def configure_optimizers(self) -> Any:
        own = [*self.inlet.parameters(), *self.refine.parameters()]
        return [torch.optim.SGD(own, lr=0.05), torch.optim.SGD(self.discriminator.parameters(), lr=0.05)]


def fit(kwargs: dict[str, Any], kind: Any, **more: Any) -> Any:
    L.seed_everything(5)
    module, recorder = kind(), Recorder()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "logger": recorder, "log_every_n_steps": 1} | more)
    loader = train_loader(36)
    if kind is Penalised:
        loader = DataLoader(TensorDataset(torch.randn(20, 1024)), 8)
    trainer.fit(module, loader, None if kind is Penalised else val_loader())
    found = {"weights": weights(module), "metrics": metrics(trainer), "steps": trainer.global_step}
    return {**found, "hooks": getattr(module, "hooks", []), "rows": recorder.rows, "next": torch.rand(2)}


def scaled() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30))]}


CASES: dict[str, tuple[Any, Any]] = {
    "one optimizer": (ByHand, dict),
    "one optimizer, scaled": (ByHand, scaled),
    "two networks": (Gan, dict),
    "two networks, bf16": (Gan, lambda: {"precision": "bf16-mixed"}),
    "closures": (Wasserstein, dict),
    "penalty": (Penalised, dict),
}


class Fit:
    """One of the cases; runs are told apart by its name."""

    def __init__(self, name: str) -> None:
        self.case, self.__name__, self.__qualname__ = CASES[name], name, name

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        kind, more = self.case
        return fit(kwargs, kind, **more())


@pytest.mark.parametrize(("name", "world"), [*((name, 2) for name in CASES), ("two networks", 3), ("penalty", 3)])
def test_numbers_of_one_device(runs: Runs, name: str, world: int) -> None:
    expected = runs.one(Fit(name))
    results = runs.on(world, Fit(name))
    same(expected, results[0], "rank 0")
    for rank, found in enumerate(results[1:], 1):
        same({**expected, "rows": []}, {**found, "rows": []}, f"rank {rank}")


def test_one_process_is_stock_lightning(runs: Runs) -> None:
    same(runs.one(Fit("one optimizer")), runs.on(1, Fit("one optimizer"))[0])


class Resumed:
    """Trains up to some epoch, from a checkpoint if one is named; evaluates and saves."""

    def __init__(self, epochs: int, resume: str | None = None) -> None:
        self.epochs, self.resume, self.__qualname__ = epochs, resume, "resumed by hand"

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module = ByHand()
        trainer = L.Trainer(**kwargs | {"max_epochs": self.epochs})
        trainer.fit(module, DataLoader(data(32), 8), val_loader(), ckpt_path=self.resume)
        validated = trainer.validate(module, val_loader(), verbose=False)
        predicted = trainer.predict(module, val_loader())
        trainer.save_checkpoint(f"{kwargs['default_root_dir']}/last.ckpt")
        return weights(module), validated, torch.cat(predicted) if trainer.is_global_zero else None


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_resumes_on_another_number_of_ranks(runs: Runs, before: int, after: int) -> None:
    whole = runs.one(Resumed(4))
    runs.on(before, Resumed(2), folder=f"half-by-hand-{before}")
    resumed = runs.on(after, Resumed(4, str(runs.folder / f"half-by-hand-{before}" / "last.ckpt")))
    same(whole, resumed[0])
    same(whole[:2], resumed[-1][:2])
