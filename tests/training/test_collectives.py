"""Collectives of ``torch.distributed`` in the user's steps and hooks: of one member, as on one device."""

from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from pool import WorkerError
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.utils.data import DataLoader, TensorDataset
from training.runs import Runs, metrics, same, weights


class Contrastive(L.LightningModule):
    """Uses collectives wherever training of several copies of a model does: between layers, in its loss, in hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.middle, self.out = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("center", torch.zeros(12))
        self.outputs: list[Any] = []

    def loss(self, x: Tensor) -> Tensor:
        h = self.inlet(x)
        if dist.is_initialized():  # between layers: every rank comes here
            gathered = [torch.zeros_like(h) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, h.detach())
            h = h - torch.cat(gathered).mean(0)
        else:
            h = h - h.detach().mean(0)
        h = torch.relu(self.middle(h))
        if dist.is_initialized():
            total = h.detach().sum(0)
            dist.all_reduce(total)
            dist.broadcast(total, src=dist.get_rank())
            h = h - total / (len(h) * dist.get_world_size())
        else:
            h = h - h.detach().sum(0) / len(h)
        z = self.out(h)
        if dist.is_initialized():  # only rank 0 comes to the loss
            z = torch.cat(list(all_gather(z))) + 0 * all_reduce(z.sum())
        return (self.all_gather(z) @ z.T).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        self.stored = dist.group.WORLD if dist.is_initialized() else None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.outputs.append(float(self.loss(batch[0])))

    def on_validation_epoch_end(self) -> None:
        every = [self.outputs]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()  # type: ignore[list-item]
            dist.all_gather_object(every, self.outputs)
        self.log("val", torch.tensor([value for outputs in every for value in outputs]).sum())
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class ByHand(Contrastive):
    """The same with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch[0]))
        optimizer.step()


class OverAllRanks(Contrastive):
    """Gives a group of all ranks, which it has kept from outside the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        if self.stored is not None:
            dist.all_reduce(loss, group=self.stored)
        return loss


def fit(kwargs: dict[str, Any], kind: type[Contrastive] = Contrastive) -> Any:
    L.seed_everything(2)
    module = kind()
    trainer = L.Trainer(**kwargs, max_epochs=2)
    loader = DataLoader(TensorDataset(torch.randn(16, 6)), 8)
    trainer.fit(module, loader, loader)
    size = dist.get_world_size() if dist.is_initialized() else 1
    return {"weights": weights(module), "metrics": metrics(trainer), "as before": size == trainer.world_size}


def by_hand(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, ByHand)


def over_all_ranks(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, OverAllRanks)


@pytest.mark.parametrize("scenario", [fit, by_hand])
def test_collectives_in_steps_have_one_member(runs: Runs, scenario: Any) -> None:
    """They waited for ranks that never come to the loss, until the process group's timeout of 30 minutes."""
    reference = runs.on(0, scenario)[0]
    for found in runs.on(2, scenario, partition=["out"]):
        same(found, reference)


def test_collectives_with_micro_batches_and_three_stages(runs: Runs) -> None:
    reference = runs.on(1, fit, num_microbatches=2)[0]
    for found in runs.on(3, fit, num_microbatches=2):
        same(found, reference)


def test_a_group_of_all_ranks_is_refused(runs: Runs) -> None:
    with pytest.raises(WorkerError, match=r"all_reduce` over a process group of 2 ranks, in a step"):
        runs.on(2, over_all_ranks)
