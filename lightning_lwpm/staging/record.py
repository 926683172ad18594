"""What a call returned, as told by the stage that ran it: enough for every later stage to return the like."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.staging.remote import Meta
from lightning_lwpm.staging.tree import flatten, portable

__all__ = ["Key", "Leaf", "Record", "Trace", "observe"]

Key = tuple[str, int, int]
"""(layer, occurrence, index): a layer call (index 0) or the index-th torch function after it."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor that a call returned.

    Attributes:
        meta: Its shape, strides, type.
        same: The position among the call's tensor arguments of the very object returned, or -1.
        view: The position of an argument that it shares memory with, or -1.
    """

    meta: Meta
    same: int = -1
    view: int = -1


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one call: the tensors returned, the structure around them, the arguments changed in place.

    Attributes:
        function: The name of the function called, so that two ranks that count differently notice it.
    """

    function: str
    spec: Any
    leaves: tuple[Leaf, ...]
    mutated: tuple[tuple[int, Meta], ...] = ()

    def meta(self, leaf: int) -> Meta | None:
        """The meta of the leaf-th tensor returned, or of argument ``-1 - leaf`` changed in place."""
        if leaf >= 0:
            return self.leaves[leaf].meta if leaf < len(self.leaves) else None
        return dict(self.mutated).get(-1 - leaf)


Trace = dict[Key, Record]
"""All records of one stage for one signature of the batch."""


def observe(function: str, out: Any, arguments: list[Tensor], versions: list[int]) -> tuple[Record, list[Tensor]]:
    """Describe what a call returned.

    Args:
        function: The name of the function called.
        out: The value returned.
        arguments: The tensors among the call's arguments.
        versions: Their version counters before the call.

    Returns:
        The record, and the tensors returned.
    """
    tensors: list[Tensor] = []
    spec = flatten(out, tensors)
    if spec is not None:
        spec = portable(spec)
    leaves = tuple([_leaf(tensor, arguments) for tensor in tensors])
    mutated = tuple([(i, Meta.of(t)) for i, t in enumerate(arguments) if version(t) != versions[i]])
    return Record(function, spec, leaves, mutated), tensors


def version(tensor: Tensor) -> int:
    """The counter of in-place changes; 0 where torch keeps none."""
    return 0 if tensor.is_inference() else tensor._version


def _leaf(tensor: Tensor, arguments: list[Tensor]) -> Leaf:
    meta = Meta.of(tensor)
    for i, argument in enumerate(arguments):
        if argument is tensor:
            return Leaf(meta, same=i)
    if tensor.layout is torch.strided:
        storage = tensor.untyped_storage()._cdata
        for i, argument in enumerate(arguments):
            if argument.layout is torch.strided and argument.untyped_storage()._cdata == storage:
                return Leaf(meta, view=i)
    return Leaf(meta)
