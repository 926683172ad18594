"""A batch as every stage sees it: split into micro-batches, large leaves only where they are used."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.samples import count_leaves, samples_of
from lightning_lwpm.staging.tree import duplicate, flatten, map_tensors, unflatten

__all__ = ["Batch"]

_EVERYWHERE_INTEGER_BYTES = 4 << 20  # tokens, labels, masks: what is computed from them then needs no communication
_EVERYWHERE_FLOAT_BYTES = 16 << 10
_INTEGERS = (torch.int64, torch.int32, torch.int16)


class Batch:
    """A batch split into micro-batches along its samples.

    Tensors of which the first dimension is the number of samples are split, and so are lists with one item a sample;
    everything else goes whole to every micro-batch. What the samples are, see
    :mod:`~lightning_lwpm.staging.samples`.

    Args:
        spec: The structure, from :func:`~lightning_lwpm.staging.tree.flatten`.
        leaves: The tensors; a :class:`Meta` stands for one that this rank was not given.
        num_microbatches: How many are wanted; a batch of fewer samples makes fewer.
        least: The fewest samples of each, where the batch has as many.
    """

    def __init__(self, spec: Any, leaves: list[Tensor | Meta], num_microbatches: int, least: int = 1) -> None:
        self.spec, self.leaves = spec, leaves
        self.absent: dict[int, Tensor] = {}  # the placeholders that stood for leaves this rank was not given
        self.samples, self._items = samples_of(spec, leaves)
        count = 1 if self.samples is None else max(1, min(num_microbatches, self.samples // least))
        total = self.samples or count
        self.sizes = [total // count + (i < total % count) for i in range(count)]
        self.bounds = [(sum(self.sizes[:i]), sum(self.sizes[: i + 1])) for i in range(count)]
        self._split = [i not in self._items and self._splits(leaf) for i, leaf in enumerate(leaves)]
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

    def told(self) -> str:
        """What is split and what is not, for people."""
        other = {tuple(leaf.shape) for leaf, splits in zip(self.leaves, self._split, strict=True) if not splits}
        whole = sorted(shape for shape in other if shape)
        kept = f"; tensors of shape {', '.join(map(str, whole))} were not split" if whole and not self._items else ""
        what = "items of its lists" if self._items else "rows of its first tensor"
        return f"Taken for samples were the {self.samples} {what}{kept}."

    def numbering(self) -> tuple[int, ...] | None:
        """The shape of a tensor that is not split and seems to number rows of those that are, or to count them.

        So are graphs and sequences packed: edges as pairs of nodes, the place or the length of each sequence.
        """
        if self.samples is None or self._items:
            return None
        for leaf, splits in zip(self.leaves, self._split, strict=True):
            if not splits and isinstance(leaf, Tensor) and leaf.dtype in _INTEGERS and leaf.dim() and leaf.numel():
                last = int(leaf.max())
                if self.samples in (last, last + 1) or (leaf.dim() == 1 and int(leaf.sum()) == self.samples):
                    return _shape(leaf)
        return None

    def structure(self) -> Hashable:
        """What the batch is made of, without sizes."""
        return _kinds(self.spec), tuple((len(_shape(leaf)), leaf.dtype) for leaf in self.leaves)

    def signature(self, i: int) -> Hashable:
        """What micro-batch ``i`` is made of, with sizes."""
        spec, numbers = self._cut(i)
        shapes = tuple((self._shape(number, i), self.leaves[number].dtype) for number in numbers)
        return _kinds(spec), shapes

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
        else:
            spec, numbers = self._cut(i)
            value = unflatten(spec, iter([self._part(number, i, device, owner) for number in numbers]))
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
        return Remote(leaf._replace(shape=self._shape(index, i)), device, Name("batch", 0, 0, index), -1, owner)

    def _shape(self, index: int, i: int) -> tuple[int, ...]:
        """The shape of the part of a leaf that belongs to micro-batch ``i``."""
        shape = _shape(self.leaves[index])
        return (self.sizes[i], *shape[1:]) if self._split[index] and len(self) > 1 else shape

    def _cut(self, i: int) -> tuple[Any, Sequence[int]]:
        """The structure of micro-batch ``i``, and the numbers of its leaves."""
        if not self._lists or len(self) == 1:
            return self.spec, range(len(self.leaves))
        numbers: list[int] = []
        return self._cut_node(self.spec, iter(range(len(self.leaves))), i, numbers), numbers

    def _cut_node(self, spec: Any, leaves: Iterator[int], i: int, numbers: list[int], item: bool = False) -> Any:
        if spec is None:
            numbers.append(next(leaves))
            return None
        kind, context, children = spec
        if children is None:
            return spec
        parts = [(child, [next(leaves) for _ in range(count_leaves(child))]) for child in children]
        of_samples = kind in (list, tuple) and len(children) == self.samples and not item
        if of_samples and self._items.issuperset(index for _, own in parts for index in own):
            low, high = self.bounds[i]
            parts, item = parts[low:high], True
        return (kind, context, [self._cut_node(child, iter(own), i, numbers, item) for child, own in parts])


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


def _kinds(spec: Any) -> Hashable:
    """The structure without values, for comparing."""
    if spec is None:
        return None
    kind, context, children = spec
    if children is None:
        return type(context).__name__
    label = tuple(map(repr, context)) if kind is dict else getattr(kind, "__name__", kind)
    return (label, *[_kinds(child) for child in children])
