"""How many samples a batch holds, and how: along the first dimension of its tensors, or as the items of lists.

{"image": (4, 3, 64, 64), "label": (4,)}                   4: all tensors are split
{"image": (4, 3, 64, 64), "boxes": [(1, 4), (4, 4), ...]}  4: so is the list, whatever the sizes of its items
([(3, 64, 64), (3, 48, 64), ...], [{...}, {...}, ...])     as many as both lists have items
{"nodes": (9, 5), "edges": (2, 30), "label": (4,)}         9, by the first tensor: the step shows whether that works
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from lightning_lwpm.staging.remote import Meta

__all__ = ["Samples", "count_leaves", "samples_of"]


class Samples(NamedTuple):
    """The samples of a batch.

    Attributes:
        number: How many; ``None`` if there are none, or if it cannot be told what they are.
        items: Numbers of the leaves that belong to a list with one item a sample.
    """

    number: int | None
    items: frozenset[int] = frozenset()


class _List(NamedTuple):
    """A list or tuple with tensors in it.

    Attributes:
        length: Number of its items.
        leaves: The numbers of its tensors.
        alike: Whether it may be one of samples: it lies in the batch, and its items are made alike.
    """

    length: int
    leaves: range
    alike: bool


def samples_of(spec: Any, leaves: Sequence[Tensor | Meta]) -> Samples:
    """Find the samples of a batch.

    Args:
        spec: Its structure, from :func:`~lightning_lwpm.staging.tree.flatten`.
        leaves: Its tensors.
    """
    sizes = [leaf.shape[0] if len(leaf.shape) else None for leaf in leaves]
    leading = next((size for size in sizes if size is not None), None)
    lists = list(_lists(spec, leaves))
    if leading is None or not lists:
        return Samples(leading)
    count = leading
    if not _explains(leading, sizes, lists):
        others = [n for n in {found.length for found in lists} if _explains(n, sizes, lists)]
        if others and not (len(others) == 1 and (others[0] == 1 or _shows(others[0], leaves, lists))):
            return Samples(None)  # several views of batches of two sizes may look like this too
        count = others[0] if others else leading
    items: set[int] = set()
    for found in lists:
        if found.length != count or items.issuperset(found.leaves):
            continue
        whole = [sizes[i] == count for i in found.leaves]
        if found.alike and all(whole) and count > 1:
            return Samples(None)  # two views of two samples, or two samples of size two
        if found.alike or not any(whole):
            items.update(found.leaves)
    return Samples(count, frozenset(items))


def _explains(n: int, sizes: Sequence[int | None], lists: Sequence[_List]) -> bool:
    """Whether each tensor is one of ``n`` samples, or belongs to an item of a list of ``n``."""
    inside = {i for found in lists if found.alike and found.length == n for i in found.leaves}
    return all(size in (None, n) or i in inside for i, size in enumerate(sizes))


def _shows(n: int, leaves: Sequence[Tensor | Meta], lists: Sequence[_List]) -> bool:
    """Whether ``n`` can be nothing but the number of samples: a tensor has it too, or items differ in size."""
    of_samples = [found.leaves for found in lists if found.alike and found.length == n]
    inside = {i for numbers in of_samples for i in numbers}
    if any(len(leaf.shape) and i not in inside for i, leaf in enumerate(leaves)):
        return True
    for numbers in of_samples:
        each = [tuple(leaves[i].shape) for i in numbers]
        width = len(each) // n
        if any(each[k::width] != each[k : k + 1] * n for k in range(width)):
            return True
    return False


def _lists(spec: Any, leaves: Sequence[Tensor | Meta], start: int = 0, outermost: bool = True) -> Iterator[_List]:
    """The lists and tuples with tensors in them, those around others first."""
    if spec is None or spec[2] is None:
        return
    kind, _, children = spec
    ends = [start]
    for child in children:
        ends.append(ends[-1] + count_leaves(child))
    parts = [range(a, b) for a, b in pairwise(ends)]
    if kind in (list, tuple) and ends[-1] > start:
        made = {_made(child, [leaves[i] for i in part]) for child, part in zip(children, parts, strict=True)}
        yield _List(len(children), range(start, ends[-1]), len(made) == 1 and not outermost)
    for child, part in zip(children, parts, strict=True):
        yield from _lists(child, leaves, part.start, False)


def _made(spec: Any, leaves: Sequence[Tensor | Meta]) -> Any:
    """What a value is made of, sizes and plain values apart."""
    return _outline(spec), tuple((len(leaf.shape), leaf.dtype) for leaf in leaves)


def _outline(spec: Any) -> Any:
    if spec is None or spec[2] is None:
        return spec is None
    label = tuple(map(repr, spec[1])) if spec[0] is dict else getattr(spec[0], "__name__", spec[0])
    return (label, *map(_outline, spec[2]))


def count_leaves(spec: Any) -> int:
    """The number of tensors in a value."""
    if spec is None:
        return 1
    return sum(map(count_leaves, spec[2])) if spec[2] is not None else 0
