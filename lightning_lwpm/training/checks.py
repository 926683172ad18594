"""Refuses what cannot run on a partitioned model, before anything is changed."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors

__all__ = ["check_module", "check_optimizers", "check_precision"]


def check_module(module: LightningModule, fitting: bool, first_rank: bool) -> None:
    """Check a module before it is partitioned.

    Args:
        module: The user's module.
        fitting: Whether it is about to be trained.
        first_rank: Whether this is rank 0, whose weights are everybody's.

    Raises:
        ConfigurationError: saying what to change.
    """
    name = type(module).__name__
    if fitting and not any(p.requires_grad for p in module.parameters()):
        raise ConfigurationError(
            f"{name} has no parameters to train, so there is nothing to partition. Define layers in `__init__`, "
            "`setup` or `configure_model`, or train it without this strategy."
        )
    if fitting and not module.automatic_optimization:
        raise ConfigurationError(
            f"{name} sets `automatic_optimization=False`: manual optimization is not supported by the 'lwpm' strategy "
            "yet. Use automatic optimization, or train without this strategy."
        )
    if first_rank and any(is_placeholder(tensor) for _, tensor in named_tensors(module)):
        raise ConfigurationError(
            f"{name} still lacks the weights of other ranks, because an earlier run ended with an error. Build it "
            "anew, or load it from a checkpoint."
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Check what ``configure_optimizers`` returned.

    Raises:
        ConfigurationError: saying what to change.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigurationError(
                "LBFGS evaluates the loss a number of times that depends on the values, and needs inner products over "
                "all weights: it cannot run on a partitioned model. Use a first-order optimizer such as AdamW."
            )


def check_precision(precision: Precision) -> None:
    """Check the precision plugin of asynchronous training.

    Raises:
        ConfigurationError: saying what to change.
    """
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        raise ConfigurationError(
            "precision='16-mixed' scales the loss, and skips a step where the gradients of any stage overflow; with "
            "schedule='async' other stages have made that step by then, and the next losses are scaled. Use "
            "precision='bf16-mixed', which needs no scaling, or another schedule, such as 'auto'."
        )
