"""Measured costs on disk: found again, kept apart by environment, and never a reason to stop."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from lightning_lwpm.partition.costs import CallCost, Link
from lightning_lwpm.tuning.cache import CostCache, environment

CPU = torch.device("cpu")
COSTS = {"a": CallCost(1e-3, 2.5e-3, 1e-9), "b": CallCost(0.1, 0.0, 0.0)}


def test_round_trip(tmp_path: Path) -> None:
    CostCache("here", tmp_path / "new" / "folder").write(COSTS)
    cache = CostCache("here", tmp_path / "new" / "folder")
    assert cache.read(["b", "a", "unknown"]) == COSTS
    assert cache.read(["a"]) == {"a": COSTS["a"]} and cache.read([]) == {}
    assert all(cost.measured for cost in cache.read(COSTS).values())


def test_what_is_written_is_added(tmp_path: Path) -> None:
    cache = CostCache("here", tmp_path)
    cache.write(COSTS)
    cache.write({"b": CallCost(9, 9, 9), "c": CallCost(1, 1, 1)})
    assert cache.read("abc") == {"a": COSTS["a"], "b": CallCost(9, 9, 9), "c": CallCost(1, 1, 1)}
    assert [path.name for path in tmp_path.iterdir()] == [cache.path.name if cache.path else ""]


def test_links_are_kept_beside_layers(tmp_path: Path) -> None:
    cache = CostCache("here", tmp_path)
    assert cache.read_link("Transport a a") is None
    cache.write_link("Transport a a", Link(2e-5, 3e9))
    cache.write(COSTS)
    cache.write_link("Transport a b", Link(1e-3, 1e8))
    assert cache.read_link("Transport a a") == Link(2e-5, 3e9) and cache.read_link("Transport a b") == Link(1e-3, 1e8)
    assert cache.read([*COSTS, "link Transport a a"]) == COSTS


def test_another_environment_is_another_file(tmp_path: Path) -> None:
    one, two = CostCache("cpu, 1 threads", tmp_path), CostCache("cpu, 2 threads", tmp_path)
    one.write(COSTS)
    assert one.path != two.path and two.read(COSTS) == {}
    assert one.path is not None and json.loads(one.path.read_text())["environment"] == "cpu, 1 threads"


def test_environment_names_what_seconds_depend_on() -> None:
    threads = torch.get_num_threads()
    found = environment(CPU, "32-true")
    assert found == environment(CPU, "32-true") != environment(CPU, "bf16-mixed")
    assert torch.__version__ in found and f"{threads} threads" in found
    try:
        torch.set_num_threads(threads + 1)
        assert environment(CPU, "32-true") != found
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"seconds": 5}',
        '{"seconds": [1]}',
        '{"seconds": {"a": 1}}',
        '{"seconds": {"a": [1]}}',
        '{"seconds": {"a": ["x", "y", "z"]}}',
        '{"seconds": {"a": [1, 2, 3',
    ],
)
def test_a_broken_file_is_empty_and_is_replaced(text: str, tmp_path: Path) -> None:
    cache = CostCache("here", tmp_path)
    assert cache.path is not None
    cache.path.write_text(text)
    assert cache.read(COSTS) == {}
    cache.write(COSTS)
    assert cache.read(COSTS) == COSTS


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    cache = CostCache("here", tmp_path)
    assert cache.path is not None
    cache.path.write_bytes(b"\xff\xfe\x00")
    assert cache.read(COSTS) == {}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = CostCache("here", tmp_path / "file")
    cache.write(COSTS)
    assert cache.read(COSTS) == {}


def test_a_file_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    cache = CostCache("here", tmp_path)
    assert cache.path is not None
    (cache.path / "inside").mkdir(parents=True)
    cache.write(COSTS)
    assert list(tmp_path.iterdir()) == [cache.path] and cache.read(COSTS) == {}


@pytest.mark.parametrize("off", ["off", "OFF"])
def test_switched_off(off: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWPM_CACHE", off)
    monkeypatch.chdir(tmp_path)
    cache = CostCache("here")
    cache.write(COSTS)
    assert cache.path is None and cache.read(COSTS) == {} and not os.listdir()


def test_folder_by_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWPM_CACHE", str(tmp_path))
    CostCache("here").write(COSTS)
    assert CostCache("here", tmp_path).read(COSTS) == COSTS
    monkeypatch.setenv("LWPM_CACHE", "")
    path = CostCache("here").path
    assert path is not None and "lightning_lwpm" in path.parts


def test_two_writers(tmp_path: Path) -> None:
    """One of two that write at once may be lost, but what is read is always whole."""

    def write(name: str) -> None:
        for i in range(40):
            CostCache("here", tmp_path).write({f"{name}{i}": CallCost(i, i, i)})

    threads = [threading.Thread(target=write, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    cache = CostCache("here", tmp_path)
    assert cache.path is not None
    while any(thread.is_alive() for thread in threads):
        if cache.path.exists():
            assert json.loads(cache.path.read_text())["seconds"]
    for thread in threads:
        thread.join()
    found = cache.read(f"{name}{i}" for name in "xy" for i in range(40))
    assert found.keys() & {"x39", "y39"} and all(cost == CallCost(*[float(key[1:])] * 3) for key, cost in found.items())
    assert list(tmp_path.iterdir()) == [cache.path]
