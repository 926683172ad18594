"""The user's reentrant checkpoints, made non-reentrant: autograd then sees the layers in them.

A reentrant checkpoint (``torch.utils.checkpoint`` with ``use_reentrant=True``) runs its layers without a graph, and
makes the graph of all of them within its backward pass. The gradients are those of the other kind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_lwpm.staging.tree import tensors

__all__ = ["never_reentrant", "not_reentrant"]


def not_reentrant(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
    """What ``CheckpointFunction.apply`` with these arguments does, without reentering.

    Args:
        function: What is computed again in the backward pass.
        preserve_rng_state: Whether with the same random numbers.
        inputs: Its arguments.
    """
    # a reentrant checkpoint of inputs without a gradient has none, whatever it computes
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors(inputs))
    with torch.set_grad_enabled(grad):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def never_reentrant() -> Iterator[None]:
    """Make all checkpoints within the block non-reentrant."""
    CheckpointFunction.apply = not_reentrant  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply
