"""Files and folders that are there whole or not at all, whatever ends the process that writes them.

They are written under a name that is no checkpoint's, beside the one that they are to have, and renamed once they lie
on disk. What a killed process has left behind is taken away by the next one that writes in the same folder: who writes
holds a lock, and a lock ends with its process.

No file system replaces a file by a folder in one step, or a folder by a file: the one that was there then waits as
`last.lwpm-previous.ckpt` until the new one has its name, and who reads `last.ckpt` finds it there.
"""

import fcntl
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

__all__ = ["PREFIX", "found", "give_name", "partial_folder", "remove", "sync_folder", "whole_file"]

PREFIX = ".lwpm-partial-"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which has its name from the end of the block on; after an exception it has never been there.

    Args:
        path: Its name; what has had it is replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    partial, file = _locked(path.parent, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    raw = _File(file, "wb")
    try:
        with io.BufferedWriter(raw) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            give_name(partial, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            partial.unlink()
        if raw.error is not None and isinstance(error, Exception):  # `torch.save` tells of a position only
            raise OSError(raw.error.errno, raw.error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


class _File(io.FileIO):
    """A file that remembers why it could not be written to."""

    error: OSError | None = None

    @override
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A folder to write in, which is to be renamed in the block; else it is gone at its end."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    partial, file = _locked(parent, os.O_RDONLY)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(file)


def give_name(partial: Path, path: Path) -> None:
    """Rename what lies on disk; what has had the name is there until then, under it or where :func:`found` looks."""
    before = _previous(path)
    if os.path.lexists(path) and _is_folder(path) != _is_folder(partial):
        remove(before)
        os.rename(path, before)
    os.replace(partial, path)
    remove(before)


def found(path: Path) -> Path:
    """The path, or where its former content is if a process was killed while it gave the name to another."""
    before = _previous(path)
    return before if before.exists() and not path.exists() else path


def remove(path: Path) -> None:
    """Remove a file, or a folder so that no half of it can be taken for a checkpoint, if it is there."""
    if _is_folder(path):
        away = path.with_name(f"{PREFIX}{secrets.token_hex(8)}")
        os.rename(path, away)
        shutil.rmtree(away, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.lwpm-previous{path.suffix}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sweep(parent: Path) -> None:
    """Remove what processes that were killed have left behind."""
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            file = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()
            finally:
                os.close(file)


def _locked(parent: Path, flags: int) -> tuple[Path, int]:
    """A new file, or with ``O_RDONLY`` a new folder, that is locked."""
    while True:
        partial = parent / f"{PREFIX}{secrets.token_hex(8)}"
        if flags == os.O_RDONLY:
            partial.mkdir()
        file = os.open(partial, flags, 0o666)
        with suppress(OSError):  # a file system without locks: then nobody sweeps either
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return partial, file
        os.close(file)  # swept in the moment before it was locked
