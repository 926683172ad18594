"""Puts a step between a model and what it calls: the ``forward`` of units, and autograd functions between layers.

What torch calls itself (hooks, ``__call__``) goes on as always; afterwards the modules are as they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lightning_lwpm.staging.forwards import replaced
from lightning_lwpm.staging.layout import Unit

__all__ = ["intercepted"]


class Interceptor(Protocol):
    """Decides what a call does."""

    inside: bool
    """Whether a layer or function is being run as one thing: then nothing is intercepted."""

    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a unit."""

    def apply(self, cls: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of ``cls.apply``, for a subclass of ``autograd.Function``."""


@contextmanager
def intercepted(step: Interceptor, units: Sequence[tuple[Unit, nn.Module]]) -> Iterator[None]:
    """Intercept within the block."""
    apply = torch.autograd.Function.__dict__["apply"]

    def through(cls: Any, *args: Any, **kwargs: Any) -> Any:
        run = apply.__get__(None, cls)
        return run(*args, **kwargs) if step.inside else step.apply(cls, run, args, kwargs)

    torch.autograd.Function.apply = classmethod(through)  # type: ignore[assignment, method-assign]
    try:
        with replaced({module: _Forward(step, unit, module) for unit, module in units}):
            yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


class _Forward:
    """Stands in for a unit's ``forward`` while a step runs."""

    def __init__(self, step: Interceptor, unit: Unit, module: nn.Module) -> None:
        self.step, self.unit, self.module, self.forward = step, unit, module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.step.inside:
            return self.forward(*args, **kwargs)
        return self.step.call(self.unit, self.module, self.forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.forward
