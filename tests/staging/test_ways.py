"""The way of ``torch.autograd.grad`` through the graph, and the names of torch's on which that depends."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.flight import Arrival, join
from lightning_lwpm.staging.remote import Meta, Name
from lightning_lwpm.staging.sites import quoted, site, step_runner
from lightning_lwpm.staging.transforms import check_transforms
from lightning_lwpm.staging.ways import arguments_of, check_way, moment, next_moment, received, way


def arrived(unit: str = "encoder.1") -> Tensor:
    """A tensor that an earlier stage has sent."""
    tensor = torch.ones(3)
    return join(Arrival(Name(unit, 0, 0, 0), 0, tensor, Meta.of(tensor)._replace(requires_grad=True), False), True)


def names(nodes: Any) -> list[str]:
    return sorted(node.name() for node in nodes)


def test_only_what_lies_between_both_ends() -> None:
    x, w = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    h = w.exp() + x.sin()
    out = h.cos().sum()
    assert names(way([out], [x])) == ["AddBackward0", "CosBackward0", "SinBackward0", "SumBackward0"]
    assert names(way([out], [h])) == ["CosBackward0", "SumBackward0"]
    assert names(way([out], [get_gradient_edge(h), w])) == [
        "AddBackward0",
        "CosBackward0",
        "ExpBackward0",
        "SumBackward0",
    ]
    assert not way([x.sum()], [w])


def test_a_derivative_leads_back_through_what_was_differentiated() -> None:
    x = torch.ones(3, requires_grad=True)
    begin = next_moment()
    middle = x * x
    (slope,) = torch.autograd.grad(middle.exp().sum(), x, create_graph=True)
    nodes = way([slope.sum()], [x])
    assert min(map(moment, nodes)) == begin
    assert max(map(moment, nodes)) < next_moment()


def test_where_a_way_leads_out_of_a_stage() -> None:
    h, other, x = arrived(), arrived("other"), torch.ones(3, requires_grad=True)
    energy = (h * x).sum()

    def units(outputs: list[Tensor], inputs: list[Tensor]) -> list[str]:
        return [arrival.name.unit for arrival in received(outputs, inputs)]

    assert units([energy], [h]) == []
    assert units([(other.detach() * x).sum()], [x]) == []
    assert units([energy], [x]) == ["encoder.1"]
    assert units([energy + (h * other).sum()], [h]) == ["other"]
    assert units([(h + other).sum()], [h, other]) == ["encoder.1", "other"]  # the one may have been made of the other


def test_a_call_that_was_not_seen_before_is_told_with_its_line() -> None:
    h, x = arrived(), torch.ones(3, requires_grad=True)
    places: list[Any] = []

    def ask(stage: int, seen: bool) -> None:
        places.append(site())
        check_way(((h * x).sum(), x), {}, stage, {(site(), 1)} if seen else ())  # here

    @step_runner
    def run(step: Any) -> None:
        step()

    message = r"check_way.*# here` \(test_ways.py, line \d+\).*'encoder.1' is in stage 0"
    for stage, seen in ((1, False), (2, True)):
        with pytest.raises(PipelineError, match=message):
            run(lambda stage=stage, seen=seen: ask(stage, seen))
    run(lambda: ask(1, True))
    assert all(
        len(place) == 2 for place in places
    )  # the function, and where the step calls it: nothing around the step
    assert len({place[0] for place in places}) == 1
    assert len({place[1] for place in places}) == 2
    assert quoted(()) == "a call"


def test_arguments_by_position_and_by_name() -> None:
    x = torch.ones(3, requires_grad=True)
    assert arguments_of((x, [x, x]), {}) == ([x], [x, x])
    assert arguments_of((), {"outputs": (x,), "inputs": x}) == ([x], [x])


def test_no_stage_begins_within_a_transform() -> None:
    check_transforms("head")
    with pytest.raises(PipelineError, match=r"'head'.*torch\.func"):
        torch.vmap(lambda x: check_transforms("head"))(torch.ones(2))
    with forward_ad.dual_level(), pytest.raises(PipelineError, match="'head'"):
        check_transforms("head")
