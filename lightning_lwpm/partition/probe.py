"""One instrumented run of the user's step on one device: which layers it calls in which order, and what they cost.

Everything that the run changes (buffers, random states, Python attributes of modules) is put back.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.partition.timeline import LayerCall, Timeline
from lightning_lwpm.staging.tree import tensors

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """What a run of the step has shown. Positions count the layer calls.

    Attributes:
        timeline: The layer calls, with their costs.
        spans: Module name -> for each of its calls, the first and last position inside it (``None``: no layer call).
        parameters: Parameter name -> the positions that use it.
        buffers: The same for buffers that belong to a layer or were changed; others are constants, kept everywhere.
    """

    timeline: Timeline
    spans: dict[str, tuple[tuple[int, int] | None, ...]]
    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]


@dataclass
class _Call:
    """A call of any module that holds parameters, itself or below."""

    name: str
    start: int
    end: int = 0
    has_inner: bool = False


class _Recorder(TorchFunctionMode):
    """Follows tensors through functions; time is a counter of events."""

    def __init__(self, named: dict[int, str]) -> None:
        super().__init__()
        self.named = named  # id of parameter or buffer -> its name
        self.clock = 0
        self.used: dict[str, list[int]] = defaultdict(list)
        self.born: dict[int, tuple[int, int]] = {}  # storage -> (time, bytes)
        self.read: dict[int, int] = {}  # storage -> time of last use
        self.keep: list[Tensor] = []  # so that no address is used twice

    def touch(self, values: Any) -> bool:
        """Note the use of tensors; whether any of them depends on parameters."""
        found = False
        for tensor in tensors(values):
            name = self.named.get(id(tensor))
            if name is not None:
                self.used[name].append(self.clock)
                found = True
            key = _storage(tensor)
            if key in self.born:
                self.read[key] = self.clock
                found = True
        return found

    def produce(self, values: Any) -> None:
        """Note tensors made here."""
        for tensor in tensors(values):
            key = _storage(tensor)
            if key not in self.born:
                self.born[key] = (self.clock, tensor.numel() * tensor.element_size())
                self.keep.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        depends = self.touch((args, kwargs))
        out = func(*args, **kwargs)
        if depends:
            self.clock += 1
            self.produce(out)
        return out


class _Counter(TorchDispatchMode):
    """Adds up FLOPs and bytes written, by the recorder's clock."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.flops: dict[int, float] = defaultdict(float)
        self.bytes: dict[int, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        now = self.recorder.clock
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[now] += formula(*args, **kwargs, out_val=out)
        for tensor in tensors(out):
            self.bytes[now] += tensor.numel() * tensor.element_size()
        return out


def probe(root: nn.Module, step: Callable[[], Any]) -> Probe:
    """Run ``step`` once and describe it.

    Args:
        root: The model whose layers the step calls, with all its weights on one device.
        step: Runs the user's step on one micro-batch.

    Raises:
        ConfigurationError: if the step calls no layer that has parameters.
    """
    named = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}
    holders = [(n, m) for n, m in root.named_modules() if n and next(m.parameters(), None) is not None]
    versions = {n: b._version for n, b in root.named_buffers()}
    recorder = _Recorder(named)
    counter = _Counter(recorder)
    calls: list[_Call] = []
    stack: list[_Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.clock += 1
        if stack:
            stack[-1].has_inner = True
        recorder.touch((args, kwargs))
        call = _Call(names[module], recorder.clock)
        calls.append(call)
        stack.append(call)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        call = stack.pop()
        recorder.produce(out)
        recorder.clock += 1
        call.end = recorder.clock

    names = {module: name for name, module in holders}
    handles = []
    for _, module in holders:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    with _undone(root):
        try:
            with counter, recorder:
                step()
        finally:
            for handle in handles:
                handle.remove()
        changed = {n for n, b in root.named_buffers() if n in versions and b._version != versions[n]}
    layers = [call for call in calls if not call.has_inner]
    if not layers:
        raise ConfigurationError(
            "the step called no layer that has parameters, so there is nothing to partition: call the model's modules "
            "(not only functions of their parameters) in the step, or use `devices=1`"
        )
    return _describe(root, layers, calls, recorder, counter, changed)


def _describe(
    root: nn.Module, layers: list[_Call], calls: list[_Call], recorder: _Recorder, counter: _Counter, changed: set[str]
) -> Probe:
    starts = [call.start for call in layers]
    at = _Position(starts)
    positions: dict[str, set[int]] = defaultdict(set)
    for name, times in recorder.used.items():
        positions[name].update(at(time) for time in times)
    owned = {id(t): n for n, t in [*root.named_parameters(), *root.named_buffers()]}
    buffers = {n for n, _ in root.named_buffers()}
    inner_buffers: set[str] = set()
    for position, call in enumerate(layers):
        module = root.get_submodule(call.name)
        for tensor in [*module.parameters(), *module.buffers()]:
            positions[owned[id(tensor)]].add(position)
        inner_buffers.update(owned[id(b)] for b in module.buffers())
    # a constant that glue reads as well is kept everywhere
    glue = {n for n in buffers if any(not _within(t, layers, at) for t in recorder.used.get(n, ()))}
    placed = {n: tuple(sorted(positions[n])) for n in buffers if n in changed or (n in inner_buffers and n not in glue)}
    placed = {n: p for n, p in placed.items() if p}
    allowed = [True] * len(layers)
    for name, where in placed.items():
        if name in changed:  # a running statistic has one history: its uses stay in one stage
            for position in range(where[0] + 1, where[-1] + 1):
                allowed[position] = False
    spans: dict[str, list[tuple[int, int] | None]] = defaultdict(list)
    for call in calls:
        inside = [p for p in range(at(call.start), at(call.end) + 1) if call.start <= starts[p] < call.end]
        spans[call.name].append((inside[0], inside[-1]) if inside else None)
    order = [name for name, _ in root.named_parameters()]
    last = 0
    where_used: dict[str, tuple[int, ...]] = {}
    for name in order:  # what the step never touched stays with its neighbours
        where_used[name] = tuple(sorted(positions[name])) or (last,)
        last = where_used[name][0]
    sizes = {n: (p.numel(), p.numel() * p.element_size()) for n, p in root.named_parameters()}
    flops, moved = at.sums(counter.flops), at.sums(counter.bytes)
    occurrences: dict[str, int] = defaultdict(int)
    described = []
    for position, call in enumerate(layers):
        first = [n for n, where in where_used.items() if where[0] == position]
        described.append(
            LayerCall(
                call.name,
                occurrences[call.name],
                flops[position],
                moved[position],
                sum(sizes[n][1] for n in first),
                sum(sizes[n][0] for n in first),
            )
        )
        occurrences[call.name] += 1
    alive = [0] * len(layers)
    for key, (time, nbytes) in recorder.born.items():
        for position in range(at(time) + 1, at(recorder.read.get(key, time)) + 1):
            alive[position] += nbytes
    timeline = Timeline(tuple(described), tuple(alive), tuple(allowed))
    return Probe(timeline, {n: tuple(s) for n, s in spans.items()}, where_used, placed)


class _Position:
    """From a time to the position of the layer call that it belongs to: the latest one begun."""

    def __init__(self, starts: list[int]) -> None:
        self.starts = starts

    def __call__(self, time: int) -> int:
        import bisect

        return max(bisect.bisect_right(self.starts, time) - 1, 0)

    def sums(self, by_time: dict[int, float]) -> list[float]:
        out = [0.0] * len(self.starts)
        for time, amount in by_time.items():
            out[self(time)] += amount
        return out


def _within(time: int, layers: list[_Call], at: _Position) -> bool:
    call = layers[at(time)]
    return call.start <= time <= call.end


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


@contextmanager
def _undone(root: nn.Module) -> Any:
    """Put back what a step changes: random states, buffers, Python attributes of modules and lists in them."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None, torch.random.get_rng_state()
    buffers = {name: buffer.detach().clone() for name, buffer in root.named_buffers()}
    attributes = [(module, {k: (v, _saved(v)) for k, v in _plain(module).items()}) for module in root.modules()]
    gradients = [(p, p.grad, p.requires_grad) for p in root.parameters()]
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        for module, plain in attributes:
            for key in set(_plain(module)) - set(plain):
                del module.__dict__[key]
            for key, (value, saved) in plain.items():
                module.__dict__[key] = _put_back(value, saved)
        with torch.no_grad():
            for name, buffer in root.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        for parameter, grad, requires in gradients:
            parameter.grad = grad
            if parameter.requires_grad != requires:
                parameter.requires_grad_(requires)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}


def _saved(value: Any) -> Any:
    """What is needed to undo changes inside ``value``."""
    if type(value) in (list, dict, set):
        return value.copy()
    return value.detach().clone() if type(value) is Tensor else None


def _put_back(value: Any, saved: Any) -> Any:
    """Undo changes inside ``value``, which stays the same object."""
    if type(value) is list:
        value[:] = saved
    elif type(value) in (dict, set):
        value.clear()
        value.update(saved)
    elif type(value) is Tensor and value.shape == saved.shape:
        with torch.no_grad():
            value.copy_(saved)
    return value
