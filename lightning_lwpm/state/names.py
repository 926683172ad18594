"""Compares what a checkpoint has with what the run has, before anything is changed."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.placeholder import is_placeholder, placeholder_like
from lightning_lwpm.staging.placement import swap

__all__ = ["by_place", "check_names", "layer_of"]


def check_names(
    module: nn.Module, saved: Mapping[str, Any], strict: bool, stage: Callable[[str], str | None] = lambda _: None
) -> None:
    """Check that weights can be loaded.

    Args:
        module: The model; it is as before afterwards.
        saved: The ``state_dict`` of the checkpoint.
        strict: Whether names must be the same.
        stage: From the name of a weight to the stage that holds it, in words; ``None`` where it is not known.

    Raises:
        ConfigurationError: telling every mismatch, by stage, or by layer where no stage is known.
    """
    own = module.state_dict()
    shapes = {
        name: f"'{name}' is {_shape(saved[name])} in the checkpoint and {_shape(own[name])} in the model"
        for name in own
        if name in saved and _shape(own[name]) != _shape(saved[name])
    }
    told = dict(shapes)
    if strict:
        told |= {name: f"missing in the checkpoint: '{name}' {_shape(own[name])}" for name in own if name not in saved}
        told |= {name: f"not in the model: '{name}' {_shape(saved[name])}" for name in saved if name not in own}
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
        return
    except RuntimeError as caught:
        error = caught
    finally:
        swap(module, lambda _, tensor: originals[id(tensor)])
    raise ConfigurationError(
        f"the checkpoint does not fit {type(module).__name__}, and nothing was loaded:"
        + "".join(by_place(told, lambda name: stage(name) or layer_of(module, name)))
        + ("\nTo load what fits by name, set `strict_loading = False` in the module." if not shapes else "")
    ) from error


def by_place(told: Mapping[str, str], place: Callable[[str], str]) -> list[str]:
    """Mismatches under headings that say where they are.

    Args:
        told: The words, by name of what does not fit.
        place: From a name to where it is, in words.
    """
    places: dict[str, list[str]] = {}
    for name, line in told.items():
        places.setdefault(place(name), []).append(line)
    return [f"\n  {place}:" + "".join(f"\n    {line}" for line in lines) for place, lines in places.items()]


def layer_of(module: nn.Module, name: str) -> str:
    """The layer of a model that a weight belongs to, or would belong to, in words.

    Args:
        module: The model.
        name: Of the weight.
    """
    path = name.rpartition(".")[0]
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return "in no layer of the model"
    return f"layer '{path}' ({type(layer).__name__})" if path else f"{type(module).__name__} itself"


def _shape(value: Any) -> Any:
    return tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
