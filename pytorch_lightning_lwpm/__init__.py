"""`lightning_lwpm` for projects that import `pytorch_lightning` in the place of `lightning`.

Lightning comes as two packages with the same source, of which one is made of the other by replacing names; neither
knows the classes of the other. This package is made of `lightning_lwpm` in the same way, while it is imported.
"""

import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

_NAMES = {
    rb"\blightning_lwpm\b": __name__.encode(),
    rb"\bimport lightning as\b": b"import pytorch_lightning as",
    rb"\blightning\.pytorch\b": b"pytorch_lightning",
    rb"\blightning\.fabric\b": b"lightning_fabric",
}


class _Loader(SourceFileLoader):
    """Replaces names; keeps no bytecode, because that beside the file belongs to the original."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        for name, other in _NAMES.items():
            source = re.sub(name, other, source)
        return self.source_to_code(source, self.path)


class _Finder:
    """Finds the modules of this package among those of the original."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith(f"{__name__}.") else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


_original: Any = find_spec("lightning_lwpm")
__path__ = list(_original.submodule_search_locations)
sys.meta_path.insert(0, _Finder)
_Loader(__name__, _original.origin).exec_module(sys.modules[__name__])
