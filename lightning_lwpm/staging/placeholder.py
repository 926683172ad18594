"""Placeholders: parameters and buffers that live on another rank: right shape, type and device, no storage."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.staging.tree import map_tensors, tensors

__all__ = ["COPIED", "LEFT", "Placeholder", "is_placeholder", "placeholder_like", "placeholders_read"]


LEFT = (
    "weights_after_run='rank_zero': this process has not got all weights of the model, only rank 0 has. Use them under "
    "`if trainer.is_global_zero:`, or pass weights_after_run='all_ranks'."
)

COPIED = (
    "this was copied from the model in a hook on rank 0 alone (such as under `rank_zero_only`) while other ranks held "
    "the weights, and has not got their values. Copy it on every rank, or keep `trainer.strategy.merged_module()`, "
    "called on all ranks."
)

_ASKED = (
    "the value of a parameter that lives on another rank of the pipeline was asked for. A hook of the module that rank "
    "0 runs alone, such as `on_train_batch_end` or `on_train_epoch_end`, can use all."
)

_SAVED = (
    "a part of the model that lives on another rank of the pipeline was to be saved or sent (pickled), and its values "
    "are not here. While a run lasts, use `trainer.save_checkpoint(...)` or `trainer.strategy.merged_module()` in a "
    "callback, on all ranks, or wait until the run has ended."
)

_READING = threading.local()


class Placeholder(Tensor):
    """A tensor without storage that optimizers, ``state_dict``, ``.to()``, ``nn.init`` and averaging pass over.

    Whatever is computed from it is a placeholder too. Reading a value raises.
    """

    shell: Tensor  # the same tensor on the meta device
    left: str = ""  # why it was left here at the end of a run without values

    @staticmethod
    def __new__(cls, shell: Tensor, device: torch.device) -> "Placeholder":
        new = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shell.shape, strides=shell.stride(), dtype=shell.dtype, device=device, requires_grad=False
        )
        new.shell = shell.detach()
        return new

    def __init__(self, *_: Any) -> None: ...

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.startswith("aten::_foreach"):
            return _foreach(func, args, kwargs)
        found: list[Placeholder] = []

        def to_meta(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Placeholder):
                found.append(tensor)
                return tensor.shell
            return tensor.to("meta") if tensor.device.type != "meta" and tensor.dim() else tensor

        meta_args, meta_kwargs = map_tensors(to_meta, (args, kwargs))
        left = next((placeholder.left for placeholder in found if placeholder.left), "")
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise ConfigurationError(left or _ASKED)
        device = meta_kwargs.get("device")
        if device is not None:
            meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
        written = func._schema.is_mutable and args and isinstance(args[0], Tensor)
        if written:
            if not isinstance(args[0], Placeholder):
                if left:
                    raise ConfigurationError(left)
                raise RuntimeError(f"{func} writes a parameter of another rank into a tensor of this one")
            return args[0]
        if any(not isinstance(tensor, Placeholder) and tensor.dim() for tensor in tensors((args, kwargs))):
            if left:
                raise ConfigurationError(left)
            raise ConfigurationError(
                f"{func} of a tensor and a parameter {tuple(found[0].shape)} that lives on another rank of the "
                "pipeline: this code uses a layer in a stage where it was not used when the model was partitioned. "
                "Name the layers that begin a stage in `partition=[...]` so that all its uses share a stage. In "
                "hooks the model can be run between batches (`on_train_epoch_end`) and, but in asynchronous training, "
                "after each (`on_train_batch_end`)."
            )
        out = func(*meta_args, **meta_kwargs)
        target = torch.device(device) if device is not None else found[0].device
        made = map_tensors(lambda tensor: Placeholder(tensor, target), out)
        for placeholder in tensors(made) if left else ():
            placeholder.left = left  # type: ignore[attr-defined]
        return made

    def numpy(self, **kwargs: Any) -> Any:
        """Its values as an array, where they can be read; see :func:`placeholders_read`."""
        return self._values().numpy(**kwargs)

    def tolist(self) -> Any:
        """Its values as Python numbers, where they can be read."""
        return self._values().tolist()

    def _values(self) -> Tensor:
        if not _readable():
            raise ConfigurationError(self.left or _ASKED)
        return _READING.read(self)  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Placeholder({tuple(self.shape)}, {self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Placeholder":
        copy = placeholder_like(self)
        copy.left = self.left
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.left:
            raise ConfigurationError(self.left)
        if get_spawning_popen() is None:  # a worker of a DataLoader may get it with what it is a part of
            if not _readable():
                raise ConfigurationError(_SAVED)
            values = self._values().cpu()  # one after another: all of them may be too many for the device
            like = nn.Parameter(values, self.requires_grad) if isinstance(self, nn.Parameter) else values
            return like.__reduce_ex__(protocol)
        kind = (tuple(self.shape), self.dtype, str(self.device), isinstance(self, nn.Parameter), self.requires_grad)
        return _rebuild, kind


def _foreach(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of lists of tensors, for the real ones among them: placeholders of the first list stay."""
    lists = [i for i, arg in enumerate(args) if isinstance(arg, list | tuple) and len(arg) == len(args[0])]
    real = [j for j, tensor in enumerate(args[0]) if not isinstance(tensor, Placeholder)]
    picked = [[arg[j] for j in real] if i in lists else arg for i, arg in enumerate(args)]
    out = func(*picked, **kwargs) if real else []
    if out is None or func._schema.is_mutable:
        return out
    results = dict(zip(real, out, strict=True))
    return [results[j] if j in results else placeholder_like(tensor.detach()) for j, tensor in enumerate(args[0])]


def _rebuild(shape: tuple[int, ...], dtype: torch.dtype, device: str, parameter: bool, grad: bool) -> Tensor:
    new = Placeholder(torch.empty(shape, dtype=dtype, device="meta"), torch.device(device))
    return nn.Parameter(new, requires_grad=grad) if parameter else new


def placeholder_like(tensor: Tensor, device: torch.device | None = None) -> Any:
    """A placeholder of ``tensor``'s shape and type; a ``Parameter`` if it is one."""
    shell = tensor.shell if isinstance(tensor, Placeholder) else torch.empty_like(tensor.detach(), device="meta")
    new = Placeholder(shell, device or tensor.device)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@contextmanager
def placeholders_read(read: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let values of placeholders be had as arrays and numbers, and be pickled, in this block of this thread.

    Args:
        read: Gives the values of one.
    """
    _READING.read = read
    try:
        yield
    finally:
        _READING.read = None


def _readable() -> bool:
    """Whether this is in a block of :func:`placeholders_read`."""
    return getattr(_READING, "read", None) is not None


def is_placeholder(value: Any) -> bool:
    """Whether ``value`` stands for a tensor of another rank."""
    return isinstance(value, Placeholder)
