"""On accelerators: a pipeline gives the result of one device, staged or straight, and times are those of the device."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import CASES, Case
from compare import compare
from harness import engine, train_pipelined, train_single
from pool import Pool
from simulated import NAME, can_simulate, rest, unrecorded, use
from torch import nn

from lightning_lwpm.pipeline.carrier import connect
from lightning_lwpm.pipeline.direct import Direct
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.staged import Staged
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch

one_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
simulated = pytest.mark.skipif(not can_simulate(), reason="needs a C++ compiler and the headers of Python")
kinds = pytest.mark.parametrize("kind", [pytest.param(NAME, marks=simulated), pytest.param("cuda", marks=one_device)])
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NAMES = ["long skip", "tied weights", "in place", "mixture of experts", "variable length", "late inputs"]
SETTINGS = [([1, 0], "1f1b"), ([1, 0], "zb1p"), ([0, 1, 1, 0], "zbv")]


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """Workers of their own: a process that has simulated devices keeps them."""
    workers = Pool(2)
    yield workers
    workers.close()


def train(rank: int, world: int, kind: str, devices: list[int], way: type[Transport], *args: Any) -> dict[str, Any]:
    """Train on a device of the ``kind``; what is returned lies on the host."""
    device = use(kind, devices[rank])
    found: list[Transport] = []

    def carry(mailbox: Mailbox) -> Transport:
        found.append(connect(mailbox, device))
        return found[0]

    result = train_pipelined(rank, world, *args, carry=carry)
    assert type(found[0]) is way
    found[0].close()
    torch.accelerator.synchronize()
    assert kind != NAME or unrecorded() == 0, "another stream used memory that may be given out again meanwhile"
    return result


def alone(rank: int, world: int, kind: str, case: Case) -> dict[str, Any]:
    """The same on one device."""
    device = use(kind, 0)
    return train_single(case.build, case.step, case.batches(), 4, device=str(device))


def check(
    pool: Pool, name: str, placement: list[int], schedule: str, kind: str, devices: list[int], way: type[Transport]
) -> None:
    case, stages = CASES[name], len(placement)
    expected = pool.run(1, alone, kind, case, timeout=240)[0]  # the first one compiles
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), 4, schedule, partition, None, placement)
    results = pool.run(2, train, kind, devices, way, *arguments, timeout=120)
    compare(expected, results, 1e-4 if kind == "cuda" else 1e-5 if case.rounding(stages, 4) else 0)


@kinds
@pytest.mark.parametrize(("placement", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_through_host_memory(processes: Pool, name: str, placement: list[int], schedule: str, kind: str) -> None:
    """Two ranks that share a device, or have devices that nothing connects."""
    if kind == NAME and name == "variable length":
        pytest.skip("LSTM cells have a kernel of their own outside the CPU")
    check(processes, name, placement, schedule, kind, [0, 0] if kind == "cuda" else [0, 1], Staged)


@two_devices
@pytest.mark.parametrize(("placement", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_two_devices(processes: Pool, name: str, placement: list[int], schedule: str) -> None:
    check(processes, name, placement, schedule, "cuda", [0, 1], Direct)


def fail(rank: int, world: int, kind: str, devices: list[int]) -> tuple[str, float]:
    """Rank 1 fails in its third step, when rank 0 waits for its data; how rank 0 ends, and when (Unix seconds)."""
    device = use(kind, devices[rank])
    steps = []

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        steps.append(x)
        if rank == 1 and len(steps) > 8:
            raise ValueError("boom")
        return model(x).square().mean()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    run = engine(rank, world, model, step, torch.randn(2, 4), ["1"], carry=lambda mailbox: connect(mailbox, device))
    model.to(device)
    try:
        for _ in range(6):
            batch = Batch.of(torch.randn(8, 4, device=device), 4)
            out = run.train(batch, lambda micro, _: step(model, micro), lambda out, _: out.backward())
            torch.accelerator.synchronize()
            del out
    except Exception as error:
        return str(error), time.time()
    return "nothing", time.time()


@kinds
def test_a_failure_is_heard_by_who_shares_the_device(processes: Pool, kind: str) -> None:
    ends = [value for _, value in processes.outcomes(2, fail, kind, [0, 0], timeout=240)]
    assert all("boom" in words for words, _ in ends)
    assert abs(ends[0][1] - ends[1][1]) < 8


@two_devices
def test_a_failure_frees_the_device_that_waits(processes: Pool) -> None:
    ends = [value for _, value in processes.outcomes(2, fail, "cuda", [0, 1])]
    assert all("boom" in words for words, _ in ends)
    assert abs(ends[0][1] - ends[1][1]) < 8


def timed(rank: int, world: int, kind: str) -> None:
    device = use(kind, 0)

    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rest(kind)
        return model(x).square().mean()

    model = nn.Sequential(nn.Linear(4, 4))
    run = engine(0, 1, model, lambda model, x: model(x).square().mean(), torch.randn(2, 4))
    model.to(device)
    run = Engine(run.mailbox, None, model, run.layout, device)
    run.record = []
    for _ in range(3):
        batch = Batch.of(torch.randn(4, 4, device=device), 2)
        run.train(batch, lambda micro, _: step(model, micro), lambda out, _: out.backward())
    record = run.record
    assert record is not None
    assert [action for action, _, _ in record] == run.row(2) * 3
    assert all(end > begin for _, begin, end in record)
    assert all(before[2] <= after[1] + 1e-5 for before, after in pairwise(record))
    assert min(run.times.seconds(0, "F")) > 1e-3


@kinds
def test_times_are_those_of_the_device(processes: Pool, kind: str) -> None:
    processes.run(1, timed, kind, timeout=240)
