"""Logs how long training took and how many samples or tokens it went through in a second."""

import time
from typing import Any

import lightning as L
from typing_extensions import override


class Throughput(L.Callback):
    """Logs `train/seconds` and `train/<unit>_per_second` at the end of each epoch, both over all epochs so far.

    The clock stands still during validation. Loading data counts: a device that waits for data is not training.
    What a unit is, and how many of them a batch holds, the data module says (`unit` and `count`).
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.units = 0
        self._since = 0.0

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Replicas of the model, if there are any, read batches of their own at the same time.
        replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", {}).get("num_replicas", 1)
        self.units += trainer.datamodule.count(batch) * replicas

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        self.log("train/seconds", self.seconds)
        self.log(f"train/{trainer.datamodule.unit}_per_second", self.units / self.seconds)

    def _stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
