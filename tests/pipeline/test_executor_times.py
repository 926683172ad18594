"""A rank measures its own work, and leaves out what it spends waiting for others."""

import time
from typing import Any

import torch
from harness import engine
from pool import Pool
from torch import nn

from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.staging.batch import Batch

SLEEP = 0.05


class Slow(nn.Module):
    """A layer that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP)
        return self.linear(x)


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def measure(rank: int, world: int) -> dict[str, Any]:
    """Two steps of two micro-batches: the first stage is slow."""
    torch.manual_seed(0)
    model = nn.Sequential(Slow(), nn.Linear(4, 4))
    run = engine(rank, world, model, step, torch.randn(2, 4), ["1"])
    run.record = []
    for _ in range(2):
        batch = Batch.of(torch.randn(4, 4), 2)
        run.train(batch, lambda micro, _: step(model, micro), lambda out, _: out.backward())
    assert run.stage is not None
    found = {kind: run.times.seconds(run.stage, kind) for kind in "FB"}
    medians = {kind: run.times.median(run.stage, kind) for kind in "FB"}
    record, row = run.record, run.row(2)
    run.times.clear()
    left = run.times.seconds(run.stage, "F")
    run.mailbox.gather("end", None)
    run.mailbox.close()
    return {"stage": run.stage, "seconds": found, "medians": medians, "record": record, "row": row, "left": left}


def test_waits_are_no_work(pool: Pool) -> None:
    last, first = pool.run(2, measure, timeout=40)
    assert (first["stage"], last["stage"]) == (0, 1)
    assert len(first["seconds"]["F"]) == len(last["seconds"]["B"]) == 4
    assert min(first["seconds"]["F"]) >= SLEEP
    assert last["medians"]["F"] < SLEEP / 2  # its action lasts longer: it waits for stage 0
    assert all(begin <= end for _, begin, end in last["record"])
    assert [action for action, _, _ in last["record"]] == last["row"] * 2
    assert isinstance(last["record"][0][0], Action)
    assert first["left"] == last["left"] == []
