"""How much an optimizer keeps for each byte of weights: seen in one step of its like on a small parameter."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lwpm.staging.tree import tensors

__all__ = ["state_factor"]

_UNKNOWN = 2.0  # of an optimizer that cannot be made anew: as Adam, which keeps two tensors like the weight


def state_factor(optimizers: Iterable[Optimizer]) -> float:
    """Bytes of optimizer state for each byte of trained weights; the largest of the optimizers, 0 without any."""
    return max((_factor(optimizer) for optimizer in optimizers if optimizer.param_groups), default=0.0)


def _factor(optimizer: Optimizer) -> float:
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    taken = inspect.signature(type(optimizer)).parameters  # defaults hold more: AdamW sets some that it does not take
    options = {key: value for key, value in optimizer.param_groups[0].items() if key in taken and key != "params"}
    try:
        like = type(optimizer)([weight], **options)
        like.step()
        kept = sum(t.numel() * t.element_size() for t in tensors(like.state[weight]))
    except Exception:
        return _UNKNOWN
    return kept / (weight.numel() * weight.element_size())
