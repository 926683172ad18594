"""Messages as bytes: plain pickle, but of a tensor only what it shows, from the host, in its memory layout."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.pipeline.wire import dense_stride, to_wire
from lightning_lwpm.staging.remote import Meta

__all__ = ["packed"]


def packed(value: Any) -> bytes:
    """``value`` as bytes that ``pickle.loads`` reads."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles only the part of a storage that a tensor shows, and always from the host."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.layout is torch.strided and not value.is_meta:
            plain = value.detach().to("cpu")
            data = to_wire(plain).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
            return _tensor, (data, plain.dtype, tuple(plain.shape), dense_stride(Meta.of(plain)), value.requires_grad)
        return NotImplemented


def _tensor(
    data: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool
) -> Tensor:
    if not data:
        return torch.empty_strided(shape, stride, dtype=dtype)
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).as_strided(shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor
