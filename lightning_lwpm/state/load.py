"""Reads checkpoints, merged and sharded, of any number of stages; looks at them before anything is taken over."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.state.shards import INDEX, REST, crc
from lightning_lwpm.state.tree import Path as TreePath
from lightning_lwpm.state.tree import replaced, tell, walk

__all__ = ["UNREADABLE", "check_file", "fill", "is_sharded", "read_rest", "why_unreadable"]

UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
)
"""What is raised where something is read that is no checkpoint."""

_PART = 1 << 20


def is_sharded(path: Path) -> bool:
    """Whether a path is that of a sharded checkpoint."""
    return (path / INDEX).is_file()


def check_file(path: Path, rank: int = 0, world: int = 1) -> None:
    """Read a checkpoint once, and compare it with the sums that it carries; ranks share the work.

    Raises:
        ConfigurationError: if it is truncated, damaged, or no checkpoint.
    """
    if path.is_dir():
        data, files = _index(path)
        for name, (size, value) in sorted(files.items())[rank::world]:
            found = crc(data / name) if (data / name).is_file() else None
            if found != (size, value):
                raise _damaged(path, f"'{data.name}/{name}' is {'damaged' if found else 'missing'}")
    elif rank == 0 and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            bad = [name for name in names if not _intact(archive, name)]
            # all of them: written without sums (`torch.serialization.set_crc32_options`)
            if bad and len(bad) < len(names):
                raise _damaged(path, f"its part '{bad[0]}' is damaged")


def why_unreadable(path: Path | str | None) -> str:
    """What to add to the words of an error of :data:`UNREADABLE`; empty where there is nothing to say.

    Args:
        path: The file that was read; ``None`` for one that is not of this machine.
    """
    if path is None or not Path(path).is_file() or zipfile.is_zipfile(path):
        return ""
    return " (it lacks the end that `torch.save` writes: it is truncated, or no file of `torch.save`)"


def read_rest(path: Path, weights_only: bool | None = None) -> tuple[dict[str, Any], Path]:
    """A sharded checkpoint with meta tensors in the places of large ones, and the folder that has them: for `fill`.

    Args:
        path: The folder.
        weights_only: As of ``torch.load``.

    Raises:
        ConfigurationError: if it is no such checkpoint.
    """
    data, _ = _index(path)
    return torch.load(data / REST, map_location="cpu", weights_only=weights_only), data


def fill(value: Any, data: Path, wanted: Callable[[TreePath], bool] = lambda _: True, at: TreePath = ()) -> Any:
    """A copy with the tensors of a sharded checkpoint in their places; nothing else is read.

    Args:
        value: The checkpoint from :func:`read_rest`, or a part of it.
        data: The folder that it gave.
        wanted: By path, which tensors to read.
        at: Where the part lies in the checkpoint.
    """
    reader = _Reader(data)
    known = reader.read_metadata().state_dict_metadata
    found = [(path, tensor) for path, tensor in walk(value, at) if tensor.is_meta]
    names: dict[int, str] = {}  # one meta tensor at several paths: tied weights, written under the name of one of them
    for path, tensor in found:
        if tell(path) in known:
            names.setdefault(id(tensor), tell(path))
    read = {
        names[id(tensor)]: torch.empty_like(tensor, device="cpu")
        for path, tensor in found
        if id(tensor) in names and wanted(path)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no news with one process
        dcp.load(read, storage_reader=reader, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    return replaced(value, lambda _, tensor: read.get(names.get(id(tensor), ""), tensor), at)


class _Reader(dcp.FileSystemReader):
    """Unpickles nothing of a checkpoint's metadata but what describes tensors."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            return _Unpickler(stream).load()


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        own = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        found = super().find_class(module, name) if own or (module, name) in _PLAIN or module == "torch" else None
        plain = isinstance(found, type) and (own or issubclass(found, (tuple, torch.dtype)))
        if plain or isinstance(found, torch.dtype) or (module, name) in _PLAIN:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _member(kind: Any, name: Any) -> Any:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as a call of ``getattr``."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"getattr({kind}, {name!r}) has no place in a checkpoint's metadata")


_PLAIN = {
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def _index(path: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
    try:
        index = json.loads((path / INDEX).read_text())
        data, files = index["data"], {name: (size, value) for name, (size, value) in index["files"].items()}
    except FileNotFoundError:
        raise _damaged(path, f"it is a folder without '{INDEX}'") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its '{INDEX}' cannot be read ({error})") from error
    if any(Path(name).name != name for name in (data, *files)):
        raise _damaged(path, f"its '{INDEX}' names files elsewhere")
    return path / data, files


def _intact(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as part:
            while part.read(_PART):
                pass
    except (zipfile.BadZipFile, OSError):
        return False
    return True


def _damaged(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(f"the checkpoint '{path}' cannot be used: {why}. Take another one; nothing was loaded.")
