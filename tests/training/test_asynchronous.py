"""Asynchronous training in Lightning: exact where it drains, resumed as if never interrupted, in the usual order."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset, default_collate
from training.modules import Classifier, Recorder, data, train_loader, val_loader
from training.runs import Runs, same, weights

from lightning_lwpm import ConfigurationError, LWPMStrategy


class Normed(Classifier):
    """With running statistics in the first layers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        width = self.hparams.width
        self.blocks[0] = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.2))


class Tied(Classifier):
    """The first and the last layer have a weight in common."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blocks[-1][0].weight = self.blocks[0][0].weight


class Notes(Callback):
    """Counters and rates after each batch."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append((trainer.global_step, trainer.fit_loop.batch_idx, rate))


def fit(kwargs: dict[str, Any], module: Any = Classifier, batches: int = 12, callback: Any = None, **more: Any) -> Any:
    L.seed_everything(3)
    own, recorder, notes = module(), Recorder(), Notes()
    ckpt_path, loader = more.pop("ckpt_path", None), more.pop("loader", None)
    options: dict[str, Any] = {
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "gradient_clip_val": 0.5,
        "val_check_interval": 5,
        "callbacks": [notes, *([callback] if callback else [])],
        **more,
    }
    trainer = L.Trainer(**{**kwargs, **options, "logger": recorder})
    loader = loader if loader is not None else train_loader(16 * batches - 5, 16)
    trainer.fit(own, loader, val_loader(), ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"weights": weights(own), "notes": notes.rows, "metrics": metrics, "steps": trainer.global_step}


def exact(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs)


def accumulated(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, accumulate_grad_batches=2)


def normed(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, Normed)


def tied(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, Tied)


@pytest.mark.parametrize("scenario", [exact, accumulated, normed, tied])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"max_staleness": 0},
        {"exact_warmup_steps": 1000},
        {"exact_final_steps": 1000},
        {"drain_every_n_steps": 1, "staleness_correction": "none"},
    ],
)
def test_drained_at_every_step_it_is_the_exact_schedule(
    runs: Runs, scenario: Any, world: int, options: dict[str, Any]
) -> None:
    expected = runs.on(world, scenario, 4, schedule="1f1b")
    found = runs.on(world, scenario, 4, schedule="async", **options)
    for one, other in zip(expected, found, strict=True):
        same(one, other)


@pytest.mark.parametrize("checkpointing", ["layer", "stage"])
def test_activations_computed_again_change_nothing(runs: Runs, checkpointing: str) -> None:
    expected = runs.on(3, exact, 2, schedule="async", staleness_correction="none")
    again = {"activation_checkpointing": checkpointing, "staleness_correction": "none"}
    found = runs.on(3, exact, 2, schedule="async", **again)
    assert found[0]["steps"] == expected[0]["steps"]
    for name, weight in expected[0]["weights"].items():
        assert torch.isfinite(found[0]["weights"][name]).all() and weight.shape == found[0]["weights"][name].shape


@pytest.mark.parametrize("scenario", [exact, accumulated, normed, tied])
@pytest.mark.parametrize(("world", "count"), [(2, 1), (3, 2), (3, 5)])
def test_counters_and_rates_are_those_of_one_device(runs: Runs, scenario: Any, world: int, count: int) -> None:
    expected = runs.on(1, scenario, count)[0]
    for found in runs.on(world, scenario, count, schedule="async"):
        same(expected["notes"], found["notes"])
        assert found["steps"] == expected["steps"]
        assert found["metrics"]["val/loss"] < 0.5  # 1.1 at the beginning


def test_one_device_trains_exactly(runs: Runs) -> None:
    same(runs.on(1, exact, 4), runs.on(1, exact, 4, schedule="async"))


class Saves(Callback):
    """Saves after a batch of which nobody knew before."""

    def __init__(self, path: str, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


def alike() -> DataLoader:
    """Twelve times the same batch: where an epoch goes on, Lightning begins with the first batch again."""
    x, y = data(16).tensors
    return DataLoader(TensorDataset(x.repeat(12, 1), y.repeat(12)), 16)


def long(kwargs: dict[str, Any], **more: Any) -> Any:
    return fit(kwargs, loader=alike(), max_epochs=1, max_steps=12, val_check_interval=1.0, **more)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize(("world", "count"), [(2, 1), (3, 2)])
def test_a_resumed_run_goes_on_as_the_one_that_saved(
    runs: Runs, tmp_path: Path, world: int, count: int, planned: bool
) -> None:
    path = str(tmp_path / "saved.ckpt")

    def saving(kwargs: dict[str, Any]) -> Any:
        every = ModelCheckpoint(tmp_path, "saved", every_n_train_steps=5, save_top_k=1, enable_version_counter=False)
        return long({**kwargs, "enable_checkpointing": planned}, callback=every if planned else Saves(path, 5))

    def going_on(kwargs: dict[str, Any]) -> Any:
        return long(kwargs, ckpt_path=path)

    whole = runs.on(world, saving, count, schedule="async")
    saved = torch.load(path, weights_only=False)
    if planned:
        assert saved["global_step"] in (5, 10)
    assert saved["lwpm_async"]["state"]
    rest = runs.on(world, going_on, count, schedule="async")
    same(whole[0]["weights"], rest[0]["weights"])


def test_what_the_checkpoint_and_the_end_hold_are_base_weights(runs: Runs, tmp_path: Path) -> None:
    path = str(tmp_path / "last.ckpt")

    def saving(kwargs: dict[str, Any]) -> Any:
        return fit({**kwargs, "enable_checkpointing": False}, callback=Saves(path, 12), max_epochs=1)

    found = runs.on(3, saving, 2, schedule="async")[0]
    same(torch.load(path, weights_only=False)["state_dict"], found["weights"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "async", "max_staleness": -1}, "max_staleness=-1: pass a number of steps"),
        ({"schedule": "async", "staleness_correction": "magic"}, "'magic' is not known; choose one of 'none'"),
        ({"schedule": "async", "virtual_stages": 2}, "virtual_stages=2: the schedule 'async' needs"),
        ({"schedule": "async", "repartition_every_n_epochs": 1}, "layers cannot move while batches overlap"),
        ({"drain_every_n_steps": 5}, "drain_every_n_steps=5 is of asynchronous training, but schedule='auto'"),
        ({"schedule": "asink"}, "Did you mean 'async'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LWPMStrategy(**options)


class Joined(Classifier):
    """Takes a batch of each of two loaders."""

    def loss(self, batch: Any) -> Any:
        joined = isinstance(batch, dict)
        return super().loss([torch.cat(parts) for parts in zip(*batch.values(), strict=True)] if joined else batch)


class Parts(Classifier):
    """The same from one loader."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch if len(batch) == 2 else [torch.cat(batch[::2]), torch.cat(batch[1::2])])


def _halves() -> tuple[TensorDataset, TensorDataset]:
    x, y = data(96).tensors
    return TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])


class Streamed(IterableDataset):
    """Of unknown length, of which Lightning always reads one more batch."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data(96))


def two_loaders(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, Joined, loader={"a": DataLoader(_halves()[0], 8), "b": DataLoader(_halves()[1], 8)})


def one_loader(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, Parts, loader=DataLoader(StackDataset(*_halves()), 8, collate_fn=_flat))


def _flat(items: Any) -> Any:
    return tuple(part for half in zip(*items, strict=True) for part in default_collate(list(half)))


def known(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, loader=DataLoader(data(96), 16))


def unknown(kwargs: dict[str, Any]) -> Any:
    return fit(kwargs, loader=DataLoader(Streamed(), 16))


@pytest.mark.parametrize(("scenario", "like"), [(two_loaders, one_loader), (unknown, known)])
def test_batches_overlap_alike_wherever_they_come_from(runs: Runs, scenario: Any, like: Any) -> None:
    """Of several loaders, or of one of unknown length: the batch that is begun early is the next one."""
    expected = runs.on(3, like, 2, schedule="async")
    same(expected, runs.on(3, scenario, 2, schedule="async"))


class Stops(Callback):
    """Ends training in the middle of an epoch."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 4


def stopped(kwargs: dict[str, Any]) -> Any:
    L.seed_everything(3)
    module = Classifier()
    trainer = L.Trainer(**kwargs, max_epochs=1, callbacks=[Stops()])
    trainer.fit(module, train_loader(96))
    gc.collect()  # what training has left must not change weights as it goes
    found = trainer.validate(module, val_loader(), verbose=False)[0]
    out = module.eval()(val_loader().dataset.tensors[0])
    loss = nn.functional.cross_entropy(out, val_loader().dataset.tensors[1])
    return trainer.global_step, found["val/loss"], float(loss)


@pytest.mark.parametrize(("world", "count"), [(2, 1), (3, 2)])
def test_stopped_in_the_middle(runs: Runs, world: int, count: int) -> None:
    """What has been begun is given up; the weights that are left are those that are validated."""
    for steps, logged, computed in runs.on(world, stopped, count, schedule="async"):
        assert 4 <= steps < 12
        assert logged == pytest.approx(computed, rel=1e-5)
