"""Finds the forward hooks that do something: a module with one must be called as such on every later stage.

A layer of another stage is not run, and neither are the hooks on modules inside it. Where a hook keeps what it is
given, computes from it or changes it, the module that it sits on is therefore never hidden inside a larger unit.
Idle hooks (`transformers` puts one on every layer) do not matter.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lwpm.staging.tree import tensors

__all__ = ["watching_hooks"]


class _Watched:
    """A hook, and whether it has done anything."""

    def __init__(self, hook: Callable[..., Any], found: set[nn.Module], functions: Callable[[], int]) -> None:
        self.hook, self.found, self.functions = hook, found, functions

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen = [*args, *tensors(args)]
        count, owners = self.functions(), [sys.getrefcount(value) for value in seen]
        result = self.hook(module, *args, **kwargs)
        kept = owners != [sys.getrefcount(value) for value in seen]
        if result is not None or kept or count != self.functions():
            self.found.add(module)
        return result


@contextmanager
def watching_hooks(
    root: nn.Module, functions: Callable[[], int], own: Collection[Callable[..., Any]] = ()
) -> Iterator[set[nn.Module]]:
    """Watch forward hooks and pre-hooks, also those registered meanwhile; gives the modules with one that acts.

    Args:
        root: The model.
        functions: Counts the torch functions called so far.
        own: Hooks that are not watched.
    """
    found: set[nn.Module] = set()
    originals = {name: getattr(nn.Module, name) for name in ("register_forward_hook", "register_forward_pre_hook")}

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def register(module: nn.Module, hook: Callable[..., Any], **kwargs: Any) -> Any:
            return original(module, hook if hook in own else _Watched(hook, found, functions), **kwargs)

        return register

    for hooks in _hooks(root):
        for key, hook in hooks.items():
            hooks[key] = _Watched(hook, found, functions)
    for name, original in originals.items():
        setattr(nn.Module, name, watched(original))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(nn.Module, name, original)
        for hooks in _hooks(root):
            for key, hook in hooks.items():
                hooks[key] = hook.hook if isinstance(hook, _Watched) else hook


def _hooks(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        yield from (module._forward_hooks, module._forward_pre_hooks)
