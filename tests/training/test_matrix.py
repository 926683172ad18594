"""Features of Lightning around the step, over two and three ranks, each with the numbers of one device."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from training.modules import Classifier, Recorder, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights


def outcome(trainer: L.Trainer, module: L.LightningModule, **more: Any) -> dict[str, Any]:
    return {"weights": weights(module), "metrics": metrics(trainer), "steps": trainer.global_step, **more}


def fit(
    kwargs: dict[str, Any], module: L.LightningModule, loader: Any = None, validation: Any = None, **more: Any
) -> dict[str, Any]:
    recorder = Recorder()
    trainer = L.Trainer(**{**kwargs, "max_epochs": 2, "logger": recorder, "log_every_n_steps": 1, **more})
    trainer.fit(module, loader if loader is not None else train_loader(36), validation or val_loader())
    return outcome(trainer, module, rows=recorder.rows)


def seeded(**kwargs: Any) -> Classifier:
    L.seed_everything(5)
    return Classifier(**kwargs)


class Scheduled(Classifier):
    """Several parameter groups, a scheduler by step."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [*self.inlet.parameters(), *self.head.parameters()], "lr": 0.1},
            {"params": self.blocks.parameters(), "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plateau(Classifier):
    """A scheduler that follows a metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    def on_train_epoch_start(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])


class DictBatch(Classifier):
    def loss(self, batch: Any) -> Any:
        return super().loss((batch["x"], batch["y"]) if isinstance(batch, dict) else batch)


class TwoLoaders(Classifier):
    def loss(self, batch: Any) -> Any:
        if not isinstance(batch, dict):
            return super().loss(batch)
        return super().loss([torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)])


class Stream(IterableDataset):
    """Can be read once: whoever takes an item takes it from everybody."""

    def __init__(self) -> None:
        self.items = iter([data()[i] for i in range(24)])

    def __iter__(self) -> Iterator[Any]:
        yield from self.items


def accumulation(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), accumulate_grad_batches=2)


def clipping(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), gradient_clip_val=0.05)


def clipping_by_value(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), gradient_clip_val=0.01, gradient_clip_algorithm="value")


def groups_and_scheduler(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return fit(kwargs, Scheduled())


def plateau(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return fit(kwargs, Plateau(), max_epochs=4)


def limits(kwargs: dict[str, Any]) -> Any:
    limited = {"limit_train_batches": 3, "limit_val_batches": 2, "num_sanity_val_steps": 1, "max_steps": 5}
    return fit(kwargs, seeded(), max_epochs=-1, **limited)


def frequent_validation(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, seeded(), val_check_interval=2)


def frozen(kwargs: dict[str, Any]) -> Any:
    module = seeded()
    module.inlet.requires_grad_(False)
    module.blocks[0].requires_grad_(False)
    return fit(kwargs, module)


def dict_batches(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    items = [{"x": x, "y": y, "name": f"sample {i}"} for i, (x, y) in enumerate(data(36))]
    return fit(kwargs, DictBatch(), DataLoader(items, 8, shuffle=True))


def two_loaders(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return fit(kwargs, TwoLoaders(), {"a": train_loader(16, 4), "b": train_loader(36, 4)})


def stream(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(5)
    return fit(kwargs, Classifier(), DataLoader(Stream(), 8), max_epochs=1)


def _with_workers(kwargs: dict[str, Any], persistent: bool) -> Any:
    options = {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": persistent}
    module = seeded()
    return fit(kwargs, module, train_loader(36, **options), DataLoader(data(20), 8, **options))


def workers(kwargs: dict[str, Any]) -> Any:
    return _with_workers(kwargs, persistent=False)


def persistent_workers(kwargs: dict[str, Any]) -> Any:
    return _with_workers(kwargs, persistent=True)


@pytest.mark.parametrize(
    "scenario",
    [
        accumulation,
        clipping,
        clipping_by_value,
        groups_and_scheduler,
        plateau,
        limits,
        frequent_validation,
        frozen,
        dict_batches,
        two_loaders,
        stream,
        workers,
        persistent_workers,
    ],
)
@pytest.mark.parametrize("world", [2, 3])
def test_numbers_of_one_device(runs: Runs, scenario: Any, world: int) -> None:
    count = 1 if world == 3 else 2
    expected = runs.one(scenario, count)
    results = runs.on(world, scenario, count)
    same(expected, results[0], "rank 0")
    for rank, result in enumerate(results[1:], 1):
        same({**expected, "rows": []}, {**result, "rows": []}, f"rank {rank}")


def decisions(kwargs: dict[str, Any]) -> Any:
    """Callbacks that decide by a metric: every rank must decide the same."""
    module = seeded(lr=0.3)
    best = ModelCheckpoint(monitor="val/loss", save_top_k=2, save_last=True, filename="{epoch}-{val/loss:.3f}")
    stop = EarlyStopping("val/loss", patience=1, mode="max")
    trainer = L.Trainer(**{**kwargs, "max_epochs": 6, "enable_checkpointing": True, "callbacks": [best, stop]})
    trainer.fit(module, train_loader(36), val_loader())
    validated = trainer.validate(module, val_loader(), verbose=False)
    tested = trainer.test(module, val_loader(), ckpt_path="best", verbose=False)
    predicted = trainer.predict(module, val_loader())
    return {
        "epochs": trainer.current_epoch,
        "stopped": stop.stopped_epoch,
        "best": best.best_model_path.rsplit("/", 1)[-1],
        "files": sorted(best.best_k_models and [path.rsplit("/", 1)[-1] for path in best.best_k_models]),
        "validated": validated,
        "tested": tested,
        "predicted": torch.cat(predicted) if trainer.is_global_zero else None,
        **outcome(trainer, module),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_callbacks_decide_alike(runs: Runs, world: int) -> None:
    expected = runs.one(decisions)
    results = runs.on(world, decisions)
    same(expected, results[0], "rank 0")
    for rank, result in enumerate(results[1:], 1):
        same({**expected, "predicted": None}, result, f"rank {rank}")


def validation_first(kwargs: dict[str, Any]) -> Any:
    module = seeded()
    trainer = L.Trainer(**kwargs)
    return {
        "validated": trainer.validate(module, [val_loader(), val_loader(12)][:1], verbose=False),
        "tested": trainer.test(module, val_loader(), verbose=False),
        "predicted": [p for p in trainer.predict(module, val_loader()) if p is not None],
        "weights": weights(module),
    }


def test_evaluation_without_training(runs: Runs) -> None:
    expected = runs.one(validation_first)
    results = runs.on(2, validation_first)
    same(expected, results[0])
    same({**expected, "predicted": []}, results[1])


def twice(kwargs: dict[str, Any]) -> Any:
    """Train, go on with the same trainer, and use the model in between as one would on one device."""
    module = seeded()
    trainer = L.Trainer(**{**kwargs, "max_epochs": 1})
    trainer.fit(module, train_loader(36), val_loader())
    first = outcome(trainer, module, output=module(torch.ones(2, 6)).detach())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(36), val_loader())
    return first, outcome(trainer, module)


def test_fit_twice(runs: Runs) -> None:
    same(runs.one(twice), runs.on(2, twice)[0])
