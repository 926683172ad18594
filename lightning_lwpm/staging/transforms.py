"""Transforms of whole functions: ``torch.func``, ``torch.vmap`` and forward-mode differentiation.

They wrap tensors in a way that ends where one stage's part of a step ends, so no stage may begin within one.
"""

import torch
from torch.autograd import forward_ad

from lightning_lwpm.errors import PipelineError

__all__ = ["check_transforms", "transformed"]


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work (a private name of torch's)."""
    return torch._C._are_functorch_transforms_active()


def check_transforms(layer: str) -> None:
    """Make sure that a layer with which a stage begins is not called within a transform.

    Args:
        layer: The layer's name.

    Raises:
        PipelineError: if it is.
    """
    if transformed() or forward_ad._current_level >= 0:  # the same
        raise PipelineError(
            f"layer '{layer}', with which a stage begins, is called within a function of `torch.func`, `torch.vmap` or "
            "forward-mode differentiation: use `torch.autograd.grad(..., create_graph=True)` or "
            "`torch.autograd.functional`, or name layers in `partition=[...]` so that no stage begins there"
        )
