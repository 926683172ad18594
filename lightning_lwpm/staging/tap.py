"""The node of autograd's graph that promises the gradient of a weight instead of computing it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.products import Product
from lightning_lwpm.staging.promise import Promise
from lightning_lwpm.staging.record import version

__all__ = ["Promises", "Tap"]


class Promises(Protocol):
    """Takes promises."""

    @property
    def waiting(self) -> bool:
        """Whether weight gradients that come up now can wait."""

    def promise(self, weight: nn.Parameter, dtype: torch.dtype, compute: Callable[[], Tensor]) -> Promise:
        """A gradient that is owed, for autograd to add to that of a weight."""


class Tap(torch.autograd.Function):
    """Passes an output on, and promises the gradient of the weight that made it."""

    @staticmethod
    def forward(
        ctx: Any,
        deferral: Promises,
        product: Product,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        out: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
    ) -> Tensor:
        ctx.deferral, ctx.weight, ctx.bias = deferral, weight, bias
        ctx.run, ctx.gradients, ctx.both, ctx.dtype = product.run, product.gradients, product.both, w.dtype
        ctx.save_for_backward(x, *((w, b) if x.requires_grad else ()))  # nothing that autograd would not keep
        ctx.set_materialize_grads(False)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        nothing, grad = (None, None, None, None), grads[0]
        if grad is None:
            return *nothing, None, None, None, None
        x, *others = ctx.saved_tensors
        if torch.is_grad_enabled() and others:  # a graph of the gradients: by the operation itself
            w, b = others
            wanted = [tensor for tensor in (x, w, b) if tensor is not None and tensor.requires_grad]
            found = torch.autograd.grad(ctx.run(x, w, b), wanted, grad, create_graph=True)
            by_tensor = dict(zip(map(id, wanted), found, strict=True))
            return *nothing, None, *(by_tensor.get(id(tensor)) for tensor in (x, w, b))
        deferral = ctx.deferral
        if torch.is_grad_enabled() or not deferral.waiting:
            of_weight, *rest = ctx.gradients(x, grad)
            return *nothing, grad, None, of_weight, rest[0] if rest else None
        work = _Work(ctx.gradients, x.detach(), grad.detach())  # without the graph that they come from
        of_weight = deferral.promise(ctx.weight, ctx.dtype, partial(work.part, 0))
        of_bias = deferral.promise(ctx.bias, ctx.dtype, partial(work.part, 1)) if ctx.both else None
        return *nothing, grad, None, of_weight, of_bias


class _Work:
    """One computation of gradients, with what it needs until it is done."""

    def __init__(self, gradients: Callable[[Tensor, Tensor], Sequence[Tensor]], x: Tensor, grad: Tensor) -> None:
        self.gradients, self.x, self.grad, self.version = gradients, x, grad, version(x)
        self.parts: Sequence[Tensor] = ()

    def part(self, index: int) -> Tensor:
        """The gradient of the weight (0) or of the bias (1)."""
        if not self.parts:
            if version(self.x) != self.version:
                raise PipelineError(
                    f"the input {tuple(self.x.shape)} of a layer was changed in place after its backward pass, before "
                    "the gradient of its weight was computed; change a copy, or take a schedule that does not defer "
                    "weight gradients, such as '1f1b'"
                )
            self.parts = self.gradients(self.x, self.grad)
            del self.x, self.grad
        return self.parts[index]
