"""Writes to weights that graphs of micro-batches in flight still refer to."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

__all__ = ["exchanged", "unnoticed", "writable"]


@contextmanager
def writable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let weights change in place without autograd's notice, so that backward passes in flight use what is there then.

    A backward pass then multiplies the gradient by the weights of its own time, and the activations of its forward
    pass: no weights are kept for it (the "perf" mode of PACI, arXiv 2606.07881).
    """
    with torch.no_grad(), unnoticed(parameters):
        yield


def unnoticed(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """As :func:`writable`, for code that says itself where gradients are recorded: an optimizer's step."""
    return _unsafe_preserve_version_counter(tuple(parameters))


@contextmanager
def exchanged(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Weights hold ``others`` inside, and ``others`` the weights; the contents change, not the tensors.

    Cost: three copies on the way in and three on the way out, one parameter's memory at a time. Neither is changed
    for good unless the caller writes to them inside.
    """
    _exchange(parameters, others)
    try:
        yield
    finally:
        _exchange(parameters, others)


def _exchange(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    with writable(parameters):
        for parameter, other in zip(parameters, others, strict=True):
            kept = parameter.clone()
            parameter.copy_(other)
            other.copy_(kept)
