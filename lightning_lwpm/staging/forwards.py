"""Stand-ins for what modules do, for a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["replaced"]

_ABSENT = object()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` within the block; afterwards they are as they were.

    Args:
        forwards: By module, what is called in the place of its ``forward``.
    """
    before = [(module, vars(module).get("forward", _ABSENT)) for module in forwards]
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, former in before:
            if former is _ABSENT:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = former
