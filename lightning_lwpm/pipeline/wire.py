"""Tensors as flat memory and back, in the very same memory layout.

The layout is kept because it decides which kernels run, and so the last bits of the result.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_lwpm.staging.remote import Meta

__all__ = ["dense_stride", "from_wire", "to_device", "to_wire"]


@lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether each element has a place of its own and no place is left over."""
    expected = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


@lru_cache(maxsize=4096)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def dense_stride(meta: Meta) -> tuple[int, ...]:
    """The strides in which a tensor travels: its own if it is dense, else row by row."""
    return meta.stride if _is_dense(meta.shape, meta.stride) else _contiguous(meta.shape)


def to_wire(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` as one flat tensor, in order of memory; no copy where it is dense."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if _is_dense(tuple(tensor.shape), tensor.stride()):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.contiguous().view(-1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one of the host gets there without this thread waiting for the device's earlier work."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def from_wire(flat: Tensor, meta: Meta, device: torch.device) -> Tensor:
    """The inverse of :func:`to_wire`.

    Args:
        flat: The elements, in order of memory.
        meta: Shape and strides of the result.
        device: The stage's device; a tensor that its producer kept on the host stays there.
    """
    if not meta.on_host:
        flat = to_device(flat, device)
    # not as a view: what is received may be changed in place like any other tensor
    dense = torch.empty(0, dtype=flat.dtype, device=flat.device)
    dense.set_(flat.untyped_storage(), flat.storage_offset(), meta.shape, dense_stride(meta))
    if dense.stride() == meta.stride:
        return dense
    if 0 in meta.stride:  # expanded: one place for many elements, also here
        sizes = [1 if step == 0 else size for size, step in zip(meta.shape, meta.stride, strict=True)]
        part = dense.as_strided(sizes, dense.stride())
        narrow = torch.empty_strided(sizes, [step or 1 for step in meta.stride], dtype=meta.dtype, device=dense.device)
        return narrow.copy_(part).as_strided(meta.shape, meta.stride)
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=dense.device).copy_(dense)
