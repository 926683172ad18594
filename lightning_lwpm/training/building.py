"""Models that were built without values: under ``torch.device("meta")``, or lazily and never filled."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.lazy import lazy_like, unfilled
from lightning_lwpm.staging.placement import named_tensors, swap
from lightning_lwpm.staging.tree import tensors

__all__ = ["called_within", "fill_layers", "initialise"]

_SHOWN = 10


def initialise(module: nn.Module) -> None:
    """Let a model that was built on the meta device say how its weights are made, layer by layer; nothing is made yet.

    Args:
        module: The model.

    Raises:
        ConfigurationError: naming the parameters and buffers that nothing fills, and metrics without values.
    """
    fill_layers(module)
    empty = [name for name, tensor in named_tensors(module) if unfilled(tensor)]
    if empty:
        shown = ", ".join(f"'{name}'" for name in empty[:_SHOWN]) + (", ..." if len(empty) > _SHOWN else "")
        raise ConfigurationError(
            f"{len(empty)} parameters or buffers of {type(module).__name__} have no values, and no `reset_parameters` "
            f"of their layers fills them: {shown}. Give these layers a `reset_parameters` method, or build the model "
            'in `configure_model` or under `trainer.init_module()` in the place of `torch.device("meta")`: large '
            "weights are then made only where they are held."
        )


def called_within(module: LightningModule, context: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Let ``configure_model`` run in a context whoever calls it: callbacks do so before Lightning does.

    Args:
        module: The user's module.
        context: Makes the context.

    Returns:
        Puts the hook back.
    """
    original, own = module.configure_model, "configure_model" in vars(module)

    @functools.wraps(original)
    def within() -> None:
        with context():
            original()

    module.__dict__["configure_model"] = within

    def undo() -> None:
        if vars(module).get("configure_model") is within:
            del module.__dict__["configure_model"]
            module.__dict__.update({"configure_model": original} if own else {})

    return undo


def fill_layers(module: nn.Module) -> None:
    """Like :func:`initialise`, but what nothing fills may get its values later, from a checkpoint.

    A layer says it with ``reset_parameters``, as those of torch do, or the model that it belongs to with
    ``_init_weights``, as those of ``transformers`` do. Layers come in the order of ``module.modules()``. What torch's
    attention and transformers do with ``_reset_parameters`` comes after the layers in them, as where they are built.

    Args:
        module: The model.

    Raises:
        ConfigurationError: naming metrics without values.
    """
    metrics = [
        f"'{name}' ({type(part).__name__})"
        for name, part in module.named_modules()
        if isinstance(part, Metric) and any(state.is_meta for state in tensors(part.metric_state))
    ]
    if metrics:
        raise ConfigurationError(
            f"metrics of {type(module).__name__} were built on the meta device, where what they count has no values: "
            f'{", ".join(metrics)}. Build them outside of `with torch.device("meta")`, or build the model in '
            "`configure_model` or under `trainer.init_module()`."
        )
    meta = {name for name, tensor in named_tensors(module) if tensor.is_meta}
    if meta:
        swap(module, lambda name, tensor: lazy_like(tensor) if name in meta else tensor)
        with torch.no_grad():
            _fill(module, None)


def _fill(module: nn.Module, family: Any) -> None:
    """Fill the unfilled tensors of a module and of those below it."""
    family = module if hasattr(module, "_init_weights") else family
    last = getattr(module, "_reset_parameters", None) if family is None else None
    last = last if last is not None and all(unfilled(p) for p in module.parameters()) else None
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(map(unfilled, own)):
        if family is not None:
            family._init_weights(module)
        elif callable(reset := getattr(module, "reset_parameters", None)) and reset != last:
            reset()
    for child in module.children():
        _fill(child, family)
    if callable(last):
        last()
