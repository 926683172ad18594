"""Real processes that train without flushes do what the version formula says, to the bit."""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import connect, delays
from order import actions
from pool import Pool
from problems import batches, stages, weights
from torch import nn
from torch.nn import functional as F

from lightning_lwpm.pipeline.asynchronous.continuous import Continuous, Work, window
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import writable
from lightning_lwpm.pipeline.asynchronous.registry import CORRECTIONS, DEFAULT
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.layout import Layout, Unit

sys.path.insert(0, str(Path(__file__).parents[3] / "examples/benchmarks/asynchronous"))


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 1), (2, 2), (3, 2), (4, 1), (4, 4), (4, 8), (5, 3)])
def test_windows_are_steady_1f1b(p: int, m: int) -> None:
    total = 4 * m
    for stage in range(p):
        admitted, row = 0, []
        for batch in range(4):
            part = window(stage, p - 1 - stage, batch * m, (batch + 1) * m, admitted, total)
            admitted += sum(action.kind == "F" for action in part)
            row += [(action.kind, action.microbatch) for action in part] + [("S", batch)]
        assert row == actions(stage, p, m, total)


class Seen(Correction):
    """Notes the steps that each pass crosses."""

    def __init__(self, inner: Any, notes: list[Any]) -> None:
        self.inner, self.notes = inner, notes

    @contextmanager
    def forward(self, crossed: int, done: int = 0) -> Any:
        self.notes.append(("F", crossed, done))
        with self.inner.forward(crossed, done):
            yield

    @contextmanager
    def backward(self, crossed: int) -> Any:
        self.notes.append(("B", crossed))
        with self.inner.backward(crossed):
            yield


class Part:
    """A stage of the problem."""

    def __init__(self, module: Any, optimizer: Any, scheduler: Any, correction: Any, delay: Any) -> None:
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.correction, self.delay = correction, delay


def train(
    rank: int, world: int, m: int, name: str, data: Any, drains: Any = (), lr: float | None = None
) -> dict[str, Any]:
    """Train; ``drains`` are the batches after which the pipeline is empty, ``-n`` those after which it is emptied."""
    mailbox, transport = connect(rank, world)
    parts = stages(Part, world, m, name, lr=lr)
    model = nn.Sequential(*(part.module for part in parts))
    units = tuple(Unit(str(i), (i,)) for i in range(world))
    layout = Layout(world, units, {n: (int(n.split(".")[0]),) for n, _ in model.named_parameters()}, {})
    engine = Engine(mailbox, transport, model, layout, torch.device("cpu"), continuous=True)
    engine.record = []
    run = Continuous(engine, [world - 1 - stage for stage in range(world)])
    own, notes = parts[engine.stage or 0], []
    run.correction = Seen(own.correction, notes)
    losses, gradients = [0.0] * len(data), []
    works = []
    for number, (x, y) in enumerate(data):
        split = Batch.of((x, y), m)

        def forward(micro: Any, i: int) -> Any:
            return F.mse_loss(model(micro[0].clone()), micro[1].clone()) / m

        def backward(out: Any, i: int, number: int = number) -> None:
            losses[number] += out.item()
            out.backward()

        works.append(Work(split, number, forward, backward))
    for number in range(len(works)):
        last = next((end for end in range(number, len(works)) if end in drains), len(works) - 1)
        run.train(works[number : last + 1][: 1 + -(-(world - 1) // m)])
        gradients.append([p.grad.clone() for p in own.module.parameters()])
        own.correction.before_step()
        with writable(own.correction.parameters):
            own.optimizer.step()
        own.correction.after_step()
        own.scheduler.step()
        own.optimizer.zero_grad()
        if -number in drains and number:
            run.discard()
    mailbox.gather("end", None)
    mailbox.close()
    row = [action for action, _, _ in engine.record or []]
    return {
        "stage": engine.stage,
        "weights": weights(own.module),
        "losses": losses,
        "notes": notes,
        "row": row,
        "gradients": gradients,
        "flights": [len(exchange.desk.flights) for exchange in engine.executor.exchanges.values()],  # type: ignore
    }


def delayed(rank: int, *arguments: Any) -> dict[str, Any]:
    with delays(rank, 1):
        return train(rank, *arguments)


def emulated(p: int, m: int, name: str, count: int) -> tuple[list[float], list[list[torch.Tensor]]]:
    from emulation import Emulation, Stage

    expected = stages(Stage, p, m, name)
    losses = Emulation(expected, m, F.mse_loss, apart=True).run(batches(count))
    return losses, [weights(stage.module) for stage in expected]


def check(results: list[dict[str, Any]], expected: tuple[list[float], list[list[torch.Tensor]]]) -> None:
    losses, final = expected
    for result in results:
        assert result["flights"] == [0]
        for mine, theirs in zip(result["weights"], final[result["stage"]], strict=True):
            assert torch.equal(mine, theirs)
    assert results[0]["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("name", [*CORRECTIONS, DEFAULT])
@pytest.mark.parametrize(("p", "m"), [(2, 1), (3, 2), (4, 4), (4, 1)])
def test_equals_the_emulation(pool: Pool, p: int, m: int, name: str) -> None:
    check(pool.run(p, train, m, name, batches(6), timeout=60), emulated(p, m, name, 6))


def test_delays_change_no_number(pool: Pool) -> None:
    check(pool.run(3, delayed, 2, DEFAULT, batches(6), timeout=60), emulated(3, 2, DEFAULT, 6))


@pytest.mark.parametrize(("p", "m"), [(2, 1), (3, 2), (4, 1)])
def test_passes_cross_the_steps_of_the_formula(pool: Pool, p: int, m: int) -> None:
    for result in pool.run(p, train, m, "none", batches(6), timeout=60):
        delay = Delay(result["stage"], p, m)
        order = [("F" if a.kind == "F" else "B", a.microbatch) for a in result["row"]]
        assert order == [pair for pair in actions(result["stage"], p, m, 6 * m) if pair[0] != "S"]
        for (kind, number), note in zip(order, result["notes"], strict=True):
            assert note[:2] == (kind, delay.crossed(number))


@pytest.mark.parametrize("drains", [range(6), [-n for n in range(6)]])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (3, 2), (4, 1)])
def test_drained_at_every_step_it_is_the_exact_schedule(pool: Pool, p: int, m: int, drains: Any) -> None:
    """Whether nothing is begun, or what was begun is given up."""
    results = pool.run(p, train, m, "none", batches(6), list(drains), timeout=60)
    parts = stages(Part, p, m, "none")
    for x, y in batches(6):
        for some, target in zip(x.chunk(m), y.chunk(m), strict=True):
            out = some.clone()
            for part in parts:
                out = part.module(out)
            (F.mse_loss(out, target.clone()) / m).backward()
        for part in parts:
            part.optimizer.step()
            part.scheduler.step()
            part.optimizer.zero_grad()
    for result in results:
        for mine, theirs in zip(result["weights"], weights(parts[result["stage"]].module), strict=True):
            assert torch.equal(mine, theirs)


def test_gradients_are_exact_while_weights_stand_still(pool: Pool) -> None:
    p, m = 3, 2
    results = pool.run(p, partial(train, lr=0.0), m, DEFAULT, batches(4), timeout=60)
    parts = stages(Part, p, m, "none")
    net = nn.Sequential(*(part.module for part in parts))
    for number, (x, y) in enumerate(batches(4)):
        net.zero_grad()
        for some, target in zip(x.chunk(m), y.chunk(m), strict=True):
            (F.mse_loss(net(some.clone()), target.clone()) / m).backward()
        for result in results:
            own = parts[result["stage"]].module
            for mine, parameter in zip(result["gradients"][number], own.parameters(), strict=True):
                assert torch.equal(mine, parameter.grad)
