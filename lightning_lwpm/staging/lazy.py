"""Lazy tensors: they know how their values are made, and are made where they are needed.

::

    nn.Linear(4096, 4096)       empty --> uniform_ (state of the generator) --> ...         a recipe: some kilobytes
    realised(weight)            the same calls once more, in the same order                 the same bits

While a model is built lazily, large tensors store no values. Each call that fills or changes one is noted; random
numbers are drawn once for real and dropped, so that the generator goes on as if they had been kept. So a rank realises
the weights that it holds, with the numbers that they have where the model is built whole, and the peak of host memory
is its share and one tensor. Whatever reads a lazy tensor gets its values, made for that call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lwpm.staging.heap import freed_at_once
from lightning_lwpm.staging.recipe import MAKING, Call, Recipe, View, kept, part_of, resolved
from lightning_lwpm.staging.tree import map_tensors, tensors

__all__ = ["Lazy", "built_lazily", "is_lazy", "lazy_like", "realised", "unfilled"]

SMALL_BYTES = 1 << 14
"""Tensors up to this size are stored as always: they matter to nobody's memory, and code reads them."""

_BLOCK = threading.local()
_HOST = torch.device("cpu")
_COPIES = frozenset({"aten::clone", "aten::_to_copy"})
_FILLS = frozenset({"aten::copy_", "aten::zero_", "aten::fill_", "aten::uniform_", "aten::normal_"})
_EMPTY = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})


class Lazy(Tensor):
    """A tensor whose values are made where they are needed.

    Attributes:
        recipe: Makes them.
        shell: The same tensor on the meta device; views of one another share its memory.
    """

    recipe: Recipe
    shell: Tensor

    @staticmethod
    def __new__(cls, recipe: Recipe, shell: Tensor, device: torch.device) -> "Lazy":
        new = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # public for subclass authors
            cls,
            shell.shape,
            strides=shell.stride(),
            storage_offset=shell.storage_offset(),
            dtype=shell.dtype,
            device=device,
        )
        new.recipe, new.shell = recipe, shell.detach()
        return new

    def __init__(self, *_: Any) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatched(func, args, kwargs or {}, False)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without autograd; setting it gives this one other values, as of any tensor."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        Tensor.data.__set__(self, self.take_over(values))  # type: ignore[attr-defined]

    def take_over(self, values: Tensor) -> "Lazy":
        """Hold what another tensor holds, in the same memory if that one is lazy; returns it as a lazy one."""
        made = values if isinstance(values, Lazy) else _from_source(_identity, kept(values.detach()))
        self.recipe, self.shell = made.recipe, made.shell
        return made

    def tolist(self) -> Any:
        """Its values as Python numbers."""
        return realised(self).tolist()

    def numpy(self, **kwargs: Any) -> Any:
        """Its values as an array of its own."""
        return realised(self.detach()).numpy(**kwargs)

    def view_at(self, owner: "Recipe | None" = None) -> View:
        """What stands for it, as it is now, among the arguments of a noted call, which may be one of its own recipe."""
        s = self.shell
        own = self.recipe is owner
        length = len(self.recipe.calls)
        return View(None if own else self.recipe, length, tuple(s.shape), s.stride(), int(s.storage_offset()), s.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Lazy({tuple(self.shape)}, {self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            memo[id(self)] = copy = _as(self, self.detach().clone())
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.view_at(), str(self.device), isinstance(self, nn.Parameter), self.requires_grad)


def _rebuilt(view: View, device: str, parameter: bool, grad: bool) -> Tensor:
    recipe = view.recipe
    assert recipe is not None
    whole = torch.empty_strided(recipe.size, recipe.stride, dtype=recipe.dtype, device="meta")
    new = Lazy(recipe, part_of(whole, view), torch.device(device))
    return nn.Parameter(new, grad) if parameter else new


# -- what functions of lazy tensors do ---------------------------------------------------------------------------


def _dispatched(func: Any, args: Any, kwargs: Any, building: bool) -> Any:
    schema = func._schema
    values = list(zip(schema.arguments, args, strict=False))
    values += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
    written = [t for a, value in values if a.alias_info is not None and a.alias_info.is_write for t in tensors(value)]
    if func is torch.ops.aten.set_.source_Tensor and is_lazy(args[0]) and args[0].shape == args[1].shape:
        args[0].take_over(args[1])  # as parametrizations do
        return args[0]
    if torch.Tag.inplace_view in func.tags and is_lazy(args[0]):  # another view of the same memory
        func(args[0].shell, *args[1:], **kwargs)
        with no_dispatch():
            return func(*args, **kwargs)
    if any(map(is_lazy, written)):
        return _changed(func, args, kwargs, written)
    if written:
        return func(*_real(args), **_real(kwargs))
    meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
    if meta or any(r.alias_info is not None for r in schema.returns):
        out = func(*map_tensors(_shell, args), **map_tensors(_shell, kwargs))
        if meta:
            return out
        source = next(t for t in tensors(args) if isinstance(t, Lazy))
        return map_tensors(lambda shell: Lazy(source.recipe, shell, source.device), out)
    if schema.name in _COPIES or building:
        return _noted(func, args, kwargs)
    return func(*_real(args), **_real(kwargs))


def _noted(func: Any, args: Any, kwargs: Any) -> Any:
    """Note a call that makes new tensors, if one of them is large; else make them."""
    on_meta = map_tensors(_to_meta, kwargs) | ({"device": torch.device("meta")} if "device" in kwargs else {})
    try:
        shells = tensors(out := func(*map_tensors(_to_meta, args), **on_meta))
    except (NotImplementedError, RuntimeError):  # the shape of the result follows from values
        shells = []
    if not any(shell.numel() * shell.element_size() > SMALL_BYTES for shell in shells):
        return func(*_real(args), **_real(kwargs))
    state = _drawn(func, args, kwargs)
    given = next((t.device for t in tensors((args, kwargs))), torch.device("cpu"))
    device = torch.device(kwargs.get("device") or given)
    numbers = iter(range(len(shells)))

    def lazy(shell: Tensor) -> Lazy:
        call = Call(_name(func), _stored(args), _stored(kwargs), next(numbers), state)
        return Lazy(Recipe([call], tuple(shell.shape), shell.stride(), shell.dtype), shell, device)

    return map_tensors(lazy, out)


def _changed(func: Any, args: Any, kwargs: Any, written: Any) -> Any:
    """Note a call that changes lazy tensors."""
    if len({t.recipe if isinstance(t, Lazy) else None for t in written}) > 1:
        raise RuntimeError(f"{func} changes several tensors, of which some have no values yet: change them one by one")
    state = _drawn(func, args, kwargs)
    calls = []
    for tensor in written:
        others = any(
            isinstance(t, Lazy) and t.recipe is tensor.recipe for t in tensors((args, kwargs)) if t is not tensor
        )
        fills = func._schema.name in _FILLS and not others and tensor.numel() == _numel(tensor.recipe.size)
        stored, stored_kwargs = _stored(args, tensor.recipe), _stored(kwargs, tensor.recipe)
        calls.append(Call(_name(func), stored, stored_kwargs, 0, state, fills))
    for tensor, call in zip(written, calls, strict=True):
        tensor.recipe.calls.append(call)
    return written[0] if func._schema.returns else None


def _drawn(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The generator's state, if a call draws random numbers; it is made for real, so that the generator goes on."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = kwargs.get("generator")
    state: Tensor = generator.get_state() if generator is not None else torch.get_rng_state()
    if func._schema.is_mutable and is_lazy(args[0]):  # what it holds before does not matter
        first = args[0]
        blank = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype)
        func(blank, *_real(args[1:]), **_real(kwargs))
    else:
        func(*_real(args), **_real(kwargs))
    return state


def _stored(value: Any, owner: Recipe | None = None) -> Any:
    """Arguments as they are noted."""

    def noted(tensor: Tensor) -> Any:
        if isinstance(tensor, Lazy):
            return tensor.view_at(owner)
        tensor = tensor.detach()
        return kept(tensor.clone() if tensor.numel() * tensor.element_size() <= SMALL_BYTES else tensor)

    found = map_tensors(noted, value)
    if isinstance(found, dict):  # the state stands for the generator
        return {k: True if isinstance(v, torch.Generator) else v for k, v in found.items() if v is not None}
    return found


def _real(value: Any) -> Any:
    return map_tensors(lambda tensor: realised(tensor.detach()) if is_lazy(tensor) else tensor, value)


def _shell(tensor: Tensor) -> Tensor:
    return tensor.shell if isinstance(tensor, Lazy) else tensor


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.shell if isinstance(tensor, Lazy) else tensor.to("meta")


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def _name(func: Any) -> str:
    return f"{func._schema.name}.{func._overloadname}"


def _as(like: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, like.requires_grad) if isinstance(like, nn.Parameter) else values


# -- for others --------------------------------------------------------------------------------------------------


class _Building(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(MAKING, "known", None) is not None:
            return func(*args, **kwargs)
        found = tensors((args, kwargs))
        if any(map(is_lazy, found)):
            return _dispatched(func, args, kwargs, True)
        if found or torch.device(kwargs.get("device") or "cpu").type != "cpu" or func._schema.is_mutable:
            return func(*args, **kwargs)
        return _noted(func, args, kwargs)


@contextmanager
def built_lazily() -> Iterator[None]:
    """Large tensors that are made in the block on the host are lazy."""
    if getattr(_BLOCK, "entered", False):
        yield
        return
    _BLOCK.entered = True
    try:
        with freed_at_once(), _Building():
            yield
    finally:
        _BLOCK.entered = False


def _from_source(source: Callable[..., Tensor], *args: Any) -> Lazy:
    """A lazy tensor whose values ``source(*args)`` gives, which can be sent to another process.

    Args:
        source: A function of a module.
        args: Its arguments.
    """
    first = source(*(resolved(arg, None) for arg in args))
    shell = torch.empty_like(first, device="meta")
    recipe = Recipe([Call(source, args, {})], tuple(shell.shape), shell.stride(), shell.dtype)
    return Lazy(recipe, shell, first.device)


def lazy_like(tensor: Tensor) -> Tensor:
    """A lazy tensor in the place of one on the meta device, of which nothing is known yet."""
    shell = tensor.detach()
    call = Call("aten::empty_strided.default", (tuple(shell.shape), shell.stride()), {"dtype": shell.dtype})
    recipe = Recipe([call], tuple(shell.shape), shell.stride(), shell.dtype)
    return _as(tensor, Lazy(recipe, torch.empty_like(shell), _HOST))


def realised(tensor: Tensor) -> Tensor:
    """The tensor itself, with values."""
    if not isinstance(tensor, Lazy):
        return tensor
    view = tensor.view_at()
    before, MAKING.known = getattr(MAKING, "known", None), {}
    try:
        with torch.no_grad():
            values = part_of(tensor.recipe.make(view.length), view).to(tensor.device)
    finally:
        MAKING.known = before
    return _as(tensor, values)


def unfilled(tensor: Tensor) -> bool:
    """Whether nothing says what a lazy tensor holds."""
    if not isinstance(tensor, Lazy) or len(tensor.recipe.calls) > 1:
        return False
    first = tensor.recipe.calls[0].function
    return isinstance(first, str) and first.rsplit(".", 1)[0] in _EMPTY


def is_lazy(value: Any) -> bool:
    """Whether ``value`` is a tensor whose values are not there yet."""
    return isinstance(value, Lazy)


def _identity(tensor: Tensor) -> Tensor:
    return tensor.clone()
