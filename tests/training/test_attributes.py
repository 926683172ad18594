"""What the user's code remembers on modules is the same on every rank, though rank 0 alone may have set it."""

import warnings
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training.modules import train_loader, val_loader
from training.runs import Runs, same, weights


@dataclass
class Annealing:
    """A schedule of the user's own, which nothing but a hook moves on."""

    value: float = 1.0
    past: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.past.append(self.value)
        self.value *= 0.8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.sharpness = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * self.sharpness)


class Annealed(L.LightningModule):
    """Its first layers depend on what the end of the step, and hooks, have set."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.annealing, self.alias = Annealing(), None
        self.seen, self.modes, self.window = 0, {"mixed": False}, deque([0.0], maxlen=3)
        self.scale = torch.tensor(1.0)
        self.alias = self.annealing

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = x * self.alias.value * self.scale + 0.01 * self.seen + self.window[-1]
        if self.modes["mixed"]:
            x = x.flip(0) * 0.1 + x
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.head(x), y)
        self.seen += 1
        self.window.append(0.001 * self.seen)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.blocks[0].sharpness *= 0.9
        self.scale = self.scale * 0.95

    def on_train_epoch_end(self) -> None:
        self.annealing.step()
        self.modes["mixed"] = True
        self.window.clear()
        self.window.append(0.0)
        self.blocks[1].eval()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_loss(batch))

    def training_loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        for block in self.blocks:
            x = block(x * self.annealing.value)
        return F.cross_entropy(self.head(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def annealed(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(3)
    module = Annealed()
    trainer = L.Trainer(**kwargs | {"max_epochs": 3})
    trainer.fit(module, train_loader(20), val_loader())
    remembered = module.seen, module.annealing, list(module.window), module.modes, module.blocks[0].sharpness
    modes = [part.training for part in module.modules()]
    return {"weights": weights(module), "val": trainer.callback_metrics["val"], "is": [str(remembered), modes]}


@pytest.mark.parametrize("world", [2, 3])
def test_what_rank_0_alone_sets_reaches_all(runs: Runs, world: int) -> None:
    expected = runs.one(annealed)
    for rank, found in enumerate(runs.on(world, annealed, partition=["blocks.1", "blocks.3"][: world - 1])):
        same(expected, found, f"rank {rank} of {world}")


class Counting(Annealed):
    """Changes attributes at the end of its step, of which the first layers read one, and a mean at its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.unread = self.written = 0
        self.mean = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.written = 1
        x, y = batch
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        for block in self.blocks:
            x = block(x + 0.01 * self.read + 0.01 * self.written - self.mean)
        loss = F.cross_entropy(self.head(x), y) + 0.01 * self.unread
        self.read, self.unread, self.written = self.read + 1, self.unread + 1, 2
        return loss


def counting(kwargs: dict[str, Any]) -> Any:
    module = Counting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(**kwargs | {"max_epochs": 1}).fit(module, train_loader(20))
    told = [str(each.message) for each in caught if "Counting" in str(each.message)]
    return told, (module.read, module.unread), [name for name in vars(Counting) if "read" in name]


@pytest.mark.parametrize("schedule", ["1f1b", "async"])
def test_what_the_next_micro_batch_would_read_is_told(runs: Runs, schedule: str) -> None:
    """Once, by the rank that reads it; with one micro-batch nothing is late but in asynchronous training."""
    first, second = runs.on(2, counting, 2, partition=["blocks.2"], schedule=schedule)
    assert first[0] == [] and "reads `Counting.read` on stage 0 (rank 1)" in second[0][0] and len(second[0]) == 1
    assert first[1:] == second[1:] == ((6, 6), [])
    if schedule == "1f1b":
        assert not any(told for told, *_ in runs.on(2, counting, 1, partition=["blocks.2"]))


class Recurrent(L.LightningModule):
    """Keeps the state of a recurrent layer for the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.cells, self.head = nn.Linear(6, 8), nn.LSTM(8, 64, 2), nn.Linear(64, 3)
        self.hidden: tuple[torch.Tensor, ...] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if self.hidden is None:
            self.hidden = (x.new_zeros(2, 1, 64), x.new_zeros(2, 1, 64))
        hidden = (self.hidden[0].detach(), self.hidden[1].detach())
        out, self.hidden = self.run(x, hidden)
        return F.cross_entropy(out, y)

    def run(self, x: torch.Tensor, hidden: Any) -> Any:
        out, hidden = self.cells(self.inlet(x)[:, None], hidden)
        return self.head(out[:, 0]), hidden

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def recurrent(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(3)
    module = Recurrent()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        L.Trainer(**kwargs | {"max_epochs": 2}).fit(module, train_loader(20))
    assert module.hidden is not None
    return (weights(module), [each.detach() for each in module.hidden]), ["Recurrent.hidden" in str(w) for w in caught]


def test_state_of_recurrent_layers_goes_on(runs: Runs) -> None:
    """Whatever rank has computed it: the step stores it after its layers, which another rank only runs."""
    expected, _ = runs.one(recurrent)
    for rank, (found, _) in enumerate(runs.on(2, recurrent, partition=["head"])):
        same(expected, found, f"rank {rank}")
    assert any(runs.on(2, recurrent, 2, partition=["head"])[1][1])
