"""Puts steps between a model and what it calls: the ``forward`` of units, and autograd functions between layers.

What torch calls itself (hooks, ``__call__``) goes on as always; afterwards the modules are as they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from lightning_lwpm.staging.forwards import replaced
from lightning_lwpm.staging.layout import Unit

__all__ = ["Interception"]


class Interceptor(Protocol):
    """Decides what a call does."""

    inside: bool
    """Whether a layer or function is being run as one thing: then nothing is intercepted."""

    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a unit."""

    def apply(self, cls: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of ``cls.apply``, for a subclass of ``autograd.Function``."""


class Interception:
    """Lets the step that runs decide what calls do.

    Args:
        units: The units and their modules.

    Attributes:
        step: The step; without one everything is called as always.
    """

    def __init__(self, units: Sequence[tuple[Unit, nn.Module]]) -> None:
        self.step: Interceptor | None = None
        self._forwards = {module: _Forward(self, unit, module) for unit, module in units}

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The time of a batch: to put everything in place and back for each step takes as long as a small layer."""
        for module, stand_in in self._forwards.items():
            stand_in.forward = module.forward
        apply = torch.autograd.Function.__dict__["apply"]

        def through(cls: Any, *args: Any, **kwargs: Any) -> Any:
            run, step = apply.__get__(None, cls), self.step
            return run(*args, **kwargs) if step is None or step.inside else step.apply(cls, run, args, kwargs)

        torch.autograd.Function.apply = classmethod(through)  # type: ignore[assignment, method-assign]
        try:
            with replaced(self._forwards):
                yield
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]


class _Forward:
    """Stands in for a unit's ``forward``."""

    def __init__(self, interception: Interception, unit: Unit, module: nn.Module) -> None:
        self.interception, self.unit, self.module, self.forward = interception, unit, module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = self.interception.step
        if step is None or step.inside:
            return self.forward(*args, **kwargs)
        return step.call(self.unit, self.module, self.forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self.module))
        function = getattr(self.forward, "__func__", None)
        return self.forward if owner is None or function is None else MethodType(function, owner)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")
