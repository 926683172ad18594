"""What a step changes beside its result, kept apart for each stage of a rank.

    rank 0       0F0        0F1        2F0          a counter in the step:   self.seen += 1
    sees seen=   0 -> 1     1 -> 2     0 -> 1       as if each stage had a process of its own

Each stage runs the user's step from its first line, so Python code and changes of buffers between layers run once a
stage. One device runs them once a micro-batch, in order. So each stage begins a batch with what the rank has, changes
a version of its own, and what the latest stage of the rank has made of it is what the rank has afterwards.

Versioned are the attributes of modules that lie in no unit, the lists, dicts, sets, deques and objects of the user's
classes in them (to any depth) and the tensors in these, and the buffers that every rank keeps.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_lwpm.staging.contents import containers, content_of, fill
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placeholder import is_placeholder, placeholder_like
from lightning_lwpm.staging.remote import Remote
from lightning_lwpm.staging.tree import duplicate

__all__ = ["NOT_STATE", "Versions"]

NOT_STATE = frozenset(vars(nn.Module())) - {"training"}  # parameters, children, hooks; buffers have slots of their own
_ABSENT = object()

Slot = tuple[dict[str, Any], str]


class Versions:
    """The versions of a rank's stages.

    Args:
        root: The model, with this rank's share of the weights.
        layout: The partition.
        stages: The stages of this rank, ascending. With one there is only one version, and nothing to do.
    """

    def __init__(self, root: nn.Module, layout: Layout, stages: Sequence[int]) -> None:
        self.root, self.layout, self.stages = root, layout, tuple(stages) if len(stages) > 1 else ()
        inside = {id(m) for unit in layout.units for m in root.get_submodule(unit.name).modules()}
        self.glue = [module for module in root.modules() if id(module) not in inside]
        self._shells: dict[Any, Any] = {}  # by shape and type: what stands for a buffer of another stage
        self._base: dict[int, tuple[Any, Any]] = {}  # by id of a container: the container, what it holds
        self._own: dict[int, dict[int, tuple[Any, Any]]] = {}  # by stage: what it has changed of that
        self._buffers: dict[int, list[tuple[Slot, Any]]] = {}  # by stage: its versions of common buffers
        self._foreign: dict[int, list[Slot]] = {}
        self._absent = [
            (module._buffers, key, buffer)
            for module in root.modules()
            for key, buffer in module._buffers.items()
            if buffer is not None and is_placeholder(buffer)
        ]

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The time of a batch."""
        if not self.stages:
            yield
            return
        self._begin()
        yield  # after a failure nothing is used any more
        for container, content in self._own[self.stages[-1]].values():
            fill(container, content)
        for (store, key), buffer in self._buffers[self.stages[-1]]:
            store[key] = buffer
        self._base, self._own, self._buffers, self._foreign = {}, {}, {}, {}

    def _begin(self) -> None:
        found = containers(v for module in self.glue for k, v in vars(module).items() if k not in NOT_STATE)
        found.update((id(module.__dict__), module.__dict__) for module in self.glue)
        self._base = {key: (container, content_of(container)) for key, container in found.items()}
        common, held = self._slots()
        for stage in self.stages:
            copies: dict[int, Tensor] = {}
            final = stage == self.stages[-1]
            self._own[stage] = {} if final else self._copied(copies)
            self._buffers[stage] = [((s, k), s[k] if final else _copy(s[k], copies)) for s, k in common]
            self._foreign[stage] = [slot for slot, stages in held if stage not in stages]

    def _slots(self) -> tuple[list[Slot], list[tuple[Slot, tuple[int, ...]]]]:
        """Where modules keep buffers that every rank has, and those of this rank's stages."""
        common, held = [], []
        names = {id(buffer): name for name, buffer in self.root.named_buffers()}
        for module in self.root.modules():
            store: dict[str, Any] = module._buffers
            for key, buffer in store.items():
                if buffer is None or is_placeholder(buffer):
                    continue
                stages = self.layout.buffers.get(names[id(buffer)])
                if stages is None:
                    common.append((store, key))
                else:
                    held.append(((store, key), stages))
        return common, held

    def _copied(self, copies: dict[int, Tensor]) -> dict[int, tuple[Any, Any]]:
        """The containers in which there are tensors, with copies of these."""
        own = {}
        for key, (container, content) in self._base.items():
            copied = _map(content, lambda value: _copy(value, copies))
            if not _same(content, copied):
                own[key] = (container, copied)
        return own

    def of(self, stage: int) -> AbstractContextManager[None]:
        """Run a step of a stage, or its backward pass, within the stage's version."""
        return self._of(stage) if self.stages else self._kept_absent() if self._absent else nullcontext()

    @contextmanager
    def _kept_absent(self) -> Iterator[None]:
        """Code between layers may store results of other stages in buffers of theirs, until the step ends."""
        try:
            yield
        finally:
            for store, key, placeholder in self._absent:
                if type(store.get(key)) is Remote:
                    store[key] = placeholder

    @contextmanager
    def _of(self, stage: int) -> Iterator[None]:
        own = self._own[stage]
        for container, content in own.values():
            fill(container, content)
        swapped = [(slot, self._swap(slot, buffer)) for slot, buffer in self._buffers[stage]]
        hidden = [(slot, self._swap(slot, self._shell(slot))) for slot in self._foreign[stage]]
        stored = [(slot, slot[0].get(slot[1], _ABSENT)) for slot in self._attributes(stage)]
        try:
            with self._kept_absent():
                yield
        finally:
            for (store, key), value in stored + hidden:
                if value is _ABSENT:
                    store.pop(key, None)
                else:
                    store[key] = value
            self._buffers[stage] = [((s, k), self._swap((s, k), before)) for (s, k), before in swapped]
            for number, (container, before) in self._base.items():
                now = content_of(container)
                if number in own or not _same(before, now):
                    own[number] = (container, now)
                    fill(container, before)

    def _attributes(self, stage: int) -> Iterable[Slot]:
        """Where a step of this stage only stores what stands for the results of other stages."""
        for unit in self.layout.units:
            if unit.attributes and stage not in unit.stages and set(unit.stages) & set(self.stages):
                module = self.root.get_submodule(unit.name)
                yield from ((vars(module.get_submodule(path)), name) for path, name in unit.attributes)

    def _shell(self, slot: Slot) -> Any:
        """What stands for a buffer of another stage of this rank: it is as far away as on another rank."""
        buffer = slot[0][slot[1]]
        form = (buffer.shape, buffer.stride(), buffer.dtype, buffer.device)
        if form not in self._shells:
            self._shells[form] = placeholder_like(buffer)
        return self._shells[form]

    @staticmethod
    def _swap(slot: Slot, value: Any) -> Any:
        store, key = slot
        before, store[key] = store[key], value
        return before


def _map(content: Any, change: Any) -> Any:
    if isinstance(content, dict):
        return {key: change(value) for key, value in content.items()}
    return [change(value) for value in content]


def _same(before: Any, now: Any) -> bool:
    """Whether the very same objects are held, in the same order."""
    if len(before) != len(now):
        return False
    if isinstance(before, dict) and not all(a is b for a, b in zip(before.values(), now.values(), strict=True)):
        return False
    return all(a is b or (type(a) is str and a == b) for a, b in zip(before, now, strict=True))


def _copy(value: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor that a step may change in place; anything else as it is."""
    if type(value) is not Tensor or value.requires_grad:
        return value
    if id(value) not in copies:
        copies[id(value)] = duplicate(value)
    return copies[id(value)]
