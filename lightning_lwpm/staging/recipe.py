"""Recipes: the calls that make the values of a tensor, to be made once more where they are needed."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.tree import tensors

__all__ = ["MAKING", "Call", "Kept", "Recipe", "View", "kept", "part_of", "resolved"]

MAKING = threading.local()
"""What has been made so far, while values are made."""


@dataclass(frozen=True)
class View:
    """A tensor among the arguments of a noted call: a part of a recipe's memory, at one moment.

    Attributes:
        recipe: ``None`` for the one that the call belongs to.
        length: So many calls of the recipe had been noted.
    """

    recipe: "Recipe | None"
    length: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Kept:
    """A stored tensor among the arguments of a noted call."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise ConfigurationError(
                f"a tensor {tuple(self.tensor.shape)} from which weights of the model are made was changed in place "
                "later on: change a `.clone()` of it"
            )
        return self.tensor

    def __reduce__(self) -> Any:
        return kept, (self.get(),)


def kept(tensor: Tensor) -> Kept:
    return Kept(tensor, tensor._version)


@dataclass(frozen=True)
class Call:
    """A noted call.

    Attributes:
        function: The name of an operator of torch, or a function that makes a tensor from nothing.
        index: Which of its results makes the tensor, for the first call of a recipe.
        state: The random generator's state before it; ``None`` for calls that draw nothing.
        fills: Whether what was before does not matter.
    """

    function: str | Callable[..., Tensor]
    args: Any
    kwargs: Any
    index: int = 0
    state: Tensor | None = None
    fills: bool = False

    def run(self, memory: Tensor | None) -> Any:
        function = _operator(self.function) if isinstance(self.function, str) else self.function
        args, kwargs = resolved((self.args, self.kwargs), memory)
        if self.state is None:
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return function(*args, **{**kwargs, "generator": torch.Generator().set_state(self.state)})
        with torch.random.fork_rng([]):
            torch.set_rng_state(self.state)
            return function(*args, **kwargs)


class Recipe:
    """The calls that make the memory of a tensor: the first one makes it, the others change it."""

    def __init__(self, calls: list[Call], size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> None:
        self.calls, self.size, self.stride, self.dtype = calls, size, stride, dtype

    def make(self, length: int) -> Tensor:
        """The memory, as the first calls made it; what is needed for it is made once."""
        known: dict[Any, Tensor] = MAKING.known
        if (self, length) not in known:
            known[self, length] = self._made(length)
        return known[self, length]

    def _made(self, length: int) -> Tensor:
        first = tensors(self.calls[0].run(None))[self.calls[0].index]
        whole = first.storage_offset() == 0 and first.untyped_storage().nbytes() == first.numel() * first.element_size()
        if first.stride() != self.stride or not whole:
            first = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=first.device).copy_(first)
        start = max((n for n in range(1, length) if self.calls[n].fills), default=1)
        for call in self.calls[start:length]:
            call.run(first)
        return first


def resolved(value: Any, memory: Tensor | None) -> Any:
    """Noted arguments with tensors in them."""
    if isinstance(value, Kept):
        return value.get()
    if isinstance(value, View):
        whole = memory if value.recipe is None else value.recipe.make(value.length)
        assert whole is not None
        return part_of(whole, value)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)([resolved(item, memory) for item in value])
    if isinstance(value, dict):
        return {key: resolved(item, memory) for key, item in value.items()}
    return value


def part_of(whole: Tensor, view: View) -> Tensor:
    part = torch.empty(0, dtype=view.dtype, device=whole.device)
    return part.set_(whole.untyped_storage(), view.offset, view.size, view.stride)


def _operator(name: str) -> Any:
    space, rest = name.split("::")
    packet, overload = rest.rsplit(".", 1)
    return getattr(getattr(getattr(torch.ops, space), packet), overload)
