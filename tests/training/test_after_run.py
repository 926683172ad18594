"""What every process has after a run."""

import copy
import gc
import io
import os
import threading
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from training.modules import Classifier, data, train_loader, val_loader
from training.runs import Runs, metrics, same, stock, weights

from lightning_lwpm import LWPMStrategy
from lightning_lwpm.errors import ConfigurationError


def afterwards(kwargs: dict[str, Any], everywhere: bool = True) -> Any:
    """Everything that a script does with a model that has been trained."""
    L.seed_everything(5)
    module, folder = Classifier(), kwargs["default_root_dir"]
    trainer = L.Trainer(**kwargs | {"max_epochs": 2})
    trainer.fit(module, train_loader(36), val_loader())
    whole = everywhere or trainer.is_global_zero
    found: dict[str, Any] = {"trained": (weights(module), module(data().tensors[0])) if whole else None}
    if not whole:
        uses = (
            module,
            lambda x: torch.save(module.state_dict(), io.BytesIO()),
            lambda x: sum(p.sum() for p in module.parameters()).item(),
        )
        for use in uses:
            with pytest.raises(
                ConfigurationError, match=r"only rank 0 has.*is_global_zero.*weights_after_run='all_ranks'"
            ):
                use(data().tensors[0])
    trainer.save_checkpoint(f"{folder}/after.ckpt")
    trainer.strategy.barrier()
    saved = torch.load(f"{folder}/after.ckpt", weights_only=False)
    found["saved"] = saved["state_dict"], saved["optimizer_states"]
    found["test"] = trainer.test(module, val_loader(), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train_loader(36), val_loader())
    found["again"] = metrics(trainer), trainer.global_step
    more = {} if stock(kwargs) else {"strategy": LWPMStrategy(num_microbatches=1)}  # measures layers
    other = L.Trainer(**kwargs | more | {"max_epochs": 1})
    other.fit(module, train_loader(36), val_loader())
    found["by another"] = metrics(other), weights(module) if whole or more else None
    return found


class Exports(L.Callback):
    """Keeps merged copies of the model, or plain ones on one device."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pipelined = isinstance(trainer.strategy, LWPMStrategy)
        made = trainer.strategy.merged_module() if pipelined else copy.deepcopy(pl_module).cpu()
        if made is not None:
            output = made(data().tensors[0])
            self.found.append((weights(made), output, made.training, str(made.device), type(made).__name__))


def exported(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, exports = Classifier(), Exports()
    trainer = L.Trainer(**kwargs | {"max_epochs": 2, "callbacks": [exports]})
    trainer.fit(module, train_loader(36), val_loader())
    exports.on_train_epoch_end(trainer, module)
    return exports.found


def pickled(kwargs: dict[str, Any]) -> Any:
    """Trainers that were saved or copied after a run, and their loaders, without the processes that trained."""
    module, stream = Classifier(), io.BytesIO()
    trainer = L.Trainer(**kwargs | {"max_epochs": 1})
    trainer.fit(module, train_loader(36), val_loader())
    torch.save(trainer, stream)
    stream.seek(0)
    made = torch.load(stream, weights_only=False), copy.deepcopy(trainer)
    again = [[len(x) for x, _ in other.val_dataloaders] for other in made]
    return [other.global_step for other in made], again, [type(other.train_dataloader).__mro__[1:] for other in made]


def test_a_trainer_can_be_saved(runs: Runs) -> None:
    expected = runs.one(pickled)
    for world in (1, 2):
        same([expected] * world, runs.on(world, pickled))


def test_merged_copies_of_the_model(runs: Runs) -> None:
    expected = runs.one(exported)
    assert len(expected) == 3
    for world in (2, 3):
        first, *others = runs.on(world, exported)
        same(expected, first)
        assert not any(others)


def on_rank_zero(kwargs: dict[str, Any]) -> Any:
    return afterwards(kwargs, everywhere=False)


def test_every_process_has_the_trained_model(runs: Runs) -> None:
    for found in runs.on(2, afterwards):
        same(runs.one(afterwards), found)


def test_rank_zero_has_it_alone_on_request(runs: Runs) -> None:
    expected = runs.one(afterwards)
    for rank, found in enumerate(runs.on(3, on_rank_zero, weights_after_run="rank_zero")):
        same(expected if rank == 0 else {**expected, "trained": None}, found)


def folds(kwargs: dict[str, Any]) -> Any:
    """Cross-validation: a model and a trainer for each fold; what the process holds after each."""
    found, held, first = [], [], kwargs["strategy"]
    for fold in range(4):
        L.seed_everything(fold)
        another = copy.copy(first) if stock(kwargs) else LWPMStrategy(num_microbatches=1, costs="estimated")
        module = Classifier()
        trainer = L.Trainer(**kwargs | {"max_epochs": 1, "strategy": another if fold < 3 else first})
        trainer.fit(module, train_loader(), val_loader())
        found.append(weights(module))
        del module, trainer, another
        gc.collect()
        tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects()) - sum(map(len, found))
        held.append((threading.active_count(), len(os.listdir("/proc/self/fd")), tensors))
    return found, held


def test_trainers_one_after_another_leave_nothing(runs: Runs) -> None:
    expected, _ = runs.one(folds)
    for found, held in runs.on(2, folds):
        same(expected, found)
        assert all(last <= second for second, last in zip(held[1], held[3], strict=True)), held


class Anchors(L.LightningModule):
    """A layer keeps tensors on itself, and makes them anew of what it has kept, as detectors do with anchors.

    Code between layers notes something in a buffer, as mixtures of experts do.
    """

    class Layer(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.anchors = [torch.ones(6), torch.ones(6)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.anchors = [anchor.to(x.dtype) * 1 for anchor in self.anchors]
            return super().forward(x) * self.anchors[0]

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([self.Layer() for _ in range(4)])
        self.register_buffer("load", torch.zeros(6))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0]
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            if number == 0 and self.training:
                self.load = 0.9 * self.load + 0.1 * x.detach().mean(0)
        self.log("loss", x.square().mean())
        return x.square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def anchored(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, trainer = Anchors(), L.Trainer(**kwargs, max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(32), val_loader())
        # a run of evaluation has one stage a rank, so it is cut elsewhere
        found = trainer.validate(module, val_loader(), verbose=False)
    told = [str(entry.message) for entry in caught if "anchors" in str(entry.message)]
    return found, weights(module), [layer.anchors for layer in module.layers], told


def test_what_layers_have_stored_is_there_after_a_run(runs: Runs) -> None:
    """A rank that ran a layer first in the next run found a tensor of another rank's micro-batch, which had ended."""
    one = runs.one(anchored, 2)
    for found in runs.on(2, anchored, 2, schedule="interleaved_1f1b"):
        same(one, found)
    for found in runs.on(2, anchored, 2, partition=["layers.2"]):
        same(one, found)


class Bare(Anchors):
    """Normalisation without weights between layers, as in heads of self-supervised learning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6, affine=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.norm(self.layers[0](batch[0]))
        for layer in self.layers[1:]:
            x = x + layer(x)
        return x.square().mean()

    validation_step = training_step


def bare(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    module, trainer = Bare(), L.Trainer(**kwargs, max_epochs=1)
    trainer.fit(module, train_loader(32), val_loader())
    return weights(module)


def test_statistics_of_normalisation_without_weights(runs: Runs) -> None:
    """Torch counts no change of them, so they were taken for constants, and rank 0 kept those of the beginning."""
    for found in runs.on(2, bare, 1, partition=["layers.2"]):
        same(runs.one(bare), found)
