"""Puts a model back as it was before a trial run of its step."""

import random
import sys
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.tree import tensors

__all__ = ["undone"]


@contextmanager
def undone(root: nn.Module) -> Any:
    """Put back what the block changes: random states, buffers, Python attributes of modules and lists in them.

    Gives a function that tells, at the end of the block, where it has put tensors into attributes of modules:
    pairs of module name and attribute name.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None, torch.random.get_rng_state()
    buffers = {name: buffer.detach().clone() for name, buffer in root.named_buffers()}
    attributes = [(module, {k: (v, _saved(v)) for k, v in _plain(module).items()}) for module in root.modules()]
    gradients = [(p, p.grad, p.requires_grad) for p in root.parameters()]

    def stored() -> list[tuple[str, str]]:
        names = {module: name for name, module in root.named_modules()}
        return [
            (names[module], key)
            for module, plain in attributes
            for key, value in _plain(module).items()
            if tensors(value) and not (key in plain and _same(value, *plain[key]))
        ]

    try:
        yield stored
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        for module, plain in attributes:
            for key in set(_plain(module)) - set(plain):
                del module.__dict__[key]
            for key, (value, saved) in plain.items():
                module.__dict__[key] = _put_back(value, saved)
        with torch.no_grad():
            for name, buffer in root.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])
        for parameter, grad, requires in gradients:
            parameter.grad = grad
            if parameter.requires_grad != requires:
                parameter.requires_grad_(requires)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}


def _saved(value: Any) -> Any:
    """What is needed to undo changes inside ``value``."""
    if type(value) in (list, dict, set, OrderedDict):  # hooks are kept in ordered dictionaries
        return value.copy()
    return value.detach().clone() if type(value) is Tensor else None


def _same(value: Any, before: Any, saved: Any) -> bool:
    """Whether ``value`` is what it was, inside too."""
    if value is not before:
        return False
    if type(value) in (list, dict):
        return len(value) == len(saved) and all(a is b for a, b in zip(tensors(value), tensors(saved), strict=False))
    return True


def _put_back(value: Any, saved: Any) -> Any:
    """Undo changes inside ``value``, which stays the same object."""
    if type(value) is list:
        value[:] = saved
    elif type(value) in (dict, set, OrderedDict):
        value.clear()
        value.update(saved)
    elif type(value) is Tensor and value.shape == saved.shape:
        with torch.no_grad():
            value.copy_(saved)
    return value
