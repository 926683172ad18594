"""A batch as every stage sees it: split into micro-batches, large leaves only where they are used."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.tree import duplicate, flatten, map_tensors, unflatten

__all__ = ["Batch"]

_EVERYWHERE_INTEGER_BYTES = 4 << 20  # tokens, labels, masks: what is computed from them then needs no communication
_EVERYWHERE_FLOAT_BYTES = 16 << 10


class Batch:
    """A batch split into micro-batches along its samples.

    Tensors of which the first dimension is the number of samples are split, and so are lists with one item a sample;
    everything else goes whole to every micro-batch.

    Args:
        spec: The structure, from :func:`~lightning_lwpm.staging.tree.flatten`.
        leaves: The tensors; a :class:`Meta` stands for one that this rank was not given.
        num_microbatches: How many are wanted; a batch of fewer samples makes fewer.
        least: The fewest samples of each, where the batch has as many.
    """

    def __init__(self, spec: Any, leaves: list[Tensor | Meta], num_microbatches: int, least: int = 1) -> None:
        self.spec, self.leaves = spec, leaves
        self.absent: dict[int, Tensor] = {}  # the placeholders that stood for leaves this rank was not given
        self.samples = next((_shape(leaf)[0] for leaf in leaves if _shape(leaf)), None)
        count = 1 if self.samples is None else max(1, min(num_microbatches, self.samples // least))
        total = self.samples or count
        self.sizes = [total // count + (i < total % count) for i in range(count)]
        self.bounds = [(sum(self.sizes[:i]), sum(self.sizes[: i + 1])) for i in range(count)]
        self._split = [self._splits(leaf) for leaf in leaves]
        self._lists = _has_sequence(spec, self.samples)

    @classmethod
    def of(cls, value: Any, num_microbatches: int, least: int = 1) -> "Batch":
        """Make a batch of what the data loader gave."""
        leaves: list[Any] = []
        spec = flatten(value, leaves)
        absent = {i: leaf for i, leaf in enumerate(leaves) if is_placeholder(leaf)}
        given = [Meta.of(leaf) if i in absent else leaf for i, leaf in enumerate(leaves)]
        batch = cls(spec, given, num_microbatches, least)
        batch.absent = absent
        return batch

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def weights(self) -> list[float]:
        """The share of each micro-batch in the batch's samples."""
        total = sum(self.sizes)
        return [size / total for size in self.sizes]

    def structure(self) -> Hashable:
        """What the batch is made of, without sizes."""
        return _kinds(self.spec), tuple((len(_shape(leaf)), leaf.dtype) for leaf in self.leaves)

    def signature(self, i: int) -> Hashable:
        """What micro-batch ``i`` is made of, with sizes."""
        low, high = self.bounds[i]
        shapes = tuple(
            ((high - low, *_shape(leaf)[1:]) if self._splits(leaf) else _shape(leaf), leaf.dtype)
            for leaf in self.leaves
        )
        return _kinds(self.spec), shapes

    def microbatch(self, i: int, device: torch.device | None = None, owner: Any = None, private: bool = False) -> Any:
        """Micro-batch ``i``, in the structure of the batch; absent leaves are remote tensors of ``owner``.

        Args:
            i: Its number.
            device: Where absent leaves would be.
            owner: The step that fetches them.
            private: Whether to copy the tensors, so that a step may change them in place and another one still gets
                them as they were.
        """
        if len(self) == 1 and not any(isinstance(leaf, Meta) for leaf in self.leaves):
            value = unflatten(self.spec, iter(self.leaves))
        elif not self._lists:
            value = unflatten(self.spec, iter([self._part(k, i, device, owner) for k in range(len(self.leaves))]))
        else:
            value = unflatten(*self._cut(self.spec, iter(range(len(self.leaves))), i, device, owner))
        return map_tensors(lambda leaf: leaf if type(leaf) is Remote else duplicate(leaf), value) if private else value

    def leaf(self, index: int, i: int) -> Tensor:
        """The part of a leaf, present on this rank, that belongs to micro-batch ``i``."""
        leaf = self.leaves[index]
        assert isinstance(leaf, Tensor)
        low, high = self.bounds[i]
        if not self._split[index] or len(self) == 1:
            return leaf
        part = leaf[low:high]
        # a step may change its part in place: autograd must not take that for a change of the other parts
        return part if part.requires_grad else part.data

    def lean(self, wanted: set[int]) -> list[Tensor | Meta]:
        """The leaves to send to a rank that needs the large ones in ``wanted`` only."""
        return [leaf if i in wanted or _goes_everywhere(leaf) else _meta(leaf) for i, leaf in enumerate(self.leaves)]

    def _splits(self, leaf: Tensor | Meta) -> bool:
        shape = _shape(leaf)
        return bool(shape) and shape[0] == self.samples

    def _part(self, index: int, i: int, device: Any, owner: Any) -> Tensor:
        """The part of a leaf that belongs to micro-batch ``i``; a remote tensor where this rank was not given it."""
        leaf = self.leaves[index]
        if not isinstance(leaf, Meta):
            return self.leaf(index, i)
        shape = (self.sizes[i], *leaf.shape[1:]) if self._split[index] else leaf.shape
        return Remote(leaf._replace(shape=shape), device, Name("batch", 0, 0, index), -1, owner)

    def _cut(self, spec: Any, numbers: Iterator[int], i: int, device: Any, owner: Any) -> tuple[Any, Iterator[Any]]:
        out: list[Any] = []
        return self._cut_node(spec, numbers, i, device, owner, out), iter(out)

    def _cut_node(self, spec: Any, numbers: Iterator[int], i: int, device: Any, owner: Any, out: list[Any]) -> Any:
        if spec is None:
            out.append(self._part(next(numbers), i, device, owner))
            return None
        kind, context, children = spec
        if children is None:
            return spec
        low, high = self.bounds[i]
        parts = [(child, [next(numbers) for _ in range(_count(child))]) for child in children]
        if kind in (list, tuple) and len(children) == self.samples and not self._is_container(parts):
            parts = parts[low:high]
        cut = [self._cut_node(child, iter(own), i, device, owner, out) for child, own in parts]
        return (kind, context, cut)

    def _is_container(self, parts: list[tuple[Any, list[int]]]) -> bool:
        """Whether a sequence as long as the batch holds whole tensors of the batch, not one item a sample."""
        return any(self._splits(self.leaves[index]) for _, own in parts for index in own)


def _shape(leaf: Tensor | Meta) -> tuple[int, ...]:
    return tuple(leaf.shape)


def _meta(leaf: Tensor | Meta) -> Meta:
    return leaf if isinstance(leaf, Meta) else Meta.of(leaf)


def _goes_everywhere(leaf: Tensor | Meta) -> bool:
    limit = _EVERYWHERE_FLOAT_BYTES if leaf.dtype.is_floating_point else _EVERYWHERE_INTEGER_BYTES
    return _meta(leaf).nbytes <= limit


def _has_sequence(spec: Any, length: int | None) -> bool:
    """Whether there is a list or tuple of this length, which may hold one item a sample."""
    if spec is None or spec[2] is None:
        return False
    kind, _, children = spec
    here = kind in (list, tuple) and len(children) == length
    return here or any(_has_sequence(child, length) for child in children)


def _count(spec: Any) -> int:
    if spec is None:
        return 1
    return sum(map(_count, spec[2])) if spec[2] is not None else 0


def _kinds(spec: Any) -> Hashable:
    """The structure without values, for comparing."""
    if spec is None:
        return None
    kind, context, children = spec
    if children is None:
        return type(context).__name__
    label = tuple(map(repr, context)) if kind is dict else getattr(kind, "__name__", kind)
    return (label, *[_kinds(child) for child in children])
