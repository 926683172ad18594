"""A layer call with the functions after it, cut out of a step so that it can be run by itself.

::

    step        h.0.attn.c_attn   split  sdpa  h.0.attn.c_proj   add  h.0.ln_2   ...
    segment    [------------- 4 ------------] [------- 5 -----] [---- 6 ----
                layer            functions

Equal segments (same layers, functions, shapes and types; a transformer has about ten) have the same digest and need
to be run only once. A segment holds no data but that of integer and boolean inputs, and can be sent to another rank,
which runs it with its own copy of the layer.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.partition.record import Operation
from lightning_lwpm.staging.lazy import realised
from lightning_lwpm.staging.placement import swap
from lightning_lwpm.staging.tree import duplicate, flatten, unflatten

__all__ = ["Segment", "cut"]

_MAX_VALUES = 1 << 20  # an integer input of more elements is replaced by zeros


@dataclass(frozen=True)
class Operand:
    """A tensor that comes into a segment.

    Attributes:
        shape: Its shape.
        stride: Its strides, in elements.
        dtype: Its type.
        grad: Whether a gradient flows back through it.
        name: Of the parameter or buffer that it is; "" for others.
        values: What it held, of an integer or boolean tensor: values may be indices, and choose what is done.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    grad: bool
    name: str = ""
    values: Tensor | None = None

    def make(self, device: torch.device) -> Tensor:
        """A tensor like it, with random values where these do not matter."""
        size = (
            1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if all(self.shape) else 0
        )
        if self.values is not None:
            return duplicate(self.values).to(device)  # a copy: the segment may change it in place
        flat = torch.zeros(size, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            flat.normal_()
        made = flat.as_strided(self.shape, self.stride)
        return made.requires_grad_().clone() if self.grad else made  # a clone is no leaf, so it may be changed in place


@dataclass(frozen=True)
class _Step:
    """One operation of a segment; numbers stand for tensors."""

    call: str | Callable[..., Any]
    spec: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    grad: bool


@dataclass(frozen=True)
class Segment:
    """A straight piece of a step.

    Attributes:
        layers: The layers that it calls, by name.
        operands: What comes in, by number.
        results: The numbers of the tensors that go out and have gradients.
        digest: The same for segments that do the same; tells them apart over runs and machines.
    """

    layers: tuple[str, ...]
    steps: tuple[_Step, ...]
    operands: dict[int, Operand]
    results: tuple[int, ...]
    digest: str

    def modules(self, root: nn.Module, device: torch.device) -> dict[str, nn.Module]:
        """Copies of its layers on a device."""
        copies = {name: copy.deepcopy(root.get_submodule(name)) for name in self.layers}
        for layer in copies.values():
            swap(layer, lambda _, tensor: realised(tensor))
        return {name: layer.to(device) for name, layer in copies.items()}

    def inputs(self, device: torch.device) -> dict[int, Tensor]:
        """Fresh tensors for what comes in."""
        return {number: operand.make(device) for number, operand in self.operands.items()}

    def run(self, modules: dict[str, nn.Module], env: dict[int, Tensor]) -> list[Tensor]:
        """Run it.

        Args:
            modules: Its layers.
            env: What comes in, by number; what is made is added.

        Returns:
            The tensors that go out and have gradients.
        """
        for step in self.steps:
            args, kwargs = unflatten(step.spec, iter([env[number] for number in step.inputs]))
            call = modules[step.call] if isinstance(step.call, str) else step.call
            with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
                out = call(*args, **kwargs)
            leaves: list[Tensor] = []
            flatten(out, leaves)
            env.update(zip(step.outputs, leaves, strict=True))
        return [env[number] for number in self.results if env[number].requires_grad]


def cut(root: nn.Module, operations: Sequence[Operation], position: Callable[[int], int], count: int) -> list[Segment]:
    """Cut a recorded run into one segment for each layer call.

    Args:
        root: The model.
        operations: What the run did, in order.
        position: From a time of the recorder to the layer call that it belongs to.
        count: Number of layer calls.
    """
    names = {id(t): name for name, t in [*root.named_parameters(), *root.named_buffers()]}
    pieces: list[list[Operation]] = [[] for _ in range(count)]
    for operation in operations:
        pieces[position(operation.time)].append(operation)
    wanted: set[int] = set()
    segments = []
    for piece in reversed(pieces):  # what later pieces use is what goes out
        segments.append(_segment(root, names, piece, wanted))
        wanted.update(id(t) for operation in piece for t in operation.inputs)
    return segments[::-1]


def _segment(root: nn.Module, names: dict[int, str], piece: Sequence[Operation], wanted: set[int]) -> Segment:
    numbers: dict[int, int] = {}
    operands: dict[int, Operand] = {}
    made: dict[int, Tensor] = {}
    steps = []

    def number(tensor: Tensor) -> int:
        return numbers.setdefault(id(tensor), len(numbers))

    for operation in piece:
        for tensor in operation.inputs:
            if id(tensor) not in numbers:
                operands[number(tensor)] = _operand(tensor, names.get(id(tensor), ""))
        for tensor in [*operation.outputs, *_changed(operation)]:
            made[number(tensor)] = tensor
        steps.append(
            _Step(
                operation.call,
                operation.spec,
                tuple(map(number, operation.inputs)),
                tuple(map(number, operation.outputs)),
                operation.grad,
            )
        )
    used = {id(tensor) for operation in piece for tensor in operation.inputs}
    leaving = {n: t for n, t in made.items() if t.requires_grad}
    results = [n for n, t in leaving.items() if id(t) in wanted] or [n for n, t in leaving.items() if id(t) not in used]
    layers = dict.fromkeys(operation.call for operation in piece if isinstance(operation.call, str))
    return Segment(tuple(layers), tuple(steps), operands, tuple(results), _digest(root, steps, operands, results))


def _changed(operation: Operation) -> list[Tensor]:
    """What an operation changes without returning it: ``x[...] = y`` makes a new ``x``."""
    return operation.inputs[:1] if getattr(operation.call, "__name__", "") == "__setitem__" else []


def _operand(tensor: Tensor, name: str) -> Operand:
    with torch._C.DisableTorchFunction():
        discrete = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        values = duplicate(tensor.detach()).cpu() if discrete and tensor.numel() <= _MAX_VALUES else None
        return Operand(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, name, values)


def _digest(root: nn.Module, steps: Iterable[_Step], operands: dict[int, Operand], results: Iterable[int]) -> str:
    shapes = {n: (o.shape, o.stride, o.dtype, o.grad, bool(o.name)) for n, o in operands.items()}
    told = [(_described(root, step.call), _plain(step.spec), step.inputs, step.outputs, step.grad) for step in steps]
    return hashlib.sha256(repr((shapes, told, list(results))).encode()).hexdigest()[:24]


def _described(root: nn.Module, call: str | Callable[..., Any]) -> str:
    if not isinstance(call, str):
        return f"{getattr(call, '__module__', '')}.{getattr(call, '__qualname__', repr(type(call)))}"
    module = root.get_submodule(call)
    tensors = [
        (n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in [*module.named_parameters(), *module.named_buffers()]
    ]
    code = [_code(getattr(inspect.unwrap(inner.forward), "__code__", None)) for inner in module.modules()]
    return f"{type(module).__module__}.{type(module).__qualname__} {module!r} {module.training} {tensors} {code}"


def _code(constant: Any) -> Any:
    """What a function's code does, without where it stands: instructions, names, and constants (code among them)."""
    if isinstance(constant, CodeType):
        return constant.co_code.hex(), constant.co_names, [_code(inner) for inner in constant.co_consts]
    if isinstance(constant, frozenset):  # the order of its text differs from process to process
        return sorted(map(repr, constant))
    return repr(constant)


def _plain(spec: Any) -> str:
    """A spec as text without addresses."""
    if spec is None:
        return "tensor"
    kind, context, children = spec
    if children is None:
        return repr(context) if kind == "plain" else type(context).__name__
    keys = context if kind is dict else context[1] if kind in ("dataclass", "mapping") else ""
    return f"{getattr(kind, '__name__', kind)}{keys}({', '.join(map(_plain, children))})"
