"""Plain attributes of modules: what the user's code sets on rank 0, which runs all of it, every rank gets.

::

    def training_step(self, batch, index):                  run by
        z = self.quantizer(self.encoder(batch), self.tau)   all
        loss = F.mse_loss(self.decoder(z), batch)           the last stage, on rank 0
        self.seen += 1                                      rank 0: the others have left the step
    def on_train_epoch_end(self):
        self.tau *= 0.9                                     rank 0

What has changed there goes with what rank 0 tells the others anyway, after each training batch and at the end of hooks
that it runs alone; they have it from the next batch on. What the next micro-batch wants to know: see ``late_changes``.

Plain are numbers, text, lists, dicts and sets of such, objects of the user's own classes that hold nothing else, and
small tensors without a graph. (Buffers that change so are never cut off from where they are used.) Tensors that layers
of other ranks have made (the state of a recurrent layer, for the next batch) are fetched at the end of the step, and
every rank gets them too, without a graph.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_lwpm.staging.contents import is_users
from lightning_lwpm.staging.reach import SMALL
from lightning_lwpm.staging.record import version
from lightning_lwpm.staging.remote import Remote, localise
from lightning_lwpm.staging.tree import map_tensors
from lightning_lwpm.staging.versions import NOT_STATE

__all__ = ["Attributes", "Change"]

Change = tuple[str, str, Any]
"""The name of a module, of an attribute of it, and what that is now."""

_MOST = 100
"""What has more items is no plain value: a list that grows with each batch would be looked at, and sent, each time."""

_HOLDING = (Remote, tuple, list, dict)
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, range, Enum, np.generic)
_OF_LIGHTNING = (NOT_STATE | vars(LightningModule()).keys()) - {"training"}


class Attributes:
    """The plain attributes of a model on this rank.

    Args:
        module: The model, partitioned.

    Attributes:
        ahead: Whether this rank begins with batches before rank 0 has told what it has changed in those before.
        late: Called with the module and the name of each attribute that a step has changed elsewhere only.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module, self.ahead = module, False
        self.late: Callable[[nn.Module, str], None] | None = None
        self._before: dict[tuple[str, str], Any] = {}  # images of what may change as the same object, and
        self._fixed: dict[tuple[str, str], Any] = {}  # what cannot: most there is, which is looked at in each batch
        self._fetched: list[Change] = []
        self._own: set[tuple[str, str]] = set()  # what this rank's part of a step changes by itself

    def watch(self) -> None:
        """Begin: what changes from now on is told by :meth:`changes`."""
        self._before = {}
        for key, image, value in self._look():
            if _is_fixed(value):
                self._fixed[key] = value
            else:
                self._fixed.pop(key, None)
                self._before[key] = image

    def changes(self) -> list[Change]:
        """What has changed since :meth:`watch`."""
        fetched, self._fetched = self._fetched, []
        return [(*key, value) for key, image, value in self._look() if self._was(key) != image] + fetched

    def _was(self, key: tuple[str, str]) -> Any:
        """The image of an attribute as it was."""
        return _image(self._fixed[key], {}) if key in self._fixed else self._before.get(key)

    def fetch(self) -> None:
        """On rank 0, at the end of a step: put values in the place of other ranks' tensors that it has stored."""
        self._fetched = []
        for path, module in _modules(self.module):
            own = vars(module)
            for name in own.keys() - _OF_LIGHTNING:
                value = own[name]
                if type(value) in _HOLDING and self._fixed.get((path, name)) is not value and _has_remote(value):
                    here = map_tensors(_here, value)
                    if isinstance(value, list):  # others may hold it too
                        value[:] = here
                    elif isinstance(value, dict):
                        value.update(here)
                    else:
                        own[name] = here
                    self._fetched.append((path, name, here))

    def adopt(self, changes: Iterable[Change], step: bool = False) -> None:
        """Take what has changed on rank 0.

        Args:
            changes: What rank 0 tells.
            step: Whether a step has changed it. Where this rank is ahead it keeps what its own part of the step has
                changed since :meth:`watch`, or ever: that is ahead too.
        """
        if step and self.ahead:
            self._own.update((path, name) for path, name, _ in self.changes())
        for path, name, value in changes:
            if step and (path, name) in self._own:
                continue
            module = self.module.get_submodule(path)
            attributes = module.__dict__
            old = attributes.get(name)
            if not _same(old, value):
                attributes[name] = _renewed(old, value)
                if step and self.late is not None:
                    self.late(module, name)

    def _look(self) -> Iterator[tuple[tuple[str, str], Any, Any]]:
        """Each plain attribute that may have changed since the latest :meth:`watch`.

        Yields:
            Its module and name, what is equal while it stays as it is, and its value.
        """
        seen: dict[int, Any] = {}
        fixed = self._fixed
        for path, module in _modules(self.module):
            own = vars(module)
            for name in own.keys() - _OF_LIGHTNING:
                value, key = own[name], (path, name)
                if fixed.get(key, fixed) is not value and (image := _image(value, seen)) is not None:
                    yield key, image, value


class _Seen:
    """A tensor as it was looked at, without its values: to read them would make the host wait for an accelerator."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, version(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self.tensor is other.tensor and self.version == other.version

    __hash__ = None  # type: ignore[assignment]


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules as ``named_modules`` has them, in a third of its time; without metrics: rank 0 tells their counts."""
    met: set[nn.Module] = set()
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        if module in met or isinstance(module, Metric):
            continue
        met.add(module)
        yield path, module
        if children := module._modules:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]


def _is_fixed(value: Any) -> bool:
    """Whether a value cannot change while it is the same object."""
    return isinstance(value, _ATOMS) or (type(value) is tuple and all(isinstance(each, _ATOMS) for each in value))


def _here(tensor: Tensor) -> Tensor:
    return localise(tensor).detach() if type(tensor) is Remote else tensor


def _has_remote(value: Any) -> bool:
    """Whether it is a tensor of another rank, or a small container of such."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return len(value) <= _MOST and any(map(_has_remote, value))
    return type(value) is Remote


def _image(value: Any, seen: dict[int, Any]) -> Any:
    """Something that is equal while a value stays as it is; ``None`` if it is not plain.

    Args:
        value: The value.
        seen: The images of what many modules may refer to, such as a configuration, by ``id``.
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, _ATOMS):
        return (type(value), value) if "<locals>" not in type(value).__qualname__ else None
    if type(value) is Tensor:
        small = not value.requires_grad and value.layout is torch.strided and value.nbytes <= SMALL
        return _Seen(value) if small else None
    try:
        seen[id(value)] = _copy(value, [_MOST])
    except ValueError:
        seen[id(value)] = None
    return seen[id(value)]


def _copy(value: Any, room: list[int]) -> Any:
    """A copy, to compare with.

    Args:
        value: What is copied.
        room: How many more items it may have.

    Raises:
        ValueError: if it is not plain.
    """
    kind = type(value)
    room[0] -= 1
    if room[0] < 0 or "<locals>" in kind.__qualname__:  # what is of a local class cannot be sent
        raise ValueError
    if isinstance(value, _ATOMS):
        return kind, value
    if isinstance(value, dict):
        return kind, [(_copy(key, room), _copy(each, room)) for key, each in value.items()]
    if isinstance(value, list | tuple | deque):
        return kind, [_copy(each, room) for each in value]
    if isinstance(value, set | frozenset) and len(value) <= room[0] and all(isinstance(each, _ATOMS) for each in value):
        return kind, set(value)
    if is_users(value):
        return kind, _copy(vars(value), room)
    raise ValueError


def _same(here: Any, there: Any) -> bool:
    """Whether a value of this rank is that of rank 0."""
    if type(here) is Tensor and type(there) is Tensor:
        return here.dtype == there.dtype and here.shape == there.shape and torch.equal(here.detach().cpu(), there)
    if type(here) is type(there) and isinstance(here, list | tuple) and any(type(each) is Tensor for each in here):
        return len(here) == len(there) and all(map(_same, here, there))
    image = _image(here, {})
    return type(here) is type(there) and image is not None and bool(image == _image(there, {}))


def _renewed(old: Any, new: Any) -> Any:
    """A value as it is now: the same objects, where others may hold them too."""
    if type(old) is not type(new):
        return new
    if isinstance(old, Tensor):
        return new.to(old.device)
    if isinstance(old, dict):
        values = {key: _renewed(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(values)
    elif isinstance(old, list | deque):
        old.clear()
        old.extend(new)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif is_users(old) and not isinstance(old, _ATOMS):
        _renewed(vars(old), vars(new))
    else:
        return new
    return old
