"""Autocast's casts, made before an operation instead of inside it: the very tensors that it casts and remembers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["lowered", "precision"]

_convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def precision(device: str) -> torch.dtype | None:
    """The type that autocast gives to the arguments of products now, or ``None`` where it does nothing.

    Args:
        device: The type of the device.
    """
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def lowered(value: Any, dtype: torch.dtype) -> Any:
    """An argument as autocast hands it to a product, with its place in the graph; anything but tensors as it is.

    A leaf is cast once and remembered, so that all its uses share a cast, and add up their gradients before it.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (torch.float64, dtype):
        return value
    if value.is_leaf and value.requires_grad and value.dtype is torch.float32 and 1 <= value.dim() <= 5:
        return _remembered(value)
    return value.to(dtype)


def _remembered(leaf: Tensor) -> Tensor:
    """What autocast remembers of a leaf: looked up in the graph of a product with nothing."""
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):  # a checkpoint's would run the layer again
        if leaf.dim() > 2:
            nothing = torch.empty(0, *leaf.shape[1:], dtype=leaf.dtype, device=leaf.device, requires_grad=True)
            return _convolve[leaf.dim()](nothing, leaf).grad_fn._saved_weight  # type: ignore[union-attr]
        nothing = torch.empty(0, leaf.shape[0], dtype=leaf.dtype, device=leaf.device, requires_grad=True)
        node: Any = torch.matmul(nothing, leaf).grad_fn
        return node._saved_vec if leaf.dim() == 1 else node._saved_mat2


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
