"""What a model was before a checkpoint's weights came in, until it is known that the rest of the checkpoint fits."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.lazy import Lazy
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors, swap

__all__ = ["Before"]

_ROOM = 0.25
"""The part of the host's free memory that the copies of all its processes may take."""


class Before:
    """The parameters and buffers of a model as they are now; lazy ones cost no memory.

    Args:
        module: The model.
        processes: How many processes of this host do the same at once.

    Attributes:
        whole: Whether they are kept: there is room for them.
    """

    def __init__(self, module: nn.Module, processes: int) -> None:
        self._tensors = dict(named_tensors(module))
        made = [tensor for tensor in self._tensors.values() if not isinstance(tensor, Lazy)]
        size = sum(tensor.nbytes for tensor in made if tensor.device.type == "cpu" and not is_placeholder(tensor))
        self.whole = size * processes <= _ROOM * _free_bytes()
        kept = self._tensors.values() if self.whole else ()
        self._restores = [restore for tensor in kept if (restore := _kept(tensor)) is not None]

    def put_back(self, module: nn.Module) -> None:
        """Let the model have the same tensors with the same values again, if they have been kept.

        Args:
            module: The model.
        """
        if not self.whole:
            return
        swap(module, lambda name, tensor: self._tensors.get(name, tensor))
        for restore in self._restores:
            restore()


def _kept(tensor: Tensor) -> Callable[[], None] | None:
    """Puts back what a tensor holds."""
    if is_placeholder(tensor):
        return None
    if isinstance(tensor, Lazy):
        recipe, shell, calls = tensor.recipe, tensor.shell, list(tensor.recipe.calls)

        def make_as_before() -> None:
            tensor.recipe, tensor.shell = recipe, shell
            recipe.calls[:] = calls

        return make_as_before
    values = tensor.detach().clone()

    def copy() -> None:
        if tensor.dtype == values.dtype and tensor.device == values.device:
            with torch.no_grad():
                tensor.copy_(values)
        else:
            tensor.data = values

    return copy


def _free_bytes() -> float:
    """The memory that this host has free, as far as it is known."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    return float("inf")
