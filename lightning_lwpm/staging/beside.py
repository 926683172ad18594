"""What a layer changes beside returning something: attributes of its modules, and objects that it is given.

::

    hidden = block(hidden, cache)      rank of the block                 every later rank
                                       cache.layers: [] -> [keys, ...]   cache.layers: [] -> [remote tensor, ...]

A layer that writes into an object, such as a cache of keys and values, does so on its own rank only. So what has
changed there goes with what the call returns, and later ranks change their objects likewise: code between layers finds
the same in them on every rank. Objects are numbered in the order in which they are found in the arguments.
"""

import importlib
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.contents import fill, is_users
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.record import version
from lightning_lwpm.staging.remote import Remote
from lightning_lwpm.staging.tree import Opaque, duplicate, is_plain
from lightning_lwpm.staging.versions import NOT_STATE

__all__ = ["Attributes", "Objects"]

_LISTS: dict[str, Any] = {kind.__name__: kind for kind in (list, deque)}
_DICTS: dict[str, Any] = {kind.__name__: kind for kind in (dict, OrderedDict)}
_CONTAINERS = (*_LISTS.values(), *_DICTS.values())
_MOST = 1000
"""What has more items is a vocabulary or the like: no layer changes it."""


class Attributes:
    """The attributes in which the modules of a unit store tensors.

    Args:
        unit: The unit.
        module: The unit's module.
    """

    def __init__(self, unit: Unit, module: nn.Module) -> None:
        self._slots = [(vars(module.get_submodule(path)), name) for path, name in unit.attributes]

    def __bool__(self) -> bool:
        return bool(self._slots)

    def changed(self) -> Any:
        """What the call has stored, on the rank that runs it."""
        return [store.get(name) for store, name in self._slots]

    def adopt(self, values: Any) -> None:
        """Store the same on another rank.

        Args:
            values: What :meth:`changed` gave there.
        """
        for (store, name), value in zip(self._slots, values, strict=True):
            store[name] = value


class Objects(Attributes):
    """These, and the objects, lists and dicts among the arguments of a call.

    Args:
        unit: The unit.
        module: The unit's module.
        arguments: The arguments of the call.
        made: By ``id``, tensors of which it is known what made them.

    Attributes:
        kept: On another rank, whether the call has left more on the layer, which is not told.
    """

    def __init__(self, unit: Unit, module: nn.Module, arguments: tuple[Any, Any], made: Collection[int] = ()) -> None:
        super().__init__(unit, module)
        self._found = list(_objects([*arguments[0], *arguments[1].values()]))
        self._module, self._state, self.kept = module, _state(module), False
        self._before = [
            [(key, value, _image(value, made)) for key, value in _items(_container(each))] for each in self._found
        ]

    def __bool__(self) -> bool:
        return True

    def changed(self) -> Any:
        known = {id(each): ("old", number) for number, each in enumerate(self._found)}
        changes = []
        for number, (each, before) in enumerate(zip(self._found, self._before, strict=True)):
            now = list(_items(_container(each)))
            was = {key: (value, image) for key, value, image in before}
            kept = [key in was and was[key][0] is value and _same(value, was[key][1]) for key, value in now]
            if len(now) != len(before) or not all(kept):
                told = [None if keep else _written(value, known) for (_, value), keep in zip(now, kept, strict=True)]
                changes.append((number, [key for key, _ in now], told))
        return super().changed(), changes, self._kept()

    def _kept(self) -> bool:
        """Whether the call has left something on its modules, beside what is known to be left there."""
        known = {(id(store), name) for store, name in self._slots}
        now, before = _state(self._module), self._state
        return now.keys() - known != before.keys() - known or any(
            key not in known and not all(map(_is, values, before[key])) for key, values in now.items()
        )

    def adopt(self, values: Any) -> None:
        stored, changes, self.kept = values
        super().adopt(stored)
        made: dict[Any, Any] = {("old", number): each for number, each in enumerate(self._found)}
        for number, keys, told in changes:
            container = _container(self._found[number])
            before = dict(_items(container))
            items = [
                (key, before.get(key) if value is None else _read(value, made))
                for key, value in zip(keys, told, strict=True)
            ]
            fill(container, dict(items) if isinstance(container, dict) else [value for _, value in items])


def _state(module: nn.Module) -> dict[tuple[int, str], list[Any]]:
    """Attributes and buffers of a module and those in it, with what shows whether they change inside."""
    found: dict[tuple[int, str], list[Any]] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in NOT_STATE:
                inside = [] if type(value) not in _CONTAINERS or len(value) > _MOST else list(_items(value))
                found[id(vars(part)), name] = [value, len(inside), *[item for _, item in inside]]
        for name, buffer in part._buffers.items():
            found[id(part._buffers), name] = [buffer, version(buffer) if buffer is not None else 0]
    return found


def _is(value: Any, before: Any) -> bool:
    return value is before or (type(value) is int and value == before)


def _objects(values: list[Any]) -> Iterator[Any]:
    """All objects of users, lists and dicts in some values, to any depth, each once."""
    seen: set[int] = set()
    waiting = list(reversed(values))
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, Tensor) or is_plain(value):
            continue
        if type(value) is tuple:
            waiting.extend(reversed(value))
        elif type(value) in _CONTAINERS or is_users(value):
            seen.add(id(value))
            container = _container(value)
            if len(container) <= _MOST:
                yield value
                waiting.extend(reversed([item for _, item in _items(container)]))


def _container(value: Any) -> Any:
    return value if type(value) in _CONTAINERS else vars(value)


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items() if isinstance(container, dict) else enumerate(container))


def _image(value: Any, made: Collection[int]) -> Any:
    """What shows whether a tensor is changed in place."""
    if type(value) is not Tensor:
        return None
    if not value.is_inference():
        return version(value)
    # torch counts no changes of it; what a layer has made is fetched as it is in the end
    return None if id(value) in made else duplicate(value)


def _same(value: Any, image: Any) -> bool:
    if image is None:
        return True
    return version(value) == image if isinstance(image, int) else torch.equal(value, image)


def _written(value: Any, known: dict[int, tuple[str, int]]) -> Any:
    """A value as something that can be sent, with the tensors in it.

    Args:
        value: The value.
        known: How objects are called that the other ranks have too, or that have been written before.
    """
    if isinstance(value, Tensor):
        return "tensor", value.materialise() if type(value) is Remote else value
    if is_plain(value):
        return "plain", value
    if id(value) in known:
        return known[id(value)]
    kind = type(value)
    name = known[id(value)] = ("new", len(known))
    if kind is tuple or kind in _LISTS.values():
        return kind.__name__, name, [_written(item, known) for item in value]
    if kind in _DICTS.values():
        return kind.__name__, name, list(value), [_written(item, known) for item in value.values()]
    if is_users(value) and "<locals>" not in kind.__qualname__:
        attributes = vars(value)
        about = kind.__module__, kind.__qualname__, list(attributes)
        return "object", name, about, [_written(item, known) for item in attributes.values()]
    return "other", kind.__qualname__


def _read(told: Any, made: dict[Any, Any]) -> Any:
    """What :func:`_written` has written.

    Args:
        told: That.
        made: Objects by what they are called.
    """
    kind, about, *more = told
    if kind in ("tensor", "plain"):
        return about
    if kind in ("old", "new"):
        return made[kind, about]
    if kind == "other":
        return Opaque(about)
    if kind == "tuple":
        return tuple([_read(item, made) for item in more[0]])
    if kind in _LISTS:
        made[about] = items = _LISTS[kind]()
        items.extend(_read(item, made) for item in more[0])
        return items
    if kind in _DICTS:
        made[about] = table = _DICTS[kind]()
        table.update((key, _read(item, made)) for key, item in zip(*more, strict=True))
        return table
    (module, qualified, names), items = more
    cls: Any = importlib.import_module(module)
    for part in qualified.split("."):
        cls = getattr(cls, part)
    made[about] = value = cls.__new__(cls)
    vars(value).update((name, _read(item, made)) for name, item in zip(names, items, strict=True))
    return value
