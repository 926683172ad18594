"""Checkpoints as trees: tensors by path, and copies with other tensors in their places."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

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
    return value


def tell(path: Path) -> str:
    """A path for people: ``['state_dict']['layer.weight']``."""
    return "".join(f"[{part!r}]" for part in path)
