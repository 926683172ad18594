"""Refuses what cannot run on a partitioned model, before anything is changed."""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LambdaCallback, ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.batch_norm import batch_norms
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.training.separable import is_separable

__all__ = [
    "BEFORE_STEPS",
    "check_callbacks",
    "check_module",
    "check_optimizers",
    "looks_at_gradients",
    "users",
    "warn_of_batch_norm",
    "warn_of_gradients",
]

BEFORE_STEPS = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")
"""The hooks in which gradients are looked at before an optimizer's step."""


def check_module(module: LightningModule, fitting: bool, first_rank: bool, asynchronous: bool = False) -> None:
    """Check a module before it is partitioned.

    Args:
        module: The user's module.
        fitting: Whether it is about to be trained.
        first_rank: Whether this is rank 0, whose weights are everybody's.
        asynchronous: Whether batches are to overlap.

    Raises:
        ConfigurationError: saying what to change.
    """
    name = type(module).__name__
    if fitting and next(module.parameters(), None) is None:
        raise ConfigurationError(
            f"{name} has no parameters to train, so there is nothing to partition. Define layers in `__init__`, "
            "`setup` or `configure_model`, or train it without this strategy."
        )
    if asynchronous and not module.automatic_optimization:
        raise ConfigurationError(
            f"{name} sets `automatic_optimization=False`, and with manual optimization no batch can begin before the "
            "one before it has ended. Use another schedule than 'async', such as 'auto', or automatic optimization."
        )
    if first_rank and any(is_placeholder(tensor) for _, tensor in named_tensors(module)):
        raise ConfigurationError(
            f"{name} still lacks the weights of other ranks, because an earlier run ended with an error. Build it "
            "anew, or load it from a checkpoint."
        )


def check_callbacks(callbacks: Iterable[object]) -> None:
    """Check the callbacks of a Trainer that has several processes.

    Raises:
        ConfigurationError: saying what to change.
    """
    for callback in callbacks:
        if isinstance(callback, BatchSizeFinder):
            raise ConfigurationError(
                f"{type(callback).__name__} (or `Tuner.scale_batch_size`) tries batch sizes until memory runs out, and "
                "a stage that has run out of memory ends the whole pipeline. Set the batch size yourself; with "
                "`device_memory=` the strategy says before the first step what each stage needs and what would fit."
            )
        if isinstance(callback, ModelPruning):
            raise ConfigurationError(
                f"{type(callback).__name__} replaces weights by products with masks while the model is partitioned. "
                "Prune it after `fit` (`torch.nn.utils.prune`), when it is whole on every process, or on one device."
            )


def users(module: LightningModule, trainer: Trainer) -> Iterator[LightningModule | Callback]:
    """The module, and callbacks of the user's own.

    Args:
        module: The user's module.
        trainer: Its trainer.
    """
    yield module
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        library = type(callback).__module__.startswith(("lightning.", "pytorch_lightning.", "lightning_lwpm."))
        if not library or isinstance(callback, LambdaCallback):
            yield callback


def warn_of_gradients(places: Iterable[LightningModule | Callback]) -> None:
    """Say where hooks that every rank runs look at gradients, while each rank has those of its own layers.

    Args:
        places: The user's module and callbacks.
    """
    for place in places:
        for hook in BEFORE_STEPS:
            if looks_at_gradients(place, hook):
                rank_zero_warn(
                    f"`{hook}` of {type(place).__name__} looks at gradients: each rank has those of its own layers, so "
                    "a norm over all of them is not that of one device. `on_train_batch_end` of the module has all of "
                    "them, and clipping by the Trainer, or by `torch.nn.utils.clip_grad_norm_`, goes by all."
                )


def looks_at_gradients(place: LightningModule | Callback, hook: str) -> bool:
    """Whether the code of a hook itself does.

    Args:
        place: The module or callback.
        hook: The name of the hook.
    """
    code = getattr(getattr(type(place), hook, None), "__code__", None)
    return code is not None and bool({"grad", "grad_norm"}.intersection(code.co_names))


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
        kind = type(optimizer).__name__
        separable = is_separable(optimizer)
        if separable is None:
            rank_zero_warn(
                f"it could not be tried whether {kind} steps each parameter by its own gradient alone. If it looks at "
                "all of them at once (a norm over all, a learning rate found for all), each stage looks at its own "
                "only, and the numbers are not those of one device."
            )
        elif not separable:
            raise ConfigurationError(
                f"{kind} looks at the gradients of all parameters at once (such as a norm over all, or a learning rate "
                "found for all), and no rank of a pipeline has them. Switch that off if it has an option for it (and "
                "use the Trainer's `gradient_clip_val` for clipping), or use another optimizer such as AdamW."
            )


def warn_of_batch_norm(module: LightningModule, count: int, deferred: bool) -> None:
    """Say what BatchNorm's statistics are of, where that is not the batch.

    Args:
        module: The user's module.
        count: Number of micro-batches.
        deferred: Whether running statistics are those of whole batches.
    """
    names = [name for name, layer in batch_norms(module).items() if layer.training]
    if names and count > 1 and not deferred:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"'{names[0]}'{more}: BatchNorm takes its statistics from a micro-batch, of which a batch has {count}, as "
            "it does where gradients are accumulated. Pass deferred_batch_norm=True to update running statistics by "
            "whole batches, or num_microbatches=1.",
            stacklevel=2,
        )
