"""Compares the names and shapes of a checkpoint with those of the model before a single weight is changed."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.placeholder import is_placeholder, placeholder_like
from lightning_lwpm.staging.placement import swap

__all__ = ["check_names"]


def check_names(module: nn.Module, saved: Mapping[str, Any], strict: bool) -> None:
    """Check that weights can be loaded.

    Args:
        module: The model; it is as before afterwards.
        saved: The ``state_dict`` of the checkpoint.
        strict: Whether names must be the same.

    Raises:
        ConfigurationError: telling every mismatch.
    """
    own = module.state_dict()
    missing = [f"missing in the checkpoint: '{name}' {_shape(own[name])}" for name in own if name not in saved]
    unexpected = [f"not in the model: '{name}' {_shape(saved[name])}" for name in saved if name not in own]
    shapes = [
        f"'{name}' is {_shape(saved[name])} in the checkpoint and {_shape(own[name])} in the model"
        for name in own
        if name in saved and _shape(own[name]) != _shape(saved[name])
    ]
    told = [*shapes, *(missing + unexpected if strict else [])]
    if not told:
        return
    # hooks of the user's may make them fit: try, with tensors that cannot be written to
    originals: dict[int, Any] = {}

    def stand_in(_: str, tensor: Any) -> Any:
        new = tensor if is_placeholder(tensor) else placeholder_like(tensor)
        originals[id(new)] = tensor
        return new

    swap(module, stand_in)
    try:
        module.load_state_dict(saved, strict=strict)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the checkpoint does not fit {type(module).__name__}, and nothing was loaded:\n  "
            + "\n  ".join(told)
            + ("\nTo load what fits by name, set `strict_loading = False` in the module." if not shapes else "")
        ) from error
    finally:
        swap(module, lambda _, tensor: originals[id(tensor)])


def _shape(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
