"""Nested values as (spec, leaves): tensors are leaves, everything else is the spec.

Unlike ``torch.utils._pytree`` it opens dataclasses, distributions and any ``Mapping``, and its specs can be sent to
another rank.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as pytree  # registry of third-party nodes (transformers' ModelOutput, ...)

__all__ = ["Opaque", "duplicate", "flatten", "is_plain", "map_tensors", "tensors", "unflatten"]

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, slice, type(...))


class Opaque:
    """Stands for a Python object that a layer of another stage returned and that cannot be sent.

    Using it in any way raises an error that says where it came from.
    """

    def __init__(self, kind: str) -> None:
        self.__dict__["_kind"] = kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            f"'.{name}' of an object of class '{self._kind}' that a layer on another stage returned: only tensors, "
            "plain values and containers of them can be used outside the layer that makes them"
        )


def flatten(value: Any, leaves: list[Tensor]) -> Any:
    """Append the tensors in ``value`` to ``leaves`` and return the spec that :func:`unflatten` reads."""
    kind = type(value)
    if isinstance(value, Tensor):
        leaves.append(value)
        return None
    if kind is tuple or kind is list:
        return (kind, None, [flatten(item, leaves) for item in value])
    if kind is dict:
        return (dict, list(value), [flatten(item, leaves) for item in value.values()])
    if is_plain(value):
        return ("plain", value, None)
    if kind in pytree.SUPPORTED_NODES:
        children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        return ("node", (kind, context), [flatten(item, leaves) for item in children])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ("namedtuple", kind, [flatten(item, leaves) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        children = [flatten(getattr(value, name, None), leaves) for name in names]
        return ("dataclass", (value, names), children)
    if isinstance(value, Distribution):  # as layers of variational autoencoders return
        names = list(vars(value))
        return ("dataclass", (value, names), [flatten(item, leaves) for item in vars(value).values()])
    if isinstance(value, Mapping):
        return ("mapping", (value, list(value)), [flatten(value[key], leaves) for key in value])
    if isinstance(value, tuple | list):
        return ("sequence", value, [flatten(item, leaves) for item in value])
    return ("object", value, None)


def unflatten(spec: Any, leaves: Iterator[Any]) -> Any:
    """The inverse of :func:`flatten`, with ``leaves`` in the place of the tensors."""
    if spec is None:
        return next(leaves)
    kind, context, children = spec
    if kind is tuple:
        return tuple([unflatten(child, leaves) for child in children])
    if kind is list:
        return [unflatten(child, leaves) for child in children]
    if kind is dict:
        return {key: unflatten(child, leaves) for key, child in zip(context, children, strict=True)}
    if kind == "plain" or kind == "object":
        return context
    items = [unflatten(child, leaves) for child in children]
    if kind == "node":
        return pytree.SUPPORTED_NODES[context[0]].unflatten_fn(items, context[1])
    if kind == "namedtuple":
        return context(*items)
    if kind == "sequence":
        return type(context)(items)
    original, names = context
    if kind == "dataclass":
        return _copy_with(original, dict(zip(names, items, strict=True)), _set_field)
    return _copy_with(original, dict(zip(names, items, strict=True)), lambda new, key, item: new.__setitem__(key, item))


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or the like, which nobody can change."""
    return isinstance(value, _PLAIN)


def _copy_with(original: Any, items: dict[Any, Any], assign: Callable[[Any, Any, Any], None]) -> Any:
    """A shallow copy of a dataclass or mapping with some items replaced; keeps what a constructor would lose."""
    import copy

    new = copy.copy(original)
    if isinstance(new, Mapping) and getattr(new, "data", None) is getattr(original, "data", ()):
        new.data = copy.copy(new.data)  # type: ignore[attr-defined]  # UserDict (transformers' BatchEncoding) shares its store with the copy
    for key, item in items.items():
        assign(new, key, item)
    return new


def portable(spec: Any) -> Any:
    """``spec`` with what cannot or should not be sent to another rank replaced by :class:`Opaque`."""
    if spec is None:
        return None
    kind, context, children = spec
    if kind == "object":
        return ("object", Opaque(type(context).__name__), None)
    if children is None:
        return spec
    children = [portable(child) for child in children]
    if kind in ("dataclass", "mapping"):
        # the shell's own tensors are in the leaves already: an emptied copy carries the class and the rest
        original, names = context
        context = (_copy_with(original, dict.fromkeys(names), _setter(kind)), names)
    if kind == "sequence":
        context = type(context)()
    return (kind, context, children)


def _setter(kind: str) -> Callable[[Any, Any, Any], None]:
    return _set_field if kind == "dataclass" else (lambda new, key, item: new.__setitem__(key, item))


def _set_field(new: Any, name: str, item: Any) -> None:
    """Set a field of a dataclass past its descriptors: some check or convert what is set, and know no placeholders."""
    if name in getattr(new, "__dict__", ()):
        new.__dict__[name] = item
    else:
        object.__setattr__(new, name, item)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in ``value``, in order."""
    leaves: list[Tensor] = []
    flatten(value, leaves)
    return leaves


def duplicate(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which decide on the last bits of what is computed from it; never a part of a graph.

    One of which elements share a place is returned itself: it cannot be changed in place.
    """
    with torch.no_grad():
        if tensor.layout is not torch.strided:
            return tensor.clone()
        if 0 in tensor.stride():
            return tensor
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        copy.copy_(tensor)
    return copy.requires_grad_(tensor.requires_grad)


def map_tensors(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with every tensor replaced by ``fn(tensor)``."""
    leaves: list[Tensor] = []
    spec = flatten(value, leaves)
    return unflatten(spec, iter([fn(leaf) for leaf in leaves])) if leaves else value
