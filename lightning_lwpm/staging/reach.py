"""What later stages may still ask of a stage that has left its step: what the step's code can still reach.

    x = inner(x)        # the former x: nothing refers to it any more
    y = x.flatten(1)    # a view: a later stage makes it again, from x
    head(y)             # a layer of the next stage: here the step is left; y, x and other variables stay

A later stage runs the same code up to here, with remote tensors. It can fetch one beyond this point only if it has it
there, and then this stage has it here: in a variable, an attribute, a closure, a suspended generator. So of all that
calls have returned, what is kept is what something besides these tables refers to as the step leaves, before its frames
are gone. References from C++ (autograd's saved tensors) may count as well; these tensors are in memory anyway.

A later stage may also fetch a tensor on its way to this point. These are kept whatever refers to them:

- the arguments of calls that make Python values (``if x.sum() > 0``), which take the same path everywhere;
- the arguments of calls that change something in place: a later stage may have that itself, and change it too;
- what goes to metrics and logs, which only the last stage reads;
- small tensors: statistics that code of one rank alone might show or write somewhere.
"""

import sys
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_lwpm.staging.record import Key, Record
from lightning_lwpm.staging.remote import Name

__all__ = ["Reach"]

SMALL = 16 << 10
"""Tensors of up to so many bytes are always kept."""


class Reach:
    """The tensors of one run of a step.

    Attributes:
        tensors: What a later stage may ask for, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[Name, Tensor] = {}
        self._sources: dict[Key, list[Tensor]] = {}  # of what views are made from, by call, in the order of calls
        self._asked: list[Tensor] = []

    def note(self, key: Key, record: Record, arguments: list[Tensor], made: list[Tensor]) -> None:
        """Note a call.

        Args:
            key: Names the call.
            record: What it did.
            arguments: The tensors among its arguments.
            made: The tensors that it returned.
        """
        for i, tensor in enumerate(made):
            self.tensors[Name(*key, i)] = tensor
        for i, _ in record.mutated:
            self.tensors[Name(*key, -1 - i)] = arguments[i]
        if record.mutated:
            self._asked.extend(arguments)
        if any(leaf.view >= 0 for leaf in record.leaves):
            self._sources[key] = arguments

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep tensors whatever refers to them."""
        self._asked.extend(tensors)

    def prune(self) -> None:
        """Let go of all that no later stage can ask for; to be called where the step is left."""
        while unreached := self.tensors.keys() - self._reached():
            # what goes may be a view, which held what it was made from: look again
            for name in unreached:
                del self.tensors[name]
            keys = {name[:3] for name in self.tensors}
            self._sources = {key: arguments for key, arguments in self._sources.items() if key in keys}
        self._sources, self._asked = {}, []

    def _reached(self) -> set[Name]:
        """The names of what is kept for any reason."""
        own = Counter(map(id, self.tensors.values()))
        for arguments in [*self._sources.values(), self._asked]:
            own.update(map(id, arguments))
        objects: list[object] = list({id(tensor): tensor for tensor in self.tensors.values()}.values())
        objects.append(object())  # to which nothing else refers: how many references are those of looking
        *found, bare = [sys.getrefcount(value) for value in objects]
        objects.pop()
        kept = {id(tensor) for tensor in self._asked}
        kept.update(id(value) for value, count in zip(objects, found, strict=True) if count - own[id(value)] > bare)
        with torch._C.DisableTorchFunction():  # the step itself listens
            kept.update(id(tensor) for tensor in self.tensors.values() if tensor.nbytes <= SMALL)
        made: dict[Key, list[int]] = {}
        for name, tensor in self.tensors.items():
            made.setdefault(name[:3], []).append(id(tensor))
        for key in reversed(self._sources):  # views of views come later
            if not kept.isdisjoint(made[key]):
                kept.update(map(id, self._sources[key]))
        return {name for name, tensor in self.tensors.items() if id(tensor) in kept}
