"""Fit over several ranks: weights, logs, metrics and hooks are those of one device."""

from typing import Any

import lightning as L
import pytest
import torch
from training.modules import Classifier, Keeper, Recorder, train_loader, val_loader
from training.runs import Runs, metrics, same, weights


def fit(kwargs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The usual project: shuffled data with a smaller last batch, metrics, validation, a scheduler an epoch."""
    L.seed_everything(5)
    module, recorder, keeper = Classifier(), Recorder(), Keeper()
    kwargs |= {"max_epochs": 2, "logger": recorder, "callbacks": [keeper], "log_every_n_steps": 1, **more}
    trainer = L.Trainer(**kwargs)
    trainer.fit(module, train_loader(36), val_loader())
    return {
        "weights": weights(module),
        "metrics": metrics(trainer),
        "rows": recorder.rows,
        "outputs": keeper.outputs,
        "hooks": keeper.names,
        "steps": trainer.global_step,
        "output": module.eval()(torch.ones(2, 6)).detach(),
        "training": module.training,
    }


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("world", [2, 3])
def test_fit(runs: Runs, world: int, count: int) -> None:
    expected = runs.one(fit, count)
    results = runs.on(world, fit, count)
    same(expected, results[0], "rank 0")
    for rank, result in enumerate(results[1:], 1):
        for key in ("weights", "metrics", "hooks", "steps", "output"):
            same(expected[key], result[key], f"rank {rank} {key}")
        same([o["loss"] for o in expected["outputs"]], [o["loss"] for o in result["outputs"]], f"rank {rank} losses")


def test_one_process_is_stock_lightning(runs: Runs) -> None:
    same(runs.one(fit), runs.on(1, fit)[0])
