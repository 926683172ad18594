"""Weight gradients computed later: a backward pass in two parts, I (gradients of inputs) and W (gradients of weights).

::

    F   out = linear(x, W.detach())  ->  tap(out, x, W)     autograd sees W only in the tap
    I   grad of out  ->  linear's own backward: grad of x   and the tap's: a promise of the gradient of W,
                                                            which autograd adds to others, casts, hands to W
    W   promises are kept: one product each, added to W.grad in the order in which they came

Only what :mod:`~lightning_lwpm.staging.products` knows is deferred, and only for weights that are parameters without
hooks; all else runs as always. Since autograd itself puts promises together, sums have the terms and the order of an
ordinary backward pass, and so its bits.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lwpm.staging.casts import lowered, precision
from lightning_lwpm.staging.products import OPERATIONS, Operation, Product
from lightning_lwpm.staging.promise import Promise, evaluate
from lightning_lwpm.staging.remote import localise
from lightning_lwpm.staging.tap import Tap
from lightning_lwpm.staging.transforms import transformed

__all__ = ["Deferral", "deferring"]

_TYPES = (Tensor, nn.Parameter)  # subclasses have operations of their own


@dataclass
class _Ledger:
    """What has been added to a weight's gradient since its first promise, in order."""

    weight: nn.Parameter
    total: Tensor | None
    handle: RemovableHandle | None = None
    entries: deque[tuple[Hashable, Tensor]] = field(default_factory=deque)


class Deferral:
    """The weight gradients that this rank owes.

    Args:
        between_layers: Whether the code that runs is that between layers, where a step names what is called.
    """

    def __init__(self, between_layers: Callable[[], bool] = lambda: False) -> None:
        self.between_layers = between_layers
        self._key: Hashable = None  # of the micro-batch of which input gradients are being computed
        self._ledgers: dict[Tensor, _Ledger] = {}
        self._owed: dict[Hashable, dict[Tensor, _Ledger]] = defaultdict(dict)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass of a backward pass that is to be split."""
        global _current
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before

    @contextmanager
    def inputs(self, key: Hashable) -> Iterator[None]:
        """The backward pass without weight gradients; layers that are run again (checkpoints) are run as before.

        Args:
            key: Names the micro-batch and the stage.
        """
        self._key = key
        try:
            with self.forward():
                yield
        finally:
            self._key = None

    @torch.no_grad()
    def weights(self, key: Hashable) -> None:
        """Compute the weight gradients of which :meth:`inputs` has left the computation, and add them up."""
        for weight, ledger in self._owed.pop(key, {}).items():
            for i, (owner, gradient) in enumerate(ledger.entries):
                if owner == key:
                    ledger.entries[i] = owner, evaluate(gradient)
            # what an earlier micro-batch still owes comes first
            while ledger.entries and not isinstance(ledger.entries[0][1], Promise):
                ledger.total = _added(ledger.total, ledger.entries.popleft()[1], weight)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The time of a batch with split passes: afterwards nothing is owed, and all gradients are in ``.grad``."""
        # what someone else has put in the place of a function of torch's stays there
        here = [op for op in OPERATIONS if getattr(op.namespace, op.name) is _ORIGINALS[op.name]]
        for op in here:
            setattr(op.namespace, op.name, _DEFERRED[op.name])
        try:
            yield
            for key in list(self._owed):
                self.weights(key)
        finally:
            for op in here:
                setattr(op.namespace, op.name, _ORIGINALS[op.name])
            for weight, ledger in self._ledgers.items():
                assert ledger.handle is not None
                ledger.handle.remove()
                weight.grad = ledger.total
            self._ledgers, self._owed = {}, defaultdict(dict)

    def call(self, operation: Operation, args: Any, kwargs: Any) -> Tensor:
        """Call an operation so that the gradient of its weight can wait, if it can."""
        original = _ORIGINALS[operation.name]
        if self.between_layers():
            return original(*args, **kwargs)
        # a layer that is run again is given what the code between layers has: what stands for tensors of other stages
        args, kwargs = [localise(v) for v in args], {key: localise(v) for key, v in kwargs.items()}
        weight, bias = _argument(operation.weight, args, kwargs), _argument(operation.bias, args, kwargs)
        if (
            not self._free(weight)
            or not (bias is None or not bias.requires_grad or self._free(bias))
            or not torch.is_grad_enabled()
            or any(isinstance(v, Tensor) and type(v) not in _TYPES for v in (*args, *kwargs.values()))
            or transformed()
        ):
            return original(*args, **kwargs)
        dtype = precision(weight.device.type) if operation.casts else None
        if dtype is not None:
            args = [lowered(value, dtype) for value in args]
            kwargs = {key: lowered(value, dtype) for key, value in kwargs.items()}
        try:
            product = operation.product(*args, **kwargs)
        except TypeError:  # other arguments than those known: the function itself says what it thinks of them
            product = None
        if product is None:
            return original(*args, **kwargs)
        return product.finish(self._tapped(product, weight, bias))

    def _free(self, weight: Any) -> bool:
        """Whether nobody looks at the gradient of a weight before it is there."""
        return (
            type(weight) is nn.Parameter
            and weight.requires_grad
            and weight.is_leaf
            and weight.is_floating_point()
            and weight.layout is torch.strided
            and weight.device.type in ("cpu", "cuda")
            and not weight._backward_hooks
            and (weight in self._ledgers or not weight._post_accumulate_grad_hooks)
        )

    def _tapped(self, product: Product, weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor:
        x, w, b = product.input, product.weight.detach(), product.bias
        if product.both:
            assert b is not None
            b = b.detach()
            if not x.requires_grad:
                w.requires_grad_()  # torch picks the algorithm by whether a backward pass follows
        out = product.run(x, w, b)
        return Tap.apply(self, product, weight, bias, out, x, product.weight, product.bias)

    @property
    def waiting(self) -> bool:
        """Whether weight gradients that come up now can wait."""
        return self._key is not None

    def promise(self, weight: nn.Parameter, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Promise:
        """A gradient that is owed, for autograd to add to that of a weight."""
        if weight not in self._ledgers:
            ledger = self._ledgers[weight] = _Ledger(weight, weight.grad)
            weight.grad = None
            ledger.handle = weight.register_post_accumulate_grad_hook(self._arrived)
        return Promise(compute, weight, dtype)

    def _arrived(self, weight: Tensor) -> None:
        """Autograd has added something to the gradient of a weight: to nothing, so this is what it was."""
        assert weight.grad is not None
        ledger = self._ledgers[weight]
        ledger.entries.append((self._key, weight.grad))
        self._owed[self._key][weight] = ledger
        weight.grad = None


def _argument(place: tuple[int, str] | None, args: Any, kwargs: Any) -> Any:
    if place is None:
        return None
    position, name = place
    return args[position] if len(args) > position else kwargs.get(name)


def _added(total: Tensor | None, gradient: Tensor, weight: Tensor) -> Tensor:
    """The sum, as autograd adds to ``.grad``: in place, and laid out in memory as the weight is."""
    if total is not None:
        return total.add_(gradient)
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


_current: Deferral | None = None
_ORIGINALS = {operation.name: getattr(operation.namespace, operation.name) for operation in OPERATIONS}


def _deferred(operation: Operation) -> Callable[..., Tensor]:
    original = _ORIGINALS[operation.name]

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or _current is None:  # compiled code stays as it is
            return original(*args, **kwargs)
        return _current.call(operation, args, kwargs)

    return call


_DEFERRED = {operation.name: _deferred(operation) for operation in OPERATIONS}


def deferring(function: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a torch function while weight gradients are deferred."""
    if _current is None:
        return function
    return next((_DEFERRED[name] for name, original in _ORIGINALS.items() if original is function), function)
