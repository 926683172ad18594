"""Compares a checkpoint's states of optimizers with the run's optimizers, before they are loaded.

What an optimizer keeps is seen in a step of its like on the meta device, with the true shapes and the options of the
checkpoint: states of another kind of optimizer lack options or names, those of other parameters have other shapes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lwpm.state.names import by_place

__all__ = ["misfits"]

_ON_DEVICES = ("fused", "foreach", "capturable")
"""Options of torch's optimizers for which the meta device is none."""


def misfits(
    optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]], place: Callable[[Tensor], tuple[str, str]]
) -> str:
    """What to say of states that do not fit; nothing is changed.

    Args:
        optimizers: Those of the run, with the parameters of all ranks.
        saved: Their states in the checkpoint.
        place: From a parameter to its name, and to where it is, in words.

    Returns:
        Every mismatch; empty if there is none.
    """
    if not saved:  # as for no optimizer: there is nothing to load
        return ""
    whole = isinstance(saved, list | tuple) and all(isinstance(state, Mapping) for state in saved)
    if not whole or any({"state", "param_groups"} - state.keys() for state in saved):
        return "what the checkpoint has as 'optimizer_states' are none: it is damaged, or not of Lightning"
    told = ""
    for number, (optimizer, state) in enumerate(zip(optimizers, saved, strict=False)):
        if not _adapts(optimizer):
            told += "".join(_told(optimizer, f"{type(optimizer).__name__} (optimizer {number})", state, place))
    return told and (
        f"the checkpoint's states of optimizers do not fit, and training did not go on from it:{told}\n"
        "Let `configure_optimizers` make the same optimizers and groups, or go on from the weights alone: "
        "`model.load_state_dict(torch.load(path)['state_dict'])`, and `fit` without `ckpt_path`."
    )


def _told(
    optimizer: Optimizer, kind: str, state: Mapping[str, Any], place: Callable[[Tensor], tuple[str, str]]
) -> list[str]:
    groups, saved = optimizer.param_groups, state["param_groups"]
    if _sizes(groups) != _sizes(saved):
        return [f"\n  {kind} has {_sizes(groups)}, in the checkpoint {_sizes(saved)}"]
    try:
        _stepped(optimizer, groups)
    except Exception:  # its like does not run: nothing can be said
        return []
    try:
        expected = _stepped(optimizer, saved)
    except KeyError as option:
        return [f"\n  {kind} has an option {option}, which the checkpoint's has not: that is of another optimizer"]
    except Exception:
        return []
    numbers = [number for group in saved for number in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    shapes, where = {}, {}
    for number, parameter, wanted in zip(numbers, parameters, expected, strict=True):
        found = state["state"].get(number) or wanted  # a parameter that was never stepped has none
        if lacking := ", ".join(f"'{key}'" for key in wanted if key not in found):
            return [f"\n  {kind} keeps {lacking}, which the checkpoint has not: it is of another optimizer"]
        for key, tensor in wanted.items():
            if tensor.dim() and isinstance(found[key], Tensor) and found[key].shape != tensor.shape:
                name, where[name] = place(parameter)
                there, here = tuple(found[key].shape), tuple(tensor.shape)
                shapes[name] = f"'{key}' of '{name}' is {there} in the checkpoint, and would be {here} in {kind}"
                break
    return by_place(shapes, where.__getitem__)


def _adapts(optimizer: Optimizer) -> bool:
    """Whether an optimizer has ways of its own to load states."""
    hooks = vars(optimizer).get("_optimizer_load_state_dict_pre_hooks")
    return bool(hooks) or type(optimizer).load_state_dict is not Optimizer.load_state_dict


def _stepped(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """The tensors that an optimizer's like keeps of each parameter after a step on the meta device.

    Args:
        optimizer: The optimizer.
        options: The groups of parameters whose options it takes.
    """
    like = copy.copy(optimizer)  # which leaves out hooks, and a scheduler's `step`
    for name, value in vars(optimizer).items():
        if name not in vars(like) and isinstance(value, int | float | str | tuple | None):
            setattr(like, name, value)
    like.state = type(optimizer.state)(dict)
    groups, shells = [], []
    for group, own in zip(options, optimizer.param_groups, strict=True):
        made = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in own["params"]]
        for shell in made:
            shell.grad = torch.empty_like(shell)
        groups.append({**group, "params": made, **{key: False for key in _ON_DEVICES if key in group}})
        shells += made
    like.param_groups = groups
    like.__setstate__({"param_groups": groups})  # as of states that an earlier version of the optimizer has saved
    type(like).step(like)
    return [{key: value for key, value in like.state[shell].items() if isinstance(value, Tensor)} for shell in shells]


def _sizes(groups: Sequence[Mapping[str, Any]]) -> str:
    sizes = [str(len(group["params"])) for group in groups]
    return f"{len(sizes)} group{'s' * (len(sizes) > 1)} of {' and '.join(sizes)} parameters"
