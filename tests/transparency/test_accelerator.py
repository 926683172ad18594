"""On accelerators: a pipeline gives the result of one device, staged or straight, and times are those of the device."""

import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import CASES
from compare import compare
from harness import engine, train_pipelined, train_single
from pool import Pool
from torch import nn

from lightning_lwpm.pipeline.carrier import connect
from lightning_lwpm.pipeline.direct import Direct
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.staged import Staged
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.tree import map_tensors

one_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NAMES = ["long skip", "tied weights", "in place", "mixture of experts", "variable length", "late inputs"]
SETTINGS = [([1, 0], "1f1b"), ([1, 0], "zb1p"), ([0, 1, 1, 0], "zbv")]


def train(rank: int, world: int, devices: list[int], kind: type[Transport], *args: Any) -> dict[str, Any]:
    """Train on ``cuda:<devices[rank]>``; what is returned lies on the host."""
    device = torch.device("cuda", devices[rank])
    torch.cuda.set_device(device)
    found: list[Transport] = []

    def carry(mailbox: Mailbox) -> Transport:
        found.append(connect(mailbox, device))
        return found[0]

    result = train_pipelined(rank, world, *args, carry=carry)
    assert type(found[0]) is kind
    found[0].close()
    return map_tensors(lambda tensor: tensor.cpu(), result)  # type: ignore[no-any-return]


def check(
    pool: Pool, name: str, placement: list[int], schedule: str, devices: list[int], kind: type[Transport]
) -> None:
    case, stages = CASES[name], len(placement)
    expected = train_single(case.build, case.step, case.batches(), 4, device="cuda")
    expected = map_tensors(lambda tensor: tensor.cpu(), expected)
    partition = case.partition.get(stages, "auto")
    arguments = (case.build, case.step, case.batches(), 4, schedule, partition, None, placement)
    results = pool.run(2, train, devices, kind, *arguments, timeout=120)
    compare(expected, results, 1e-4)


@one_device
@pytest.mark.parametrize(("placement", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_share_a_device(pool: Pool, name: str, placement: list[int], schedule: str) -> None:
    check(pool, name, placement, schedule, [0, 0], Staged)


@two_devices
@pytest.mark.parametrize(("placement", "schedule"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_two_devices(pool: Pool, name: str, placement: list[int], schedule: str) -> None:
    check(pool, name, placement, schedule, [0, 1], Direct)


def fail(rank: int, world: int, devices: list[int]) -> tuple[str, float]:
    """Rank 1 fails in its third step, when rank 0 waits for its data; how rank 0 ends, and when (Unix seconds)."""
    device = torch.device("cuda", devices[rank])
    torch.cuda.set_device(device)
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
            torch.cuda.synchronize()
            del out
    except Exception as error:
        return str(error), time.time()
    return "nothing", time.time()


@one_device
def test_a_failure_is_heard_by_who_shares_the_device(pool: Pool) -> None:
    ends = [value for _, value in pool.outcomes(2, fail, [0, 0])]
    assert all("boom" in words for words, _ in ends)
    assert abs(ends[0][1] - ends[1][1]) < 8


@two_devices
def test_a_failure_frees_the_device_that_waits(pool: Pool) -> None:
    ends = [value for _, value in pool.outcomes(2, fail, [0, 1])]
    assert all("boom" in words for words, _ in ends)
    assert abs(ends[0][1] - ends[1][1]) < 8


@one_device
def test_times_are_those_of_the_device() -> None:
    def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(10_000_000)  # some milliseconds of the device, none of the host
        return model(x).square().mean()

    model = nn.Linear(4, 4)
    run = engine(0, 1, model, step, torch.randn(2, 4))
    model.cuda()
    run = Engine(run.mailbox, None, model, run.layout, torch.device("cuda", 0))
    run.record = []
    for _ in range(3):
        batch = Batch.of(torch.randn(4, 4, device="cuda"), 2)
        run.train(batch, lambda micro, _: step(model, micro), lambda out, _: out.backward())
    record = run.record
    assert record is not None
    assert [action for action, _, _ in record] == run.row(2) * 3
    assert all(end > begin for _, begin, end in record)
    assert all(before[2] <= after[1] + 1e-5 for before, after in pairwise(record))
    assert min(run.times.seconds(0, "F")) > 1e-3
