"""Where a step is left, only what its code can still reach is kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.step import StagedStep

WIDTH = 1 << 13  # large enough not to be kept for its size


class Nobody:
    """The first stage asks no other."""

    def record(self, stage: int, key: Any) -> Any:
        raise AssertionError

    def value(self, remote: Any) -> Tensor:
        raise AssertionError


def kept(step: Callable[[nn.Module, Tensor], Any]) -> set[tuple[str, int]]:
    """What stage 0 keeps of a step: (layer, function after it)."""
    model = nn.ModuleDict({"first": nn.Identity(), "last": nn.Identity()})
    units = [(Unit(name, (stage,)), model[name]) for stage, name in enumerate(model)]
    interception = Interception(units)
    run = StagedStep(0, False, interception, Nobody(), torch.device("cpu"))
    x = torch.ones(WIDTH, requires_grad=True)
    with interception.batch():
        run.run(lambda: step(model, x))
    return {(name.unit, name.index) for name in run.reach.tensors}


def test_what_nothing_refers_to_is_let_go() -> None:
    def step(model: Any, x: Tensor) -> None:
        x = model["first"](x * 2)
        x = x + 1
        y = x * 3
        model["last"](y)

    assert kept(step) == {("first", 1), ("first", 2)}


def test_variables_closures_and_generators_are_reached() -> None:
    def step(model: Any, x: Tensor) -> None:
        def halves(value: Tensor) -> Iterator[Tensor]:
            held = value * 5
            yield value
            yield held

        x = model["first"](x)
        skip, lost = x.exp(), x.sin()
        later = lambda: skip.cos()  # noqa: E731
        del lost
        parts = halves(x + 7)
        y = next(parts)
        del x
        z = model["last"](y)
        later()
        return z

    # exp; x + 7; its product with 5 waits in the generator. x itself is what autograd keeps too, in memory anyway
    assert kept(step) - {("first", 0)} == {("first", 1), ("first", 3), ("first", 4)}


def test_attributes_containers_and_exceptions_are_reached() -> None:
    class Holder:
        pass

    def step(model: Any, x: Tensor) -> None:
        holder, error, table = Holder(), None, {}
        x = model["first"](x)
        holder.value = x + 1
        table["a"] = [x + 2]
        try:
            raise ValueError(x + 3)
        except ValueError as caught:
            error = caught
        x + 4
        model["last"](x - 5)
        del holder, error

    assert kept(step) - {("first", 0)} == {("first", 1), ("first", 2), ("first", 3), ("first", 5)}


def test_what_views_are_made_from_is_kept() -> None:
    def step(model: Any, x: Tensor) -> None:
        x = model["first"](x * 2)
        view = (x * 3).view(2, -1)[0].detach()
        gone = (x * 4).view(2, -1)
        del gone
        model["last"](view)

    # the product, its view, a row of it, and that detached; of the second product and its view nothing
    assert {("first", 1), ("first", 2), ("first", 3), ("first", 4)} <= kept(step)
    assert not {("first", 5), ("first", 6)} & kept(step)


def test_what_a_later_stage_reads_on_its_way_is_kept() -> None:
    def step(model: Any, x: Tensor) -> None:
        x = model["first"](x)
        (x * 2).tolist()
        buffer = torch.zeros(2, WIDTH)
        buffer[0] = x * 3
        model["last"](buffer)

    assert {("first", 1), ("first", 4)} <= kept(step)


def test_the_stack_of_an_expression_is_reached() -> None:
    def step(model: Any, x: Tensor) -> Any:
        return torch.cat([model["first"](x).cos(), model["last"](x * 2)])

    assert ("first", 1) in kept(step)


@pytest.mark.parametrize("size", [1, 1000])
def test_small_tensors_are_kept(size: int) -> None:
    def step(model: Any, x: Tensor) -> None:
        x = model["first"](x)
        (x[:size] * 2).sin()
        model["last"](x)

    assert {("first", 2), ("first", 3)} <= kept(step)
