"""Tells whether an optimizer's step of one parameter depends on others: then stages cannot step each on its own."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["is_separable"]

_STEPS = 3
"""What is learned of all gradients in one step may first be used in the next."""


def is_separable(optimizer: Optimizer) -> bool | None:
    """Whether each parameter is stepped by its own gradient alone, tried on a copy of the optimizer with tiny tensors.

    Args:
        optimizer: An optimizer before its first step.

    Returns:
        ``None`` if the copy does not run, so that nothing is known.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if type(optimizer).__module__.startswith("torch.optim.") or len(parameters) < 2:
        return True  # LBFGS, which is not, is refused by name
    if optimizer.state:
        return None  # made for the true shapes
    try:
        return torch.equal(_first_stepped(optimizer, parameters, False), _first_stepped(optimizer, parameters, True))
    except Exception:
        return None


def _first_stepped(optimizer: Optimizer, parameters: list[Tensor], together: bool) -> Tensor:
    """The first parameter after some steps, in which the others have gradients or have none."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.full((2,) * p.dim(), 0.5, device="cpu")) for p in parameters}
    tried = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():  # a copy has only what `Optimizer` itself knows of
        if name not in vars(tried) and isinstance(value, int | float | str | tuple | None):
            setattr(tried, name, value)
    tiny = [memo[id(parameter)] for parameter in parameters]
    for _ in range(_STEPS):
        for i, parameter in enumerate(tiny):
            parameter.grad = torch.full_like(parameter, 0.25) if together or i == 0 else None
        type(tried).step(tried)  # on the copy, a scheduler's `step` would be that of the optimizer
    return tiny[0].detach()
