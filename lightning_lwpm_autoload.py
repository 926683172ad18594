"""Makes `Trainer(strategy="lwpm")` work without an import of this library, wherever it is installed.

Lightning has no entry points for strategies, but torch has one for whatever is to be loaded with it. It calls
:func:`autoload`, which must cost nothing and must never fail: it imports neither torch nor Lightning, and waits until
somebody imports Lightning's strategies. ``LIGHTNING_LWPM_AUTOLOAD=0`` switches it off.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["STRATEGIES", "autoload"]

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lwpm": ("Layer-wise model parallelism", {}),
    "lwpm_spawn": ("The same with processes started by 'spawn'", {"start_method": "spawn"}),
    "lwpm_fork": ("The same with processes started by 'fork'", {"start_method": "fork"}),
    "lwpm_notebook": ("The same in a notebook", {"start_method": "fork"}),
    "lwpm_async": ("The same, and no stage waits for the others at optimizer steps", {"schedule": "async"}),
}
"""The registered names, with descriptions and options."""

_PACKAGES = {
    "lightning.pytorch.strategies": "lightning_lwpm",
    "pytorch_lightning.strategies": "pytorch_lightning_lwpm",
}


class _Finder:
    """Adds the names to Lightning's registry as soon as that is there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _PACKAGES:
            return None
        finders: Any = (finder for finder in sys.meta_path if finder is not _Finder)
        spec: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        with suppress(Exception):
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                with suppress(Exception):
                    for strategy, (about, options) in STRATEGIES.items():
                        module.StrategyRegistry.register(strategy, _maker(_PACKAGES[name]), about, **options)

            spec.loader.exec_module = exec_module
        return spec


def _maker(package: str) -> Callable[..., Any]:
    return lambda **options: importlib.import_module(package).LWPMStrategy(**options)


def autoload() -> None:
    """Wait for Lightning; called at the end of ``import torch``."""
    if os.environ.get("LIGHTNING_LWPM_AUTOLOAD", "1") != "0" and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
