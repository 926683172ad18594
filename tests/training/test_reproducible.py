"""The same seed gives the same run: twice, and on request with any number of devices, dropout included."""

import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training.modules import Classifier, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

from lightning_lwpm import ConfigurationError, LWPMStrategy


class Random(Classifier):
    """Dropout and noise in and between layers, and a metric in the middle."""

    def __init__(self) -> None:
        super().__init__()
        for i, block in enumerate(self.blocks):
            self.blocks[i] = nn.Sequential(block, nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inlet(x)
        for i, block in enumerate(self.blocks):
            h = h + block(h) + 0.1 * torch.randn_like(h)
            if i == 1 and self.training:
                self.best(h.mean())
        return self.head(nn.functional.dropout(h, 0.2, self.training))


class Normed(Classifier):
    """BatchNorm first, in the middle, and within a block."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Sequential(nn.BatchNorm1d(6), self.inlet)
        self.blocks[1] = nn.Sequential(self.blocks[1], nn.BatchNorm1d(self.head.in_features))


def fit(kwargs: dict[str, Any], kind: type[Classifier] = Random) -> Any:
    L.seed_everything(5, workers=True)
    recorder, module = Recorder(), kind()
    trainer = L.Trainer(**{**kwargs, "max_epochs": 2, "logger": recorder, "log_every_n_steps": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(36), val_loader())
    told = [str(w.message) for w in caught if "BatchNorm takes" in str(w.message)]
    return {"weights": weights(module), "metrics": metrics(trainer), "rows": recorder.rows, "told": told}


def check(runs: Runs, scenario: Any, worlds: tuple[int, ...], **options: Any) -> Any:
    expected = runs.on(1, scenario, 2, **options)[0]
    for world in worlds:
        for rank, found in enumerate(runs.on(world, scenario, 2, **options)):
            own = {} if rank == 0 else {"rows": [], "told": []}
            same({**expected, **own}, found, f"rank {rank} of {world}")
    return expected


def test_the_same_seed_gives_the_same_run(runs: Runs) -> None:
    same(runs.on(2, fit, 2), runs.on(2, fit, 2))


def test_draws_do_not_depend_on_the_number_of_devices(runs: Runs) -> None:
    """Nor does the order of the data, which is drawn from the generator that dropout draws from on one device."""
    check(runs, fit, (2, 3), deterministic_rng=True)


def epochs(kwargs: dict[str, Any], count: int, **more: Any) -> Any:
    """So many epochs, with a checkpoint after each; or the rest of them, from that of the first."""
    L.seed_everything(5, workers=True)
    module, saved = Random(), ModelCheckpoint(kwargs["default_root_dir"], "{epoch}", save_top_k=-1)
    options = {**kwargs, "max_epochs": count, "callbacks": [saved], "enable_checkpointing": True}
    trainer = L.Trainer(**options)
    path = f"{kwargs['default_root_dir']}/epoch=0.ckpt" if more else None
    trainer.fit(module, val_loader(36), ckpt_path=path, weights_only=False)  # not shuffled
    return weights(module), trainer.global_step


def test_a_run_resumed_on_more_devices_draws_what_it_would_have_drawn(runs: Runs) -> None:
    options: dict[str, Any] = {"deterministic_rng": True, "folder": "resumed"}
    whole = runs.on(2, partial(epochs, count=2), 2, **options)[0]
    same(whole, runs.on(3, partial(epochs, count=2, resumed=True), 2, **options)[0])


def test_batch_norm_of_microbatches(runs: Runs) -> None:
    """The default, with one warning."""
    told = check(runs, partial(fit, kind=Normed), (2, 3))["told"]
    assert len(told) == 1 and "'inlet.0' and 1 more" in told[0]


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_deferred_batch_norm(runs: Runs, checkpointing: str) -> None:
    """Running statistics of whole batches: of the first layer, those of one device that never splits them."""
    options = {"deferred_batch_norm": True, "activation_checkpointing": checkpointing}
    found = check(runs, partial(fit, kind=Normed), (2,), **options)
    assert not found["told"]
    whole = runs.on(0, partial(fit, kind=Normed))[0]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(found["weights"][f"inlet.0.{name}"], whole["weights"][f"inlet.0.{name}"])


@pytest.mark.parametrize("options", [{"deferred_batch_norm": 1}, {"deterministic_rng": "yes"}])
def test_switches(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}=.*: pass True or False"):
        LWPMStrategy(**options)
    with pytest.raises(ConfigurationError, match='deferred_batch_norm=True: with schedule="async"'):
        LWPMStrategy(deferred_batch_norm=True, schedule="async")
