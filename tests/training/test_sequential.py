"""schedule="sequential": every rank runs the whole step, in turns, with the numbers, hooks and words of one device."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from training.modules import Classifier, Keeper, Recorder, data, train_loader, val_loader
from training.runs import Runs, metrics, same, stock, weights


class Sampling(Classifier):
    """What no pipeline can run, in some batches, by chance in others: the model again, on its own output; no loss.

    With dropout, BatchNorm, weights between layers, tied ones, a norm over all of them, a state that it keeps for the
    next batch, a metric that it reads, and a `backward` of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(12), nn.Dropout(0.3)
        self.place = nn.Parameter(torch.randn(6))
        self.blocks[3][0].weight = self.blocks[0][0].weight  # as tied embeddings
        self.memory: Tensor
        self.register_buffer("memory", torch.zeros(1, 12))
        self.before = torch.zeros(3)
        self.names: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x + self.place)
        for block in self.blocks:
            h = h + self.drop(block(h))
        return self.head(self.norm(h) + self.memory) + self.before.to(x.device)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.names.append(("step", batch_idx))
        out = super().training_step(batch, batch_idx)
        if torch.rand(()) < 0.4:
            own = self(out["loss"].detach() + batch[0].roll(1, 0))
            out["loss"] = out["loss"] + 0.1 * self(own.repeat(1, 2)).square().mean()
            out["loss"] = out["loss"] + 1e-3 * sum(p.square().sum() for p in self.parameters())
            self.log("again", out["loss"] * self.train_acc.compute())
        self.before = out["mean"].detach() * torch.ones_like(batch[0][0, :3])
        if batch_idx % 4 == 2:
            return None
        hidden = self.inlet(batch[0])
        self.memory = hidden.mean(0, keepdim=True).detach()
        if batch_idx % 3:
            out["loss"] = out["loss"] + 0.01 * self.blocks[0](hidden).square().mean()
            return {"loss": out["loss"], "hidden": hidden}
        return out

    def on_train_epoch_start(self) -> None:
        self.before = torch.zeros(3)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.names.append(("backward", float(loss)))
        (0.7 * loss).backward(*args, **kwargs)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.names.append("before zero_grad")

    def on_before_backward(self, loss: Tensor) -> None:
        self.names.append(("before backward", float(loss)))

    def on_after_backward(self) -> None:
        self.names.append(("after backward", float(self.head.weight.grad.norm().nan_to_num())))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        total = sum(float(p.grad.square().sum()) for p in self.parameters() if p.grad is not None)
        total = total if total < 1e30 else -1.0  # they overflow
        self.names.append(("before step", total))
        self.log("gradients", total)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.names.append("zero_grad")
        optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/drawn", (self(batch[0] + torch.randn_like(batch[0]))).norm())
        return super().validation_step(batch, batch_idx)


def fit(kwargs: dict[str, Any], kind: Any, train: Any = None, **more: Any) -> Any:
    L.seed_everything(5)
    module, recorder, keeper = kind(), Recorder(), Keeper()
    callbacks = [keeper, *more.pop("callbacks", [])]
    options = {"max_epochs": 2, "logger": recorder, "log_every_n_steps": 1, "callbacks": callbacks, **more}
    trainer = L.Trainer(**kwargs | options)
    trainer.fit(module, train_loader(44) if train is None else train, DataLoader(data(24), 8))
    found = {"weights": weights(module), "metrics": metrics(trainer), "steps": trainer.global_step}
    found |= {"hooks": keeper.names, "outputs": keeper.outputs, "names": getattr(module, "names", [])}
    return {**found, "rows": recorder.rows, "next": torch.rand(2)}


def sampling(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, Sampling)


def scaled(kwargs: dict[str, Any]) -> Any:
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2))]
    return fit(kwargs, Sampling, plugins=plugins, accumulate_grad_batches=2, gradient_clip_val=0.3)


class Penalised(Sampling):
    """A slope in the step, a layer that only some batches call, a toggled optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        out = super().training_step(batch, batch_idx)
        self.untoggle_optimizer(optimizer)
        if out is None:
            return None
        hidden = self.norm(out["hidden"].detach() if "hidden" in out else torch.ones_like(batch[0]).repeat(1, 2))
        leaf = hidden.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.head(leaf).sum(), leaf, create_graph=True)
        out["loss"] = out["loss"] + 0.1 * slope.square().mean()
        if batch_idx % 2:
            out["loss"] = out["loss"] + self.seldom(self.head(leaf)).square().mean()
        return out


def penalised(kwargs: dict[str, Any]) -> Any:
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)
    return fit(kwargs, Penalised, precision="bf16-mixed", max_epochs=3, callbacks=[averaging])


class Pulling(Classifier):
    """Takes several batches a step itself, and another number of them in evaluation."""

    def both(self, dataloader_iter: Any) -> Any:
        taken = [next(dataloader_iter)[0] for _ in range(2 if self.training else 3)]
        return [torch.cat([part[i] for part in taken]).to(self.device) for i in range(2)]

    def training_step(self, dataloader_iter: Any) -> Any:
        loss, out, y = self.loss(self.both(dataloader_iter))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(y))
        return {"loss": loss, "out": out}

    def validation_step(self, dataloader_iter: Any) -> None:
        loss, out, y = self.loss(self.both(dataloader_iter))
        self.outputs.append(out)
        self.val_acc.update(out, y)
        self.log("val/loss", loss, batch_size=len(y))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data(40))


def pulling(kwargs: dict[str, Any], train: Any = None) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit(kwargs, Pulling, train, num_sanity_val_steps=0)
    told = [str(w.message) for w in caught if "`training_step` takes several batches" in str(w.message)]
    assert all('schedule="sequential"' in text for text in told)
    return {**found, "told": len(told)}


def streaming(kwargs: dict[str, Any]) -> Any:
    return pulling(kwargs, DataLoader(Stream(), 8))


def alike(runs: Runs, scenario: Any, world: int, **options: Any) -> None:
    """Every rank finds what one device finds."""
    expected = runs.one(scenario)
    for rank, found in enumerate(runs.on(world, scenario, schedule="sequential", **options)):
        if rank:
            found["rows"] = expected["rows"]
        same(expected, found, f"rank {rank} of {world}")


@pytest.mark.parametrize(("scenario", "world"), [(sampling, 1), (sampling, 2), (sampling, 3), (scaled, 2)])
def test_numbers_of_one_device(runs: Runs, scenario: Any, world: int) -> None:
    alike(runs, scenario, world)


def test_with_activation_checkpointing(runs: Runs) -> None:
    alike(runs, penalised, 2, activation_checkpointing="layer", partition=["norm"])


@pytest.mark.parametrize(("scenario", "world"), [(pulling, 2), (streaming, 3)])
def test_several_batches_a_step(runs: Runs, scenario: Any, world: int) -> None:
    """`schedule="auto"` sees it, and says so once."""
    expected = runs.one(scenario)
    for rank, found in enumerate(runs.on(world, scenario, "auto")):
        found["rows"] = expected["rows"] if rank else found["rows"]
        same({**expected, "told": int(rank == 0)}, found, f"rank {rank}")


class Resumed:
    """Trains up to some epoch, from a checkpoint if one is named; evaluates, saves, and writes its plan."""

    def __init__(self, epochs: int, resume: str | None = None) -> None:
        self.epochs, self.resume = epochs, resume

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module, folder = Sampling(), kwargs["default_root_dir"]
        trainer = L.Trainer(**kwargs | {"max_epochs": self.epochs})
        trainer.fit(module, train_loader(44), val_loader(), ckpt_path=self.resume)
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        if not stock(kwargs) and trainer.is_global_zero:
            trainer.strategy.plan.save(f"{folder}/plan.yaml")
        validated = trainer.validate(module, val_loader(), verbose=False)
        predicted = trainer.predict(module, val_loader())
        return weights(module), validated, torch.cat(predicted) if trainer.is_global_zero else None


def test_resumes_on_another_number_of_ranks(runs: Runs) -> None:
    """With the random numbers of a run without a break; the plan's file says that ranks take turns."""
    whole = runs.on(0, Resumed(2))[0]
    runs.on(2, Resumed(1), schedule="sequential", folder="half-in-turns")
    folder = runs.folder / "half-in-turns"
    resume = Resumed(2, str(folder / "last.ckpt"))
    resumed = runs.on(3, resume, schedule="sequential")
    same(whole, resumed[0])
    same(whole[:2], resumed[-1][:2])
    same(whole, runs.on(2, resume, "auto", partition=str(folder / "plan.yaml"))[0])
