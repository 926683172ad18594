"""What a model was before a checkpoint's weights came in, until it is known that the rest of the checkpoint fits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.lazy import Lazy
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors, swap

__all__ = ["Before"]


class Before:
    """The parameters and buffers of a model as they are now; lazy ones cost no memory.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = dict(named_tensors(module))
        self._restores = [restore for tensor in self._tensors.values() if (restore := _kept(tensor)) is not None]

    def put_back(self, module: nn.Module) -> None:
        """Let the model have the same tensors with the same values again.

        Args:
            module: The model.
        """
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
