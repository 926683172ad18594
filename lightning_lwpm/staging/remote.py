"""Remote tensors: what a layer of another stage returned, as shape and type without data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lwpm.staging.tree import map_tensors

__all__ = ["Meta", "Name", "Remote", "asked", "is_metadata", "localise"]


class Name(NamedTuple):
    """What producer and consumer both call a tensor.

    Counting restarts at each layer call (the *region*), so one divergence cannot shift the names of all that follows.
    """

    unit: str  # the latest layer call: the layer's dotted name ("" before the first) ...
    occurrence: int  # ... and which call of it
    index: int  # type: ignore[assignment]  # 0: the layer's own output; i: the i-th torch function since
    leaf: int  # position among the tensors returned; -1-j: the j-th argument, changed in place


class Meta(NamedTuple):
    """What is known of a tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    on_host: bool  # lives in host memory although the stage runs on an accelerator

    @classmethod
    def of(cls, tensor: Tensor) -> "Meta":
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.device.type == "cpu"
        )

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Remote(Tensor):
    """A tensor whose data lives on another stage, until a real operation touches it.

    Attributes:
        label: What its producer calls it.
        stage: The stage that produces it; -1 for a leaf of the batch.
        meta: Shape, strides, type.
        base: The remote tensor that this one is a view of, if ``replay`` can make the view from it.
        replay: Makes this view from the materialised base, so that aliasing survives the boundary.
        shared: Shares memory with another remote tensor in a way that cannot be replayed.
        local: The materialised tensor, once a real operation has touched this one.
        owner: The step in which it was made; it knows how to fetch the data.
    """

    label: Name
    stage: int
    meta: Meta
    base: "Remote | None"
    replay: "Callable[[], Any] | None"
    shared: bool
    local: Tensor | None
    owner: Any

    @staticmethod
    def __new__(cls, meta: Meta, device: torch.device, name: Name, stage: int, owner: Any) -> "Remote":
        device = torch.device("cpu") if meta.on_host else device
        new = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # public for subclass authors
            cls, meta.shape, strides=meta.stride, dtype=meta.dtype, device=device, requires_grad=meta.requires_grad
        )
        new.label, new.stage, new.meta, new.owner = name, stage, meta, owner
        new.base, new.replay, new.shared, new.local = None, None, False, None
        return new

    def __init__(self, *_: Any) -> None: ...

    def materialise(self) -> Tensor:
        """The tensor itself: fetched from its producer at the first touch."""
        if self.local is None:
            self.local = self.owner.materialise(self)
        return self.local

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # reached inside a real layer, by a remote tensor that came in through a closure or an object
        kwargs = kwargs or {}
        if not is_metadata(func):
            args, kwargs = map_tensors(localise, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = map_tensors(localise, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Remote({tuple(self.meta.shape)}, {self.meta.dtype}, stage={self.stage}, name={tuple(self.label)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialise().clone().detach()


def localise(tensor: Tensor) -> Tensor:
    """``tensor``, materialised if it was remote."""
    return tensor.materialise() if type(tensor) is Remote else tensor


def asked(remote: Remote, value: Tensor) -> Tensor:
    """The data of a remote tensor, with a gradient if the user's code has asked for one since it was made."""
    if remote.requires_grad and not value.requires_grad and (torch.is_grad_enabled() or not remote.meta.requires_grad):
        return value.detach().requires_grad_()
    return value


# Attributes that are tensors made from the data: counted and named as functions are.
_DATA_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad"})

# Answered from shape and type alone, on remote and real tensors alike; never counted.
_METADATA_METHODS = """size stride dim ndimension numel nelement storage_offset element_size is_floating_point
    is_complex is_contiguous is_signed get_device __len__ __hash__ is_inference _is_view __repr__ is_same_size is_shared
    is_pinned requires_grad_ has_names"""
_METADATA = frozenset(getattr(Tensor, name) for name in _METADATA_METHODS.split() if hasattr(Tensor, name)) | {
    torch.is_floating_point,
    torch.is_complex,
    torch.is_tensor,
    torch.numel,
    torch.is_inference,
    torch.result_type,
    torch.is_same_size,
}
_getters: dict[Any, bool] = {}


def is_metadata(func: Any) -> bool:
    """Whether ``func`` (as a torch-function handler sees it) needs no tensor data."""
    if func in _METADATA:
        return True
    known = _getters.get(func)
    if known is None:
        known = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__") and (
            getattr(func.__self__, "__name__", "") not in _DATA_ATTRIBUTES
        )
        _getters[func] = known
    return known
