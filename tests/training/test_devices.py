"""Lightning's runs on accelerators, simulated ones: all that is CPU's by accident fails here."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import lightning as L
import pytest
import torch
from pool import Pool
from simulated import NAME, can_simulate, waits
from torch import nn
from torch.utils.data import DataLoader
from training import test_hooks as hooks
from training import test_matrix as matrix
from training.modules import Classifier, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights
from training.test_checkpoints import Shuffled
from training.test_checkpoints_elsewhere import Keeps

from lightning_lwpm.cli import main

pytestmark = pytest.mark.skipif(not can_simulate(), reason="needs a C++ compiler and the headers of Python")


@pytest.fixture(scope="module")
def devices() -> Iterator[Runs]:
    """Workers of their own: a process that has simulated devices keeps them."""
    pool = Pool(3)
    runs = Runs(pool, NAME)
    yield runs
    runs.close()
    pool.close()


class OnDevice(Classifier):
    """Makes tensors where the module says it is: in steps and hooks, and before the weights are there."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "shift"):
            self.register_buffer("shift", torch.linspace(-1, 1, 12, device=self.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x) + self.shift
        for block in self.blocks:
            h = h + block(h) + torch.ones(12, device=self.device)
        return self.head(h.to(self.device))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight = torch.tensor([0.5, 1.0, 2.0], device=self.device)
        return nn.functional.cross_entropy(self(batch[0]), batch[1], weight)

    def on_train_epoch_end(self) -> None:
        self.log("sampled", self(torch.ones(2, 6, device=self.device)).sum())


class Away(Classifier):
    """Its step needs the accelerator, as one that calls kernels which the CPU lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.ones(3, device=self.trainer.strategy.root_device)


def trained(kwargs: dict[str, Any], module: L.LightningModule) -> Any:
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    trainer.fit(module, train_loader(20), val_loader())
    return metrics(trainer), weights(module), str(next(module.parameters()).device)


def on_device(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return trained(kwargs, OnDevice())


def away(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return trained(kwargs, Away())


def moved_before(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return trained(kwargs, Classifier().to(f"{NAME}:0"))


SCENARIOS = [on_device, away, moved_before, matrix.clipping, matrix.workers, matrix.accumulation, hooks.reading]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_numbers_of_one_device(devices: Runs, scenario: Any, world: int) -> None:
    expected = devices.one(scenario)
    for rank, found in enumerate(devices.on(world, scenario)):
        if rank and isinstance(expected, dict):
            expected = {**expected, "rows": []}  # rank 0's logger alone writes
        same(expected, found, f"rank {rank}")


def test_measured_costs_and_late_weight_gradients(devices: Runs) -> None:
    one = devices.one(matrix.clipping, 4)
    for options in ({"costs": "measured"}, {"schedule": "zb1p"}, {"schedule": "zbv", "log_bubble": True}):
        same(one["weights"], devices.on(2, matrix.clipping, 4, **options)[0]["weights"])


class Waits(L.Callback):
    """How often the host waited for its device in the batches of an epoch after some."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.noting = ExitStack()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 4:
            self.noting.enter_context(waits(self.found))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.noting.close()


def waiting(kwargs: dict[str, Any]) -> int:
    L.seed_everything(5)
    watch = Waits()
    trainer = L.Trainer(**kwargs | {"max_epochs": 1, "callbacks": [watch], "gradient_clip_val": 0.1})
    trainer.fit(Classifier(depth=8), DataLoader(data(96), 8))
    return watch.found.count(threading.get_ident())


def test_the_host_waits_for_its_device_once_a_batch_not_once_a_microbatch(devices: Runs) -> None:
    few, many = (devices.on(2, waiting, count) for count in (2, 8))
    assert few == many
    assert max(few) <= 8 * 8  # batches


@pytest.mark.parametrize("world", [1, 3])
def test_random_numbers_go_on(devices: Runs, world: int) -> None:
    """Masks of dropout, which the device's own generator draws, are the same in a run that was interrupted."""
    whole = devices.on(world, Shuffled(None, None, 5), 2)[0]
    half = str(devices.folder / f"half-{world}.ckpt")
    devices.on(world, Shuffled(half, None, 5), 2)
    same(whole, devices.on(world, Shuffled(None, half, 77), 2)[0])


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_are_loaded_where_there_is_no_such_device(devices: Runs, kind: str) -> None:
    """By this process, which has none; modules among the hyperparameters included."""
    expected = devices.on(0, Keeps(devices.folder / "stock"))[0]
    stock = torch.load(devices.folder / "stock" / "kept.ckpt", map_location="cpu", weights_only=False)
    folder = devices.folder / kind
    for found in devices.on(2, Keeps(folder), state_dict_type=kind):
        same(expected, found)
    file = folder / "kept.ckpt"
    if kind == "sharded":
        main(["merge", str(file), str(folder / "merged.ckpt"), "--trusted"])
        file = folder / "merged.ckpt"
    saved = torch.load(file, weights_only=False)
    same(stock["state_dict"], saved["state_dict"])
    same(stock["optimizer_states"], saved["optimizer_states"])
