"""What every process has after a run."""

import io
from typing import Any

import lightning as L
import pytest
import torch
from training.modules import Classifier, data, train_loader, val_loader
from training.runs import Runs, metrics, same, weights

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
    more = {} if kwargs["strategy"] == "auto" else {"strategy": LWPMStrategy(num_microbatches=1)}  # measures layers
    other = L.Trainer(**kwargs | more | {"max_epochs": 1})
    other.fit(module, train_loader(36), val_loader())
    found["by another"] = metrics(other), weights(module) if whole or more else None
    return found


def on_rank_zero(kwargs: dict[str, Any]) -> Any:
    return afterwards(kwargs, everywhere=False)


def test_every_process_has_the_trained_model(runs: Runs) -> None:
    for found in runs.on(2, afterwards):
        same(runs.one(afterwards), found)


def test_rank_zero_has_it_alone_on_request(runs: Runs) -> None:
    expected = runs.one(afterwards)
    for rank, found in enumerate(runs.on(3, on_rank_zero, weights_after_run="rank_zero")):
        same(expected if rank == 0 else {**expected, "trained": None}, found)
