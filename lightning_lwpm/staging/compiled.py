"""Compiled code in a step that is cut into stages: layers run compiled, the code between them as it is written.

::

    torch.compile(net)    [ embedding  h.0  h.1  h.2  h.3  head ]           one graph, which would cross the boundary
    in two stages         [embedding] [h.0] [h.1]  |  [h.2] [h.3] [head]    a graph for each unit, of the same compiler

A compiler that looked into the code between layers would find remote tensors, and layers that are not run. So there
``torch.compile`` does nothing: whatever has been compiled runs as it is written, and calls the units. These are
compiled by themselves, as the user has compiled them or a module around them. What lies within a unit (compiled
modules, compiled functions that it calls) is as always.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_lwpm.staging.forwards import replaced

__all__ = ["AsWritten", "CompiledUnits"]

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a function to its compiled version."""


class AsWritten:
    """Within it, what the user has compiled runs as it is written."""

    def __init__(self) -> None:
        self._stance: Any = None

    def __enter__(self) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to load the compiler takes seconds
            self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stance is not None:
            self._stance.__exit__(kind, error, traceback)
            self._stance = None

    @contextmanager
    def left(self) -> Iterator[None]:
        """The time of a layer: what is compiled runs compiled, unless the user has said otherwise."""
        stance = self._stance
        if stance is None:
            yield
            return
        stance.__exit__(None, None, None)
        try:
            yield
        finally:
            stance.__enter__()


class CompiledUnits:
    """The units that the user has compiled, alone or within a larger module.

    Args:
        root: The model.
        modules: The modules of the units.

    Attributes:
        forwards: By module, its compiled ``forward``; units are left out where it is compiled already.
    """

    def __init__(self, root: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.forwards: dict[nn.Module, Callable[..., Any]] = {}
        self._find(root, None, set(modules), set())

    def _find(self, module: nn.Module, compiler: Compiler | None, units: set[nn.Module], seen: set[nn.Module]) -> None:
        if module in seen:
            return
        seen.add(module)
        disabled = getattr(module.forward, "_torchdynamo_disable", False)
        compiler = None if disabled else _compiler_of(module) or compiler
        if module not in units:
            for child in module.children():
                self._find(child, compiler, units, seen)
        elif compiler is not None and hasattr(module.forward, "__code__") and not _is_compiled(module.forward):
            self.forwards[module] = compiler(module.forward)

    def batch(self) -> AbstractContextManager[None]:
        """The time of a batch, in which these units run compiled: in steps, and where they are computed again."""
        return replaced(self.forwards)


def _compiler_of(module: nn.Module) -> Compiler | None:
    """What has compiled a module, if the user has: as a whole, in place, or its ``forward``."""
    wrapper: Compiler | None = vars(module).get("dynamo_ctx")
    if wrapper is not None:
        return wrapper
    for function in (module._compiled_call_impl, module.forward):
        if _is_compiled(function):
            plain: Any = getattr(function, "__func__", function)
            cells = dict(zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True))
            return cells["self"].cell_contents if "self" in cells else None  # the compiler's own variable
    return None


def _is_compiled(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")
