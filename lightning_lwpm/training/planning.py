"""The first batch, the probe and the plan: all that happens before the model is partitioned."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric, MetricCollection

from lightning_lwpm.partition.probe import Probe, probe
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.training.data import Feed

__all__ = ["look", "setup_loaders"]

_STEPS = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}


def setup_loaders(trainer: Trainer) -> Any:
    """Let Lightning set up the loaders of this run now (its loops find them done), and return them."""
    fn = trainer.state.fn
    if fn == TrainerFn.FITTING:
        trainer.fit_loop.setup_data()
        return trainer.train_dataloader
    loop = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }[fn]  # type: ignore[index]
    loop.setup_data()
    loaders = {
        TrainerFn.VALIDATING: trainer.val_dataloaders,
        TrainerFn.TESTING: trainer.test_dataloaders,
        TrainerFn.PREDICTING: trainer.predict_dataloaders,
    }[fn]  # type: ignore[index]
    if isinstance(loaders, dict):
        return next(iter(loaders.values()), None)
    return (loaders[0] if loaders else None) if isinstance(loaders, list | tuple) else loaders


def look(
    trainer: Trainer, module: LightningModule, feed: Feed, loaders: Any, prepare: Callable[[Any], Any], count: int
) -> Probe:
    """Run the step of this run once on its first micro-batch, on the whole model in host memory.

    Args:
        trainer: Tells which step.
        module: The whole model.
        feed: Reads the first batch.
        loaders: From :func:`setup_loaders`.
        prepare: Transfer hooks, to the host.
        count: Number of micro-batches.
    """
    fn = trainer.state.fn
    train = fn == TrainerFn.FITTING
    states = random.getstate(), torch.random.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    batch = prepare(_first(feed, loaders))
    random.setstate(states[0])
    torch.random.set_rng_state(states[1])
    if numpy:
        numpy.random.set_state(numpy_state)
    micro = Batch.of(batch, count if train else 1).microbatch(0)
    name = _STEPS[fn]  # type: ignore[index]
    step = getattr(module, name)
    kwargs: dict[str, Any] = {}
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        kwargs["batch_idx"] = 0
    if is_param_in_hook_signature(step, "dataloader_idx", min_args=3) and not train:
        kwargs["dataloader_idx"] = 0
    modes = [(m, m.training) for m in module.modules()]
    module.train(train) if not train else None
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *_, **__: None
    precision = trainer.precision_plugin
    context = precision.train_step_context if train else precision.val_step_context
    try:
        with torch.set_grad_enabled(train), context():
            metrics = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
            return probe(module, lambda: step(micro, *kwargs.values()), metrics)
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
        for m, mode in modes:
            m.training = mode


def _first(feed: Feed, loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: _first(feed, loader) for key, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return type(loaders)([_first(feed, loader) for loader in loaders])
    return feed.read(loaders)
