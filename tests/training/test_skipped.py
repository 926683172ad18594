"""A `training_step` that returns None: the numbers of one device that accumulates the same micro-batches."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training.modules import Recorder, data
from training.runs import Runs, metrics, same, stock, weights

# how each micro-batch of two samples is skipped: not at all, before the first layer, between layers, after the last
PATTERN = [1, 0, 0, 2, 3, 0, 0, 0, 1, 3, 2, 2, 0, 1, 0, 0, 1, 1]


class Skipping(L.LightningModule):
    """Leaves samples out for several reasons, at several places."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(12, 3)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, how = batch
        if (how == 1).all():
            return None
        h = self.inlet(x)
        for block in self.blocks:
            h = h + block(h)
            h = h / (how != 2)[:, None]
            if not h.isfinite().all():
                return None
        loss = nn.functional.cross_entropy(self.head(h), y) / (how != 3).all()
        if loss.isinf():
            self.log("lost", 1.0, reduce_fx="sum")
            return None
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss, "rows": y + 1}

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen.append("zero_grad")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([None if p.grad is None else float(p.grad.norm()) for p in self.parameters()])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.seen.append("scheduler")
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class Outputs(L.Callback):
    """Notes what hooks of callbacks are given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append("backward")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(dict(outputs))


class Fit:
    """A scenario with arguments; runs are told apart by its name.

    Args:
        micro: Micro-batches of a batch.
        name: Of the variant.
        more: Options of the trainer.
    """

    def __init__(self, micro: int, name: str = "", **more: Any) -> None:
        self.micro, self.more = micro, more
        self.__name__ = self.__qualname__ = f"skipped-{micro}-{name}"

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        L.seed_everything(5)
        module, outputs, rows = Skipping(), Outputs(), Recorder()
        more = {"accumulate_grad_batches": 1, "logger": rows, "log_every_n_steps": 1, **self.more}
        size = 2 * self.micro
        if stock(kwargs):
            size, more["accumulate_grad_batches"] = 2, more["accumulate_grad_batches"] * self.micro
        if more.pop("scaled", False):
            more["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
        samples = TensorDataset(*data(2 * len(PATTERN)).tensors, torch.tensor(PATTERN).repeat_interleave(2))
        trainer = L.Trainer(**{**kwargs, **more}, max_epochs=2, callbacks=[outputs])
        Closure.warning_cache.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, DataLoader(samples, size))
        result = {
            "weights": weights(module),
            "steps": trainer.global_step,
            "norms": [each for each in module.seen if isinstance(each, list)],
            "seen": module.seen,
            "outputs": outputs.seen,
            "metrics": metrics(trainer),
        }
        told = [str(each.message) for each in caught if "`training_step` returned `None`" in str(each.message)]
        return result, {"rows": rows.rows, "told": told}


RUNS: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "whole batches": (2, 1, {}, {}),
    "zbv": (2, 2, {}, {"schedule": "zbv"}),
    "three ranks": (3, 2, {"accumulate_grad_batches": 2}, {"schedule": "zb1p", "activation_checkpointing": "stage"}),
    "16-mixed": (2, 2, {"scaled": True}, {}),
    "asynchronous": (2, 2, {}, {"schedule": "async", "max_staleness": 0}),
}


@pytest.mark.parametrize("name", RUNS)
def test_samples_that_are_left_out(runs: Runs, name: str) -> None:
    """In asynchronous training hooks see the gradients of their rank only; in 16-mixed stock Lightning makes no step
    where the last of the batches whose gradients it accumulates is left out."""
    world, micro, trainer, strategy = RUNS[name]
    fit = Fit(micro, name, **trainer)
    one, said = runs.on(1, fit, micro)[0]
    if "scaled" not in trainer:
        plain, said_there = runs.on(0, fit)[0]
        for key in ("weights", "steps", "norms") if micro > 1 else one:
            same(plain[key], one[key], key)
        same(said_there if micro == 1 else said, said)
    assert len(said["told"]) == 1 and any(not out for out in one["outputs"])
    unseen = ("norms", "seen") if strategy.get("schedule") == "async" else ()
    for rank, (found, told) in enumerate(runs.on(world, fit, micro, **strategy)):
        same({k: v for k, v in one.items() if k not in unseen}, {k: v for k, v in found.items() if k not in unseen})
        same(said if rank == 0 else {"rows": [], "told": []}, told)
