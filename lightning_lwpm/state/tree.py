"""Checkpoints as trees: tensors by path, and copies with other tensors in their places.

Modules are part of the tree: ``save_hyperparameters()`` puts those there that a model was made from.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lwpm.staging.placement import named_tensors

__all__ = ["Path", "replaced", "tell", "walk"]

Path = tuple[Any, ...]


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors by path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))
    elif isinstance(value, nn.Module):
        yield from (((*path, name), tensor) for name, tensor in named_tensors(value))


def replaced(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A copy of the containers, with tensors as ``change`` has them; classes and attributes of containers are kept."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        new = value.copy()
        for key in value:
            new[key] = replaced(value[key], change, (*path, key))
        return new
    if isinstance(value, list):
        return [replaced(item, change, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, tuple) and any(True for _ in walk(value)):
        items = [replaced(item, change, (*path, index)) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, nn.Module):
        made: dict[int, Any] = {}  # in the copy, in the places of what is there
        for name, tensor in named_tensors(value):
            other = change((*path, name), tensor)
            wraps = isinstance(tensor, nn.Parameter) and not isinstance(other, nn.Parameter)
            made[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if wraps else other
        return copy.deepcopy(value, made)
    return value


def tell(path: Path) -> str:
    """A path for people: ``['state_dict']['layer.weight']``."""
    return "".join(f"[{part!r}]" for part in path)
