"""Operations of which the gradient of the weight can be computed alone, by the very calls that autograd makes.

::

    linear, addmm       out = x W^T      gradient of W, later: out'^T x     mm
    convolutions                         of weight and bias at once         convolution_backward
    embedding           out = W[x]       out' added up by index             embedding_backward
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "Operation", "Product"]

_aten = torch.ops.aten
_linear = F.linear
_addmm = torch.addmm
_embedding = torch.embedding


def _as_it_is(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Product:
    """One call of such an operation.

    Attributes:
        input: What is multiplied by the weight, in the shape in which autograd keeps it.
        weight: The weight.
        bias: The bias, if ``run`` adds one.
        run: The operation: from input, weight and bias to the output.
        gradients: From input and gradient of the output to the gradient of the weight, and that of the bias if
            ``both``. It holds neither weight nor bias.
        finish: From the output of ``run`` to that of the call.
        both: Whether the gradient of the bias comes with that of the weight; otherwise autograd takes care of it.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gradients: Callable[[Tensor, Tensor], Sequence[Tensor]]
    finish: Callable[[Tensor], Tensor] = _as_it_is
    both: bool = False


@dataclass(frozen=True)
class Operation:
    """A function of torch.

    Attributes:
        namespace: Where callers find it.
        name: Under this name.
        product: From a call's arguments (tensors of their final type) to its product; ``None`` where it is odd.
        weight: Position and name of the weight among the arguments.
        bias: The same of a bias of which the gradient is computed with that of the weight.
        casts: Whether autocast gives its arguments a lower precision.
    """

    namespace: Any
    name: str
    product: Callable[..., Product | None]
    weight: tuple[int, str]
    bias: tuple[int, str] | None = None
    casts: bool = True


def _of_second(column_major: bool, first: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``second`` in ``first.mm(second)``: autograd's ``mm_mat2_backward``."""
    return grad.t().mm(first).t() if column_major else first.t().mm(grad)


def _is_fused(dims: int) -> bool:
    """Whether this version of torch adds the bias to a contiguous input's product in the same call."""
    with torch.inference_mode(False), torch.enable_grad():
        ones = torch.ones((1,) * dims, device="cpu", requires_grad=True)
        node = _linear(ones, torch.ones(1, 1, device="cpu"), torch.ones(1, device="cpu")).grad_fn
    return "Add" not in node.name().replace("Addmm", "")  # type: ignore[union-attr]


_FUSED = frozenset(dims for dims in range(3, 8) if _is_fused(dims))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product | None:
    """``torch.nn.functional.linear``: one product of matrices, made as ``at::linear`` makes it."""
    if input.dim() < 2 or weight.dim() != 2:
        return None
    flat = input.reshape(-1, input.shape[-1]) if input.dim() > 2 else input
    fused = bias is not None and (input.dim() == 2 or (input.dim() in _FUSED and input.is_contiguous()))
    column_major = weight.stride() == (weight.shape[1], 1)  # of the transposed weight
    shape = input.shape[:-1]

    def gradients(x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        return (_of_second(column_major, x, grad).t(),)

    def finish(out: Tensor) -> Tensor:
        whole = out.view(*shape, out.shape[-1]) if len(shape) > 1 else out
        return whole if fused or bias is None else whole + bias

    return Product(flat, weight, bias if fused else None, _linear, gradients, finish)


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Product | None:
    """``torch.addmm``, which `transformers` calls in its ``Conv1D``."""
    if options or mat1.dim() != 2 or mat2.dim() != 2:
        return None
    column_major = mat2.stride() == (1, mat2.shape[0])

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return _addmm(bias, x, weight)

    return Product(mat1, mat2, input, run, lambda x, grad: (_of_second(column_major, x, grad),))


def embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Product | None:
    """``torch.embedding``, which ``torch.nn.functional.embedding`` calls."""
    if sparse:
        return None
    count = weight.shape[0]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _embedding(weight, x, padding_idx, scale_grad_by_freq, sparse)

    def gradients(x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        return (_aten.embedding_backward(grad, x, count, padding_idx, scale_grad_by_freq, sparse),)

    return Product(indices, weight, None, run, gradients)


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    """A number for each dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _convolution(
    original: Callable[..., Tensor],
    dims: int,
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Product | None:
    if input.dim() != dims + 2 or weight.dim() != dims + 2:
        return None
    spread = _each(dilation, dims)
    if isinstance(padding, str):
        total = [d * (size - 1) for d, size in zip(spread, weight.shape[2:], strict=True)]
        if padding not in ("same", "valid") or (padding == "same" and any(t % 2 for t in total)):
            return None
        padding = [t // 2 for t in total] if padding == "same" else 0
    settings = [_each(stride, dims), _each(padding, dims), spread, transposed, _each(output_padding, dims), groups]
    both = bias is not None and bias.requires_grad
    sizes = list(bias.shape) if bias is not None else None
    shape, strides, dtype = weight.shape, weight.stride(), weight.dtype  # of the weight, nothing else counts

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if transposed:
            return original(x, weight, bias, *settings[:2], settings[4], groups, spread)
        return original(x, weight, bias, *settings[:3], groups)

    def gradients(x: Tensor, grad: Tensor) -> Sequence[Tensor]:
        like = torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
        return _aten.convolution_backward(grad, x, like, sizes, *settings, [False, True, both])[1 : 2 + both]

    return Product(input, weight, bias, run, gradients, both=both)


def _forward_convolution(
    original: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Product | None:
    return _convolution(original, dims, False, input, weight, bias, stride, padding, 0, dilation, groups)


def _transposed_convolution(
    original: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Product | None:
    return _convolution(original, dims, True, input, weight, bias, stride, padding, output_padding, dilation, groups)


def _convolutions() -> list[Operation]:
    found = []
    for dims in (1, 2, 3):
        for prefix, product in (("conv", _forward_convolution), ("conv_transpose", _transposed_convolution)):
            name = f"{prefix}{dims}d"
            found.append(Operation(F, name, partial(product, getattr(F, name), dims), (1, "weight"), (2, "bias")))
    return found


OPERATIONS = (
    Operation(F, "linear", linear, (1, "weight")),
    Operation(torch, "addmm", addmm, (2, "mat2")),
    Operation(torch, "embedding", embedding, (0, "weight"), casts=False),
    *_convolutions(),
)
"""As layers of ``torch.nn`` and of other libraries call them."""
