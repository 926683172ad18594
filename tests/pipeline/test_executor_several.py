"""Several stages a rank: tables in any order, evaluation that overlaps, words that name the stage."""

import random
import time
from typing import Any

import pytest
import torch
from harness import engine, train_pipelined, train_single
from pool import Pool, WorkerError
from torch import nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.schedule import GPIPE, ONE_F_ONE_B, Action, Table, list_schedule, place
from lightning_lwpm.staging.batch import Batch

DEPTH, WIDTH = 8, 6


class Skips(nn.Module):
    """Every layer also sees what three layers before it made: tensors go to many stages."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x, x, x]
        for layer in self.layers:
            made.append(torch.tanh(layer(made[-1])) + made[-3])
        return made[-1]


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def batches(count: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(12, WIDTH) for _ in range(count)]


def cuts(num_stages: int) -> list[str]:
    """The layers that begin the later stages."""
    return [f"layers.{i}" for i in range(1, num_stages)]


@pytest.mark.parametrize("seed", range(10))
def test_tables_of_any_order(pool: Pool, seed: int) -> None:
    """Random ranks and costs: what a rank receives first, it may need last."""
    draw = random.Random(seed)
    stages, count = draw.randint(3, 8), draw.randint(1, 6)
    placement = [0, 1, *(draw.randrange(3) for _ in range(stages - 2))]
    draw.shuffle(placement)
    times = {(kind, stage): draw.choice([1, 3, 20]) * draw.random() for kind in "FB" for stage in range(stages)}
    policy = draw.choice([GPIPE, ONE_F_ONE_B])

    def table(microbatches: int) -> Table:
        return list_schedule(policy, stages, microbatches, placement, lambda action: times[action.kind, action.stage])

    arguments = (Skips, step, batches(), count, table, cuts(stages), None, placement)
    results = pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=40)
    expected = train_single(Skips, step, batches(), count)
    found = {name: gradient for result in results for name, gradient in result["gradients"][-1].items()}
    assert next(result["losses"] for result in results if result["last"]) == expected["losses"]
    assert set(found) == set(expected["gradients"][-1])
    # a tensor that several stages use twice each gets its gradients in another order than on one device
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected["gradients"][-1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["interleaved_1f1b", "gpipe"])
def test_schedules_by_name(pool: Pool, name: str) -> None:
    placement = place(6, 2)
    arguments = (Skips, step, batches(), 4, name, cuts(6), None, placement)
    results = pool.run(2, train_pipelined, *arguments, timeout=40)
    assert results[0]["losses"] == train_single(Skips, step, batches(), 4)["losses"]
    assert [result["stages"] for result in results] == [(1, 3, 5), (0, 2, 4)]


def evaluate(rank: int, world: int, placement: list[int]) -> Any:
    """Many batches, one after another; then one of several micro-batches."""
    torch.manual_seed(0)
    model = Skips()
    data = batches(40)
    run = engine(rank, world, model, step, data[0], cuts(len(placement)), placement=placement)
    outputs = []
    for value in data:
        with torch.no_grad():
            outputs += run.evaluate(Batch.of(value, 1), lambda micro, _: step(model, micro))
    with torch.no_grad():
        outputs += run.evaluate(Batch.of(data[0], 12), lambda micro, _: step(model, micro), kind="split")
    run.mailbox.gather("end", None)
    desks = [exchange.desk for exchange in run.executor.exchanges.values()] if run.executor else []
    deadline = time.monotonic() + 5
    while any(desk.flights for desk in desks) and time.monotonic() < deadline:
        time.sleep(0.01)  # another thread hears that later stages are done
    held = [len(desk.flights) for desk in desks]
    run.mailbox.close()
    return [float(out) if out is not None else None for out in outputs], held


@pytest.mark.parametrize("placement", [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
def test_evaluation(pool: Pool, placement: list[int]) -> None:
    torch.manual_seed(0)
    model = Skips()
    with torch.no_grad():
        expected = [float(step(model, x)) for x in batches(40)]
        expected += [float(step(model, x)) for x in batches(40)[0].split(1)]
    results = pool.run(2, evaluate, placement, timeout=40)
    last = placement[-1]
    assert results[last][0] == expected
    assert all(out is None for out in results[1 - last][0])
    assert not any(results[last][1])  # nothing is held once all are done with it


class Breaking(Skips):
    """Fails in the code of stage 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if out.shape[0] == 2:
            raise ValueError("boom")
        return out


def test_errors_name_the_stage(pool: Pool) -> None:
    data = [torch.randn(12, WIDTH), torch.randn(2, WIDTH)]
    arguments = (Breaking, step, data, 1, "1f1b", cuts(4), None, [1, 0, 1, 0])
    with pytest.raises(WorkerError) as failure:
        pool.run(2, train_pipelined, *arguments, timeout=40)
    assert "stages 1 and 3 (rank 0) failed in forward of micro-batch 0 in stage 3: ValueError: boom" in str(
        failure.value
    )


def test_what_cannot_be_run_is_refused(pool: Pool) -> None:
    arguments = (Skips, step, batches(), 4)
    with pytest.raises(WorkerError, match=r"has actions \['S'\], which cannot be run"):
        pool.run(2, train_pipelined, *arguments, lambda _: [[Action("S", 0, 0)], []], cuts(2), None, [1, 0], timeout=40)
    with pytest.raises(WorkerError, match=r"placement=\[5, 0\]: ranks go from 0 to 1"):
        pool.run(2, train_pipelined, *arguments, "1f1b", cuts(2), None, [5, 0], timeout=40)
    with pytest.raises(WorkerError, match=ConfigurationError.__name__):
        pool.run(2, train_pipelined, *arguments, "zigzag", cuts(2), None, [1, 0], timeout=40)
