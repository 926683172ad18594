"""Checkpoints are there whole or not at all: processes are killed while they write, disks are full."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.placeholder import placeholder_like
from lightning_lwpm.state.load import check_file, fill, is_sharded, read_rest
from lightning_lwpm.state.shards import ShardedSave
from lightning_lwpm.state.whole import PREFIX, found
from lightning_lwpm.training.storage import WholeCheckpointIO

ROUNDS = 50


def checkpoint(version: int) -> dict[str, Any]:
    """One of which every part tells the version."""
    weights = {f"layer{i}.weight": torch.full((200, 100), float(version)) for i in range(4)}
    state = {0: {"step": torch.tensor(float(version)), "mean": torch.full((300,), float(version))}}
    return {"epoch": version, "state_dict": weights, "optimizer_states": [{"state": state, "param_groups": []}]}


def save(folder: Path, sharded: bool, version: int) -> None:
    if sharded:
        saving = ShardedSave(Mailbox(0, 1, lambda value: [value]), 0, checkpoint(version), folder / "last.ckpt", False)
        saving.start(later=False)
        saving.wait()
    else:
        WholeCheckpointIO().save_checkpoint(checkpoint(version), folder / "last.ckpt")


def load(folder: Path) -> dict[str, Any]:
    path = found(folder / "last.ckpt")
    check_file(path)
    if is_sharded(path):
        return fill(*read_rest(path, weights_only=True))
    return WholeCheckpointIO().load_checkpoint(path, weights_only=True)


def version_of(found: dict[str, Any]) -> int:
    """The version, the same in every part."""
    values = {float(value) for tensor in found["state_dict"].values() for value in tensor.unique()}
    state = found["optimizer_states"][0]["state"][0]
    values |= {float(state["step"]), *map(float, state["mean"].unique()), float(found["epoch"])}
    assert len(values) == 1, values
    return int(values.pop())


def keep_saving(folder: Path, sharded: bool, version: int, ready: Any) -> None:
    """Save one version after the other until killed, telling before each."""
    torch.set_num_threads(1)
    while True:
        ready.send(version)
        save(folder, sharded, version)
        version += 1


def keep_saving_together(folder: Path, version: int, ready: Any, rank: int, store: Path) -> None:
    """Like :func:`keep_saving`, as one of two ranks, each with its share."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def gather(value: Any) -> list[Any]:
        values = [None, None]
        dist.all_gather_object(values, value)
        return values

    mailbox = Mailbox(rank, 2, gather, patience=5)
    while True:
        ready.send(version)
        share = checkpoint(version)
        for number, (name, tensor) in enumerate(share["state_dict"].items()):
            share["state_dict"][name] = tensor if number % 2 == rank else placeholder_like(tensor)
        if rank:
            share["optimizer_states"][0]["state"] = {}
        saving = ShardedSave(mailbox, version, share, folder / "last.ckpt", False)
        saving.start(later=False)
        saving.wait()
        version += 1


def die_while_renaming(folder: Path, sharded: bool, version: int, calls: int) -> None:
    """Save, but be killed at one of the calls that give a checkpoint, or the one in its place, another name."""
    torch.set_num_threads(1)

    def dying(original: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            nonlocal calls
            if folder / "last.ckpt" in (source, target):
                calls -= 1
                if calls < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)

        return call

    os.rename, os.replace = dying(os.rename), dying(os.replace)
    save(folder, sharded, version)


def save_on_a_full_disk(folder: Path, sharded: bool, ready: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save(folder, sharded, 2)
    except Exception as error:
        ready.send(str(error))
    else:
        ready.send(None)


@pytest.fixture(scope="module")
def forks() -> Any:
    """Starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_lwpm.state.load", "lightning_lwpm.training.storage"])
    return context


@pytest.mark.parametrize("sharded", [False, True], ids=["merged", "sharded"])
def test_killed_at_any_moment(forks: Any, tmp_path: Path, sharded: bool) -> None:
    chance = random.Random(7)
    save(tmp_path, sharded, 0)
    begin, version = time.perf_counter(), 0
    save(tmp_path, sharded, 0)
    lasts = time.perf_counter() - begin
    for _ in range(ROUNDS // 2):
        here, there = forks.Pipe()
        process = forks.Process(target=keep_saving, args=(tmp_path, sharded, version + 1, there))
        process.start()
        saved = chance.randrange(2)
        for _ in range(saved + 1):
            here.recv()
        time.sleep(chance.random() * 2 * lasts)
        process.kill()
        process.join()
        found = version_of(load(tmp_path))
        assert found >= version + saved
        version = found
        assert all(path.name.startswith(PREFIX) for path in tmp_path.iterdir() if path.name != "last.ckpt")
    save(tmp_path, sharded, version + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "what was left behind is swept away"
    assert version > 0, "no save ended before its process was killed"


def test_one_of_two_ranks_killed(forks: Any, tmp_path: Path) -> None:
    """Either one, at any moment of a save; the other one ends too."""
    chance, version, folder = random.Random(8), 0, tmp_path / "kept"
    save(folder, True, 0)
    for turn in range(12):
        pipes = [forks.Pipe() for _ in range(2)]
        together = [
            forks.Process(
                target=keep_saving_together, args=(folder, version + 1, there, rank, tmp_path / f"store-{turn}")
            )
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(together, pipes, strict=True):
            process.start()
            there.close()
        here, saved = pipes[turn % 2][0], chance.randrange(2)
        here.recv()
        for _ in range(saved + 1):
            begin = time.perf_counter()
            here.recv()
            lasts = time.perf_counter() - begin
        time.sleep(chance.random() * lasts)
        together[turn % 2].kill()
        for process in together:
            process.join(30)
        assert together[1 - turn % 2].exitcode == 1, "the other one hears of it"
        found = version_of(load(folder))
        assert found > version + saved
        version = found
    save(folder, True, version + 1)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("sharded", [False, True], ids=["merged", "sharded"])
def test_killed_between_two_renames(forks: Any, tmp_path: Path, sharded: bool) -> None:
    """Of a checkpoint that replaces one of the other kind: no file system does that in one step."""
    path = tmp_path / "last.ckpt"
    for calls in range(2):
        save(tmp_path, not sharded, calls)
        process = forks.Process(target=die_while_renaming, args=(tmp_path, sharded, 9, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert path.exists() == (calls == 0), "killed before the first, or between the two"
        assert version_of(load(tmp_path)) == calls
        callback = ModelCheckpoint(tmp_path, save_last=True)
        assert callback._find_last_checkpoints(Trainer(logger=False, devices=1, accelerator="cpu"))
    save(tmp_path, sharded, 2)
    assert version_of(load(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == [path], "the one that waited is gone"


@pytest.mark.parametrize("sharded", [False, True], ids=["merged", "sharded"])
def test_full_disk(forks: Any, tmp_path: Path, sharded: bool) -> None:
    save(tmp_path, sharded, 1)
    here, there = forks.Pipe()
    process = forks.Process(target=save_on_a_full_disk, args=(tmp_path, sharded, there))
    process.start()
    error = here.recv()
    process.join()
    assert "File too large" in error and "last.ckpt" in error, error  # what this limit is called
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert version_of(load(tmp_path)) == 1


def test_one_kind_in_the_place_of_the_other(tmp_path: Path) -> None:
    for version, sharded in enumerate([False, True, True, False]):
        save(tmp_path, sharded, version)
        assert is_sharded(tmp_path / "last.ckpt") == sharded
        assert version_of(load(tmp_path)) == version
    save(tmp_path, True, 9)
    assert len(list((tmp_path / "last.ckpt").glob("data-*"))) == 1
    shutil.copytree(tmp_path / "last.ckpt", tmp_path / "last.lwpm-previous.ckpt")  # killed just before it was removed
    WholeCheckpointIO().remove_checkpoint(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
