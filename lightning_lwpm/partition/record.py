"""What happens in one run of a step: calls of modules, uses of tensors, work done; time is a counter of events."""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_lwpm.staging.functions import written
from lightning_lwpm.staging.lazy import Lazy
from lightning_lwpm.staging.remote import is_metadata
from lightning_lwpm.staging.sites import Site, site
from lightning_lwpm.staging.tree import flatten, tensors
from lightning_lwpm.staging.ways import arguments_of, moment, way

__all__ = ["Call", "Counter", "Derivation", "Operation", "Recorder", "Region", "storage"]

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_GET_GRAD = Tensor.grad.__get__  # type: ignore[union-attr]

# With manual optimization they come before or after all layers, and look only whether there is a gradient to forget.
_ZERO_GRAD = {inspect.unwrap(kind.zero_grad).__code__ for kind in (torch.optim.Optimizer, torch.nn.Module)}


@dataclass
class Call:
    """A call of any module that holds parameters, itself or below."""

    name: str
    start: int
    end: int = 0
    has_inner: bool = False
    functions: int = 0  # torch functions called before it
    moment: int = 0  # the number of the next node of autograd's graph
    operations: int = 0  # operations noted before it


@dataclass
class Region:
    """A part of the step that the user recomputes in the backward pass, as a whole."""

    start: int
    functions: int
    end: int = 0


@dataclass
class Derivation:
    """A call of ``torch.autograd.grad``.

    Attributes:
        site: Where it is in the user's code.
        first: The earliest node of the graph that lies between its inputs and its outputs.
        time: When it was called, by the recorder's clock.
    """

    site: Site
    first: int
    time: int


@dataclass
class Operation:
    """A call of a layer or of a torch function, to be run again by itself.

    Attributes:
        call: The layer's name, or the function.
        spec: Its arguments without tensors, see :func:`~lightning_lwpm.staging.tree.flatten`.
        inputs: The tensors among its arguments.
        outputs: The tensors that it returned.
        time: When it ended.
        grad: Whether autograd followed it.
    """

    call: str | Callable[..., Any]
    spec: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    time: int
    grad: bool


class Recorder(TorchFunctionMode):
    """Follows tensors through functions; time is a counter of events."""

    def __init__(self, named: dict[int, str], weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.named = named  # id of parameter or buffer -> its name
        self.weights = {storage(tensor): tensor for tensor in weights}
        self.written: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # parameter or buffer -> it, its memory, its values
        self.clock = 0
        self.functions = 0
        self.all_functions = 0  # also those of constants
        self.calls: list[Call] = []
        self.regions: list[Region] = []
        self.wholes: list[Region] = []
        self.used: dict[str, list[int]] = defaultdict(list)
        self.born: dict[int, tuple[int, int]] = {}  # storage -> (time, bytes)
        self.reads: dict[int, list[int]] = defaultdict(list)  # storage -> times of its uses, ascending
        self.keep: list[Tensor] = []  # so that no address is used twice
        self.operations: list[Operation] = []
        self.idle = False  # whether what happens is no part of the step
        self.saved: dict[int, tuple[int, int]] = {}  # storage kept for the backward pass -> (time, bytes)
        self.derivations: list[Derivation] = []
        self._derived: dict[Node, int] = {}  # what such a call has returned -> the earliest node of its way

    def touch(self, values: Any) -> bool:
        """Note the use of tensors; whether any of them depends on parameters."""
        found = False
        for tensor in tensors(values):
            name = self.named.get(id(tensor))
            if name is not None:
                self.used[name].append(self.clock)
                found = True
            key = storage(tensor)
            if key in self.born:
                self.reads[key].append(self.clock)
                found = True
        return found

    def produce(self, values: Any) -> None:
        """Note tensors made here."""
        for tensor in tensors(values):
            key = storage(tensor)
            if key not in self.born:
                self.born[key] = (self.clock, tensor.numel() * tensor.element_size())
                self.keep.append(tensor)

    def writes(self, tensor: Tensor) -> None:
        """Note that a tensor is about to be written, if it is a parameter or buffer."""
        weight = self.weights.get(storage(tensor))
        name = self.named.get(id(weight))
        if weight is not None and name is not None and name not in self.written:
            with torch._C.DisableTorchFunction():
                self.written[name] = weight, weight.data, weight.data.clone()

    def undo_writes(self) -> None:
        """Give parameters and buffers back the values that they had."""
        for weight, memory, values in self.written.values():
            weight.data = memory.copy_(values)

    def note(self, call: str | Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Note an operation, to be run again by itself."""
        inputs: list[Tensor] = []
        spec = flatten((args, kwargs), inputs)
        self.operations.append(Operation(call, spec, inputs, tensors(out), self.clock, torch.is_grad_enabled()))

    def save(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd keeps for the backward pass, unless it is a weight."""
        with torch._C.DisableTorchFunction():
            key = storage(tensor)
            if key not in self.saved and key not in self.weights:
                # one part of a tensor made here keeps the whole of it; a batch lives anyway
                whole = key in self.born and tensor.layout is torch.strided
                nbytes = tensor.untyped_storage().nbytes() if whole else tensor.numel() * tensor.element_size()
                self.saved[key] = (self.clock, nbytes)
                self.keep.append(tensor)
            if tensor.grad_fn is None:
                return tensor
            self.idle = True
            try:
                return tensor.detach()  # a graph that keeps its own result is never collected
            finally:
                self.idle = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func) or (func == _GET_GRAD and sys._getframe(1).f_code in _ZERO_GRAD):
            return func(*args, **kwargs)
        self.all_functions += 1
        depends = self.touch((args, kwargs))
        if func == _SET_DATA:
            self.writes(args[0])
        first = self._first(args, kwargs) if func is torch.autograd.grad else None
        out = func(*args, **kwargs)
        if first is not None:
            self.derivations.append(Derivation(site(), first, self.clock))
            self._derived.update((t.grad_fn, first) for t in tensors(out) if t.grad_fn is not None)
        if depends or first is not None:
            self.clock += 1
            self.functions += 1
            self.produce(out)
            self.note(func, args, kwargs, out)
        return out

    def _first(self, args: Any, kwargs: Any) -> int | None:
        """The earliest node of the graph that ``torch.autograd.grad`` comes to; ``None`` if there is no way."""
        nodes = way(*arguments_of(args, kwargs))
        # what such a call has made may be numbered by another thread: it counts as what the call came to
        return min((min(moment(node), self._derived.get(node, moment(node))) for node in nodes), default=None)

    @contextmanager
    def watching_checkpoints(self) -> Iterator[None]:
        """Note where ``torch.utils.checkpoint`` is at work."""
        hooks = torch.autograd.graph.saved_tensors_hooks
        enter, leave = hooks.__enter__, hooks.__exit__
        open_regions: dict[int, Region] = {}

        def entering(context: Any) -> None:
            if type(context).__module__ == "torch.utils.checkpoint":
                open_regions[id(context)] = Region(self.clock, self.functions)
                self.regions.append(open_regions[id(context)])
            return enter(context)

        def leaving(context: Any, *error: object) -> None:
            if id(context) in open_regions:
                open_regions.pop(id(context)).end = self.clock
            return leave(context, *error)

        hooks.__enter__, hooks.__exit__ = entering, leaving  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            hooks.__enter__, hooks.__exit__ = enter, leave  # type: ignore[method-assign]

    @contextmanager
    def watching_functions(self) -> Iterator[None]:
        """Note where a user's ``autograd.Function`` is at work, which may call layers: to a step it is one function."""
        apply = torch.autograd.Function.__dict__["apply"]

        def through(cls: Any, *args: Any, **kwargs: Any) -> Any:
            whole = Region(self.clock, self.functions)
            self.wholes.append(whole)
            try:
                return apply.__get__(None, cls)(*args, **kwargs)
            finally:
                whole.end = self.clock

        torch.autograd.Function.apply = classmethod(through)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]


class Counter(TorchDispatchMode):
    """Adds up FLOPs and bytes written, by the recorder's clock."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.flops: dict[int, float] = defaultdict(float)
        self.bytes: dict[int, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recorder.idle:
            return func(*args, **kwargs)
        for tensor in written(func, args, kwargs):
            self.recorder.writes(tensor)
        out = func(*args, **kwargs)
        now = self.recorder.clock
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops[now] += formula(*args, **kwargs, out_val=out)
        for tensor in tensors(out):
            self.bytes[now] += tensor.numel() * tensor.element_size()
        return out


def storage(tensor: Tensor) -> int:
    """What tells whether two tensors share memory."""
    with torch._C.DisableTorchFunction():  # called by hooks too, while functions are counted
        tensor = tensor.shell if isinstance(tensor, Lazy) else tensor  # views of a lazy tensor share that of its shell
        return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
