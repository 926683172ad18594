"""Schedules that split backward passes are run as their tables say, and compute what one device computes."""

from functools import partial
from typing import Any

import pytest
import torch
from harness import engine, train_delayed, train_pipelined, train_single
from pool import Pool, WorkerError
from torch import nn

from lightning_lwpm.pipeline.schedule import Action, Table, build
from lightning_lwpm.staging.batch import Batch

WIDTH, DEPTH = 12, 8


class Net(nn.Module):
    """An embedding, perceptrons around which the input goes on, convolutions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Conv1d(6, 6, 3, padding=1))
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def step(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def in_bfloat16(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return step(model, tokens)


def tokens() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, 20, (8, 6)) for _ in range(2)]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def same(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All losses and gradients are those of one device, in every bit."""
    assert next(result["losses"] for result in results if result["last"]) == expected["losses"]
    for number, gradients in enumerate(expected["gradients"]):
        found = {name: grad for result in results for name, grad in result["gradients"][number].items()}
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(found[name], gradient), name


def cheap_weights(action: Action) -> float:
    """Costs with which the best table splits backward passes."""
    return {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}[action.kind]


def best(count: int, placement: list[int]) -> Table:
    ranks = max(placement) + 1
    table = build("auto", len(placement), count, ranks, placement, cheap_weights, 0.1)
    assert any(action.kind == "W" for row in table for action in row)
    return table


SETTINGS: list[tuple[list[int], int, Any]] = [
    ([1, 0], 4, "zb1p"),
    ([2, 1, 0], 5, "zb1p"),
    ([0, 1, 1, 0], 4, "zbv"),
    ([1, 0, 1, 0], 4, "zb1p"),
    ([1, 0], 6, partial(best, placement=[1, 0])),
    ([0, 1, 1, 0], 6, partial(best, placement=[0, 1, 1, 0])),
]


@pytest.mark.parametrize("run", [step, in_bfloat16])
@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
def test_equals_one_device(pool: Pool, placement: list[int], count: int, schedule: Any, run: Any) -> None:
    arguments = (Net, run, tokens(), count, schedule, "auto", sgd, placement)
    results = pool.run(max(placement) + 1, train_pipelined, *arguments, timeout=60)
    same(results, train_single(Net, run, tokens(), count, sgd))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("placement", "count", "schedule"), [SETTINGS[1], SETTINGS[2]])
def test_delays_change_no_number(pool: Pool, placement: list[int], count: int, schedule: str, seed: int) -> None:
    arguments = (Net, step, tokens(), count, schedule, "auto", sgd, placement)
    results = pool.run(max(placement) + 1, train_delayed, seed, *arguments, timeout=60)
    same(results, train_single(Net, step, tokens(), count, sgd))


def watched(rank: int, world: int, placement: list[int], count: int, schedule: Any) -> Any:
    """Two steps: what was executed, the table, and the times kept."""
    torch.manual_seed(0)
    model, data = Net(), tokens()[0]
    run = engine(rank, world, model, step, data[:2], "auto", schedule, placement)
    run.record = []
    for _ in range(2):
        run.train(Batch.of(data, count), lambda micro, _: step(model, micro), lambda out, _: out.backward())
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    kept = {(stage, kind): len(run.times.seconds(stage, kind)) for stage in run.stages for kind in "FBIW"}
    done, row = [action for action, _, _ in run.record], run.row(count)
    run.mailbox.gather("end", None)
    run.mailbox.close()
    return done, row, kept, hooks


@pytest.mark.parametrize(("placement", "count", "schedule"), SETTINGS)
def test_tables_are_run_as_they_are(pool: Pool, placement: list[int], count: int, schedule: Any) -> None:
    for done, row, kept, hooks in pool.run(max(placement) + 1, watched, placement, count, schedule, timeout=60):
        assert done == row * 2
        kinds = {action.kind for action in row}
        assert kinds <= {"F", "B", "I", "W"} and not any(kind == "B" and stage for kind, stage, _ in row)
        assert kept == {key: 2 * sum((action.stage, action.kind) == key for action in row) for key in kept}
        assert not any(hooks)


def mixed(count: int) -> Table:
    """One device's table that defers the weights of every other micro-batch, to the end."""
    row: list[Action] = []
    for i in range(count):
        row += [Action("F", 0, i), Action("B" if i % 2 else "I", 0, i)]
    return [row + [Action("W", 0, i) for i in reversed(range(0, count, 2))]]


def test_one_device_and_both_kinds_of_backward_pass(pool: Pool) -> None:
    for schedule in ("zb1p", mixed):
        results = pool.run(1, train_pipelined, Net, step, tokens(), 4, schedule, "auto", sgd, timeout=60)
        same(results, train_single(Net, step, tokens(), 4, sgd))


class Failing(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise ValueError("boom")


def in_inputs(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return Failing.apply(step(model, tokens))


class Changing(nn.Module):
    """Gives a layer an input that it changes in place later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        for tensor in self.kept:
            tensor.zero_()
        self.kept.append(x.detach())
        return self.head(x)


def late(count: int) -> Table:
    return [[*(Action(kind, 0, i) for i in range(count) for kind in "FI"), *(Action("W", 0, i) for i in range(count))]]


def test_failures_name_the_part(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="failed in input gradients of micro-batch 0: ValueError: boom"):
        pool.run(2, train_pipelined, Net, in_inputs, tokens(), 2, "zb1p", timeout=60)
    square = lambda model, x: model(x).square().mean()  # noqa: E731
    with pytest.raises(WorkerError, match="was changed in place after its backward pass"):
        pool.run(1, train_pipelined, Changing, square, [torch.randn(4, 4)], 2, late, timeout=60)
