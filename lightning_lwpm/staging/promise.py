"""A gradient to be computed later, as a tensor that autograd passes on, adds up and casts without looking at it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.staging.tree import map_tensors

__all__ = ["Promise", "evaluate"]

_aten = torch.ops.aten


class Promise(Tensor):
    """Stands for a gradient that has not been computed.

    Sums, casts and aliases of promises are promises. Whatever else is asked of one computes it on the spot, so that
    nobody ever sees a wrong value.

    Args:
        compute: Computes the gradient; called at most once.
        like: A tensor of its shape, strides and device.
        dtype: Its type, by default that of ``like``.
    """

    compute: Callable[[], Tensor] | None
    result: Tensor

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], like: Tensor, dtype: torch.dtype | None = None) -> "Promise":
        new = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=like.device
        )
        new.compute = compute
        return new

    def __init__(self, *_: Any) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0]
        if func is _aten.detach.default:
            return Promise(lambda: evaluate(first), first)
        if func is _aten.add.Tensor and not kwargs and _alike(*args):
            return Promise(lambda: evaluate(first) + evaluate(args[1]), first)
        if func is _aten._to_copy.default and kwargs.keys() == {"dtype"}:
            return Promise(lambda: evaluate(first).to(kwargs["dtype"]), first, kwargs["dtype"])
        values, options = map_tensors(evaluate, (args, kwargs))
        out = func(*values, **options)
        return first if func._schema.is_mutable and isinstance(first, Promise) else out

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Promise({tuple(self.shape)}, {self.dtype}, device={self.device})"


def _alike(*values: Any) -> bool:
    """Whether the sum of some values has the shape and type of the first."""
    first = values[0]
    return all(isinstance(v, Tensor) and (v.shape, v.dtype) == (first.shape, first.dtype) for v in values)


def evaluate(tensor: Tensor) -> Tensor:
    """Compute what was promised, and let go of what that took; other tensors are returned as they are.

    To be called without gradients (``torch.no_grad()``), as a dispatch mode is.
    """
    if not isinstance(tensor, Promise):
        return tensor
    if tensor.compute is not None:
        tensor.result = tensor.compute()
        tensor.compute = None
    return tensor.result
