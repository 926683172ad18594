"""Puts a model back as it was before a trial run of its step."""

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.staging.contents import containers, content_of, fill
from lightning_lwpm.staging.tree import tensors

__all__ = ["generators_kept", "undone"]

_LARGE = 256 << 20
"""A tensor of more bytes in a list or an object, such as a whole dataset, is not copied and not put back."""


@contextmanager
def generators_kept(device: torch.device | None = None) -> Iterator[None]:
    """Leave the random generators of the host and of a device as they were."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    accelerator = device.type if device is not None and device.type != "cpu" else ""
    try:
        with torch.random.fork_rng([device] if accelerator else [], device_type=accelerator or "cuda"):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def undone(root: nn.Module, outside: Sequence[nn.Module] = ()) -> Any:
    """Put back what the block changes: random states, buffers, modules in modules, Python attributes and lists in them.

    Gives a function that tells, at the end of the block, where it has put tensors into attributes of modules:
    pairs of module name and attribute name.

    Args:
        root: The model.
        outside: Modules that are not among the model's own, such as metrics in a list.
    """
    modules = list(dict.fromkeys(module for top in (root, *outside) for module in top.modules()))
    buffers = {name: buffer.detach().clone() for name, buffer in root.named_buffers()}
    attributes = [(module, {k: (v, _saved(v)) for k, v in _plain(module).items()}) for module in modules]
    inside = [(c, content_of(c)) for c in containers(v for _, plain in attributes for v, _ in plain.values()).values()]
    small = {id(t): t for _, values in inside for t in tensors(values) if type(t) is Tensor and t.nbytes <= _LARGE}
    contained = [(tensor, tensor.detach().clone()) for tensor in small.values()]
    children = [(module, dict(module._modules)) for module in modules]
    gradients = [(p, p.grad, p.requires_grad) for p in root.parameters()]

    def stored() -> list[tuple[str, str]]:
        names = {module: name for name, module in root.named_modules()}
        return [
            (names[module], key)
            for module, plain in attributes
            if module in names
            for key, value in _plain(module).items()
            if tensors(value) and not (key in plain and _same(value, *plain[key]))
        ]

    try:
        with generators_kept():
            yield stored
    finally:
        for module, inner in children:
            module._modules.clear()
            module._modules.update(inner)
        for module, plain in attributes:
            for key in set(_plain(module)) - set(plain):
                del module.__dict__[key]
            module.__dict__.update((key, value) for key, (value, _) in plain.items())
        for container, content in inside:
            fill(container, content)
        with torch.no_grad():
            stored_here = [(v, saved) for _, plain in attributes for v, saved in plain.values() if type(v) is Tensor]
            for tensor, saved in stored_here + contained:
                if tensor.shape == saved.shape and not _expanded(tensor):
                    tensor.copy_(saved)
            for name, buffer in root.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape and not _expanded(buffer):
                    buffer.copy_(buffers[name])
        for parameter, grad, requires in gradients:
            parameter.grad = grad
            if parameter.requires_grad != requires:
                parameter.requires_grad_(requires)


def _expanded(tensor: Tensor) -> bool:
    """Whether elements share a place: nothing can have changed it in place."""
    return tensor.layout is torch.strided and any(
        n > 1 and not s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}


def _saved(value: Any) -> Any:
    """What is needed to notice and undo changes inside ``value``."""
    if type(value) in (list, dict):
        return value.copy()
    return value.detach().clone() if type(value) is Tensor else None


def _same(value: Any, before: Any, saved: Any) -> bool:
    """Whether ``value`` is what it was, inside too."""
    if value is not before:
        return False
    if type(value) in (list, dict):
        return len(value) == len(saved) and all(a is b for a, b in zip(tensors(value), tensors(saved), strict=False))
    return True
