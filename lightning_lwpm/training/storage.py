"""Reads and writes merged checkpoints: Lightning's ``CheckpointIO``, but whole or not at all, and memory-mapped."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lightning_lwpm.state.whole import found, remove, whole_file

__all__ = ["WholeCheckpointIO", "local_path"]


def local_path(path: Any) -> Path | None:
    """A path of this machine's file system; ``None`` for one elsewhere (``s3://...``)."""
    text = str(path)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's own way, for files of this machine straight to disk: no copy in memory, no half of a file.

    Paths elsewhere are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        local = local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        with whole_file(local) as stream:
            torch.save(checkpoint, stream)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        local = local_path(path)
        if local is None or not zipfile.is_zipfile(found(local)):
            return super().load_checkpoint(path, map_location, weights_only)
        return torch.load(found(local), map_location="cpu", weights_only=weights_only, mmap=True)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        local = local_path(path)
        if local is not None:
            remove(local)
            remove(found(local))  # what it was to replace, if a process was killed just then
        else:
            super().remove_checkpoint(path)
