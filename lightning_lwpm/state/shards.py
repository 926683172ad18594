"""Sharded checkpoints: a folder in which every rank writes its own share, by ``torch.distributed.checkpoint``.

    last.ckpt/index.json         names the folder of the data, and size and CRC-32 of each file in it; written last
             /data-1f0c.../      large tensors, as torch.distributed.checkpoint writes them, and
                          rest.pt     the checkpoint with meta tensors in their places

Agreement goes over the library's own connections, so no rank waits for one that has failed. What a save of the same
name has written before stays until the new index is there.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.state.merge import agree, place_of, unite
from lightning_lwpm.state.tree import Path as TreePath
from lightning_lwpm.state.tree import replaced, tell, walk
from lightning_lwpm.state.whole import give_name, partial_folder, sync_folder, whole_file

__all__ = ["INDEX", "REST", "ShardedSave", "crc"]

INDEX, REST = "index.json", "rest.pt"
_FEW = 16  # elements of tensors that are not worth an entry of their own


class ShardedSave:
    """The writing of one sharded checkpoint; all ranks make one at the same time, and then :meth:`start` it.

    Args:
        mailbox: The control connections.
        key: Names this exchange; the same on all ranks.
        checkpoint: This rank's checkpoint.
        path: The folder to write.
        copy: Whether tensors are copied to the host first, so that training can go on while they are written.

    Raises:
        PipelineError: if a tensor is held by no rank.
    """

    def __init__(self, mailbox: Mailbox, key: Any, checkpoint: dict[str, Any], path: Path, copy: bool) -> None:
        self.mailbox, self.key, self.path = mailbox, key, path
        self._error: str | None = None
        self._thread: threading.Thread | None = None
        self._own, self._rest = _split(mailbox, key, checkpoint)
        if copy:
            self._own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._own.items()}
            self._rest = replaced(self._rest, lambda _, tensor: tensor.clone())
        self._stack = ExitStack()
        try:
            folder = self._stack.enter_context(partial_folder(path.parent)) if mailbox.rank == 0 else None
            self._folder = Path(mailbox.broadcast(("partial", key), folder, what="the folder of a checkpoint"))
            self._data = self._folder / f"data-{self._folder.name.rpartition('-')[2]}"
            self._writer, self._planner = FileSystemWriter(self._data), DefaultSavePlanner(flatten_state_dict=False)
            self._planner.set_up_planner(self._own, None, mailbox.rank == 0)
            self._writer.set_up_storage_writer(mailbox.rank == 0)
            plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
            plans = mailbox.gather(("plans", key), plan, "what all ranks have to save")
            plans, self._metadata = self._planner.create_global_plan(plans)
            self._plan = self._planner.finish_plan(self._writer.prepare_global_plan(plans)[mailbox.rank])
        except BaseException:
            self._stack.close()
            raise

    def start(self, later: bool) -> None:
        """Write; with ``later`` on a thread of its own."""
        if later:
            self._thread = threading.Thread(target=self._run, name="lwpm-checkpoint")
            self._thread.start()
        else:
            self._run()

    def wait(self) -> None:
        """Wait for the end of all ranks.

        Raises:
            PipelineError: on all ranks alike, if any could not write.
        """
        if self._thread is not None:
            self.mailbox.wait(self._ended, f"the checkpoint '{self.path}' to be written")
        errors = self.mailbox.gather(("saved", self.key), self._error, "all ranks to have saved")
        error = next((error for error in errors if error), None)
        if error:
            raise PipelineError(
                f"the checkpoint '{self.path}' could not be written: {error}. A checkpoint that was there before is as "
                "it was."
            )

    def _ended(self, seconds: float) -> bool:
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Write this rank's share; rank 0 then waits for the others', and gives the whole its name."""
        mailbox = self.mailbox
        with self._stack:
            try:
                written = self._write()
                if mailbox.rank:
                    mailbox.post(0, "share", (self.key, mailbox.rank), (written, None))
                    return
                parts = [written]
                for rank in range(1, mailbox.world):
                    what = f"{mailbox.names[rank]} to write its share of '{self.path}'"
                    part, error = mailbox.take("share", (self.key, rank), what, rank)
                    if error:
                        raise PipelineError(error)
                    parts.append(part)
                self._finish(parts)
            except Exception as error:
                self._error = f"{mailbox.label}: {_reason(error)}"
                if mailbox.rank and mailbox.failure is None:
                    mailbox.post(0, "share", (self.key, mailbox.rank), (None, self._error))

    def _write(self) -> tuple[Any, dict[str, tuple[int, int]]]:
        results = self._writer.write_data(self._plan, self._planner).wait()
        files = {result.storage_data.relative_path for result in results}
        return results, {file: crc(self._data / file) for file in sorted(files)}

    def _finish(self, parts: list[Any]) -> None:
        self._writer.finish(self._metadata, [results for results, _ in parts])
        with whole_file(self._data / REST) as stream:
            torch.save(self._rest, stream)
        files = {name: check for _, checks in parts for name, check in checks.items()}
        files |= {name: crc(self._data / name) for name in (REST, ".metadata")}
        index = {"format": "lightning_lwpm sharded checkpoint 1", "data": self._data.name, "files": files}
        sync_folder(self._data)
        if not self.path.is_dir():
            _write_index(self._folder, index)
            give_name(self._folder, self.path)
        else:
            os.rename(self._data, self.path / self._data.name)
            _write_index(self.path, index)
            for old in self.path.glob("data-*"):
                if old.name != self._data.name:
                    shutil.rmtree(old, ignore_errors=True)
        sync_folder(self.path.parent)


def _reason(error: BaseException) -> BaseException:
    """What the system had said, such as that the disk is full, before ``torch.save`` told of a position only."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    return inner or error


def crc(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            size, value = size + len(chunk), zlib.crc32(chunk, value)
    return size, value


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    with whole_file(folder / INDEX) as stream:
        stream.write(json.dumps(index, indent=1).encode())


def _split(mailbox: Mailbox, key: Any, checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The large tensors that this rank is to write, by path, and on rank 0 the rest of the whole checkpoint.

    A tensor that lies at several paths (tied weights) is written once; in the rest one meta tensor lies at all of them.
    """
    shares = agree(mailbox, key, checkpoint)
    rank, own = mailbox.rank, {}
    places: dict[Any, str] = {}
    firsts: dict[str, str] = {}  # by path, where the same tensor is written
    gives: list[tuple[TreePath, Any]] = [((), checkpoint)] if rank == 0 else list(shares.given(rank, checkpoint))
    for start, value in gives:
        for path, tensor in walk(value, start):
            if is_placeholder(tensor):
                continue
            if _large(tensor):
                firsts[tell(path)] = places.setdefault(place_of(tensor), tell(path))
            if firsts.get(tell(path)) == tell(path) or (path in shares.owners and not _large(tensor)):
                own[tell(path)] = tensor.detach()

    def light(_: Any, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta") if _large(tensor) else tensor

    entries = {
        (number, index): replaced(checkpoint["optimizer_states"][number]["state"][index], light)
        for (number, index), owner in shares.entries.items()
        if owner == rank and rank
    }
    everyone = mailbox.gather(("entries", key), (entries, firsts), "all ranks' optimizer states")
    if rank:
        return own, {}
    firsts = {path: first for _, part in everyone for path, first in part.items()}
    shells: dict[str, Tensor] = {}

    def shell(path: TreePath, tensor: Tensor) -> Tensor:
        if not is_placeholder(tensor) and not tensor.is_meta and not _large(tensor):
            return tensor
        like = tensor.shell if is_placeholder(tensor) else tensor  # type: ignore[attr-defined]
        return shells.setdefault(firsts.get(tell(path), tell(path)), torch.empty_like(like, device="meta"))

    found = {
        (number, index): replaced(state, shell, ("optimizer_states", number, "state", index))
        for part, _ in everyone
        for (number, index), state in part.items()
    }
    return own, unite(replaced(checkpoint, shell), found)


def _large(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one that is worth an entry of its own."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > _FEW
