"""What Python objects hold: lists, dicts and their like, and objects of the user's own classes, to any depth."""

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["containers", "content_of", "fill", "is_users"]

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "lightning_lwpm"}) | (
    sys.stdlib_module_names - {"__main__"}
)


def is_users(value: Any) -> bool:
    """Whether a value is an object of a class of the user's own, or of a library that this one knows nothing of."""
    kind = type(value)
    known = isinstance(value, nn.Module | type) or kind.__module__.partition(".")[0] in _LIBRARIES
    return not known and hasattr(value, "__dict__")


def containers(values: Iterable[Any]) -> dict[int, Any]:
    """All containers in some values, to any depth, by ``id``; the ``__dict__`` of users' objects among them."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) is tuple:
            waiting.extend(value)
        elif type(value) in _CONTAINERS or is_users(value):
            container = value if type(value) in _CONTAINERS else vars(value)
            if id(container) not in found:
                found[id(container)] = container
                waiting.extend(container.values() if isinstance(container, dict) else container)
    return found


def content_of(container: Any) -> Any:
    """What a container holds, as something that later changes leave alone."""
    return dict(container) if isinstance(container, dict) else list(container)


def fill(container: Any, content: Any) -> None:
    """Give a container, which stays the same object, its content back."""
    if not isinstance(container, dict) or list(container) != list(content):
        container.clear()
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)
