"""Puts a rank's share of the weights on its device, and placeholders in the place of the rest."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.lazy import is_lazy, realised
from lightning_lwpm.staging.placeholder import is_placeholder, placeholder_like

__all__ = ["held", "named_tensors", "place", "share_table", "swap"]


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name, each once."""
    yield from root.named_parameters()
    yield from root.named_buffers()


def held(stages: tuple[int, ...] | None, own: Collection[int]) -> bool:
    """Whether a tensor used by ``stages`` lives on a rank whose stages are ``own``; ``None``: it lives everywhere."""
    return stages is None or not set(stages).isdisjoint(own)


def swap(root: nn.Module, change: Callable[[str, Tensor], Tensor]) -> dict[int, Tensor]:
    """Replace parameters and buffers in every module that has them, so that ties stay ties.

    Args:
        root: The model.
        change: From name and tensor to the tensor to put in its place.

    Returns:
        By the ``id`` of each tensor that was there, the one that is in its place now.
    """
    memo: dict[int, Tensor] = {}
    for name, tensor in named_tensors(root):
        memo[id(tensor)] = change(name, tensor)
    for module in root.modules():
        stores: list[dict[str, Any]] = [module._parameters, module._buffers]  # type: ignore[list-item]
        for store in stores:
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = memo[id(tensor)]
    return memo


def place(
    root: nn.Module,
    stages: Callable[[str], tuple[int, ...] | None],
    own: int | Collection[int] | None,
    fetch: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[int, Tensor]:
    """Keep what the stages of a rank use and let go of the rest.

    Args:
        root: The model, whole or placed before.
        stages: The stages that use a parameter or buffer; ``None`` for one that every rank keeps.
        own: This rank's stage or stages; ``None`` for a rank that has none.
        fetch: Gives the values of a tensor that this rank is to hold; by default they are the ones it has.

    Returns:
        By the ``id`` of each tensor that was there, the one that is in its place now.
    """

    here = (own,) if isinstance(own, int) else own or ()

    def change(name: str, tensor: Tensor) -> Tensor:
        if not held(stages(name), here):
            return tensor if is_placeholder(tensor) else placeholder_like(tensor)
        values = fetch(name, tensor) if fetch is not None else tensor
        if values is tensor:
            return realised(tensor)
        if not is_placeholder(tensor) and not is_lazy(tensor):
            with torch.no_grad():
                tensor.copy_(values)
            return tensor
        values = realised(values).to(tensor.device, tensor.dtype)
        return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values

    return swap(root, change)


def share_table(root: nn.Module) -> tuple[int, int]:
    """Parameters held here, and their bytes."""
    real = [p for p in root.parameters() if not is_placeholder(p)]
    return sum(p.numel() for p in real), sum(p.numel() * p.element_size() for p in real)
