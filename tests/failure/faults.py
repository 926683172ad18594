"""A small model that fails where a test wants it to, and a run of it that tells how and when each rank ended."""

import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lwpm import LWPMStrategy

WIDTH = 8
_dozed: list["Fault"] = []


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where.

    Args:
        place: "forward", "backward", "step", "loader" or the name of a hook.
        rank: On which rank.
        microbatch: In which micro-batch, for "forward" and "backward".
        how: "raise", "exit" (``os._exit(3)``), "kill" (-9), "sleep" (for ever) or "doze" (for 4 seconds, once).
        clock: A file in which the time of the failure is noted.
    """

    place: str = ""
    rank: int = 0
    microbatch: int = 0
    how: str = "raise"
    clock: str = ""

    def strike(self) -> None:
        """Go wrong now."""
        if self.clock:
            Path(self.clock).write_text(str(time.time()))
        if self.how == "exit":
            os._exit(3)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "sleep":
            time.sleep(1000)
        if self.how == "doze":
            if not _dozed:
                _dozed.append(self)
                time.sleep(4)
            return
        raise ValueError(f"boom in {self.place}")


class _Burst(torch.autograd.Function):
    """Fails in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Fault) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.fault.strike()
        return gradients[0], None


class Layer(nn.Linear):
    """A layer that is told by its module what to do."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.fault: Fault | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).relu()
        if self.fault is not None and self.fault.place == "forward":
            self.fault.strike()
        if self.fault is not None and self.fault.place == "backward":
            y = _Burst.apply(y, self.fault)
        return y


class _Step(torch.optim.SGD):
    fault: Fault | None = None

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.fault is not None:
            self.fault.strike()
        return loss


class Data(Dataset):  # type: ignore[type-arg]
    """Samples, of which the 20th may fail."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.fault.place == "loader" and index == 20:
            self.fault.strike()
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        return x, x.sum().view(1)


class Model(L.LightningModule):
    """Six layers that regress a sum; fails in its second batch, unless the place says otherwise."""

    def __init__(self, fault: Fault = Fault()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.head = nn.Linear(WIDTH, 1)
        self.fault = fault
        self.micro = self.now = -1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.micro = self.micro + 1 if batch_idx == self.now else 0
        self.now = batch_idx
        here = batch_idx == 1 and self.micro == self.fault.microbatch and self._is("forward", "backward")
        for layer in self.layers:
            layer.fault = self.fault if here else None
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        self._strike_in("configure_optimizers")
        optimizer = _Step(self.parameters(), lr=0.01)
        optimizer.fault = self.fault if self._is("step") else None
        return optimizer

    def setup(self, stage: str) -> None:
        self._strike_in("setup")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._strike_in("on_train_batch_start")

    def on_validation_epoch_end(self) -> None:
        self._strike_in("on_validation_epoch_end")

    def on_fit_end(self) -> None:
        self._strike_in("on_fit_end")

    def _strike_in(self, place: str) -> None:
        if self._is(place):
            self.fault.strike()

    def _is(self, *places: str) -> bool:
        return self.fault.place in places and self.trainer.global_rank == self.fault.rank


def loader(fault: Fault = Fault(), **options: Any) -> Any:
    """The data, of which a sample may fail."""
    return DataLoader(Data(fault), batch_size=16, **options)


def make_trainer(world: int, callbacks: Any = (), strategy: Any = None, **options: Any) -> L.Trainer:
    """A Trainer over ``world`` processes that writes nothing."""
    return L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy or LWPMStrategy(num_microbatches=4, costs="estimated", **options),
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(rank: int, world: int, fault: Fault, callbacks: Any = (), **options: Any) -> dict[str, Any]:
    """Train, and tell how it ended here."""
    cuts = [f"layers.{i * 6 // world}" for i in range(1, world)]
    return told(lambda: _fit(world, fault, callbacks, partition=cuts, **options))


def _fit(world: int, fault: Fault, callbacks: Any, **options: Any) -> None:
    torch.manual_seed(1)
    make_trainer(world, callbacks, **options).fit(Model(fault), loader(fault), loader())


def told(run: Any) -> dict[str, Any]:
    """How ``run()`` ends: type, text and time of its error, and the warnings on its way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, error = run(), None
        except BaseException as raised:
            value, error = None, raised
    return {
        "value": value,
        "type": type(error).__name__ if error is not None else "",
        "bases": [base.__name__ for base in type(error).__mro__],
        "text": str(error) if error is not None else "",
        "time": time.time(),
        "warnings": [str(w.message) for w in caught],
    }
