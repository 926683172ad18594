"""Notices attributes that a step changes after this rank has left it, and that the next micro-batch reads here.

::

    micro-batch    0          1          2          3      |
    rank 1         seen=0     seen=0     seen=0     seen=0 |  seen=4      reads it
    rank 0         0 -> 1     1 -> 2     2 -> 3     3 -> 4 |  4 -> 5      changes it in the end

On one device micro-batch 1 finds 1. Here rank 1 begins with it before rank 0 has ended micro-batch 0, and has the
change with the next batch only. Who reads such an attribute is told so.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["LateChanges"]

_ABSENT = object()


class LateChanges:
    """Watches attributes of modules by properties of their classes, for the time of a run.

    Args:
        step: Gives the step that runs on this rank, if one does.
        label: What this rank is called.
    """

    def __init__(self, step: Callable[[], Any], label: str) -> None:
        self.step, self.label = step, label
        self._watched: set[tuple[int, str]] = set()  # module and attribute
        self._told: set[str] = set()
        self._written: dict[tuple[int, str], Any] = {}  # the step that has written an attribute itself
        self._defaults: dict[tuple[type[nn.Module], str], Any] = {}  # what a class itself has by a name

    def watch(self, module: nn.Module, name: str) -> None:
        """Tell when a step reads an attribute before it writes it."""
        self._watched.add((id(module), name))
        if (type(module), name) not in self._defaults:
            self._install(type(module), name)

    def remove(self) -> None:
        """Leave the classes as they were."""
        for (kind, name), default in self._defaults.items():
            if default is _ABSENT:
                delattr(kind, name)
            else:
                setattr(kind, name, default)
        self._defaults.clear()

    def _install(self, kind: type[nn.Module], name: str) -> None:
        default = self._defaults[kind, name] = vars(kind).get(name, _ABSENT)

        def read(module: nn.Module) -> Any:
            self._read(module, name)
            if name in module.__dict__ or default is _ABSENT:
                try:
                    return module.__dict__[name]
                except KeyError:
                    raise AttributeError(name) from None  # the module looks further itself
            return default

        def write(module: nn.Module, value: Any) -> None:
            self._written[id(module), name] = self.step()
            module.__dict__[name] = value

        def remove(module: nn.Module) -> None:
            module.__dict__.pop(name)

        setattr(kind, name, property(read, write, remove))

    def _read(self, module: nn.Module, name: str) -> None:
        step, key, shown = self.step(), (id(module), name), f"{type(module).__name__}.{name}"
        if step is None or key not in self._watched or self._written.get(key) is step or shown in self._told:
            return
        self._told.add(shown)
        warnings.warn(
            f"the step reads `{shown}` on {self.label}, and changes it on a later stage: with several micro-batches "
            "that change is seen with the next batch, not with the next micro-batch, so numbers are not those of one "
            "device. Change it in a hook such as `on_train_batch_end`, or pass num_microbatches=1.",
            stacklevel=4,
        )
