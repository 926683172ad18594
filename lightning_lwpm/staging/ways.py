"""The way that ``torch.autograd.grad`` takes through autograd's graph, and whether a part of it is in another stage.

::

    stage 0             | stage 1
    x -- layer -- h     |  h' -- layer -- energy          grad(energy, h): all of its way is here
                        |                                 grad(energy, x): it goes on where h' has come from

What a stage has received begins its graph: a way that leads there may go on in the stage that sent it.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.sites import Site, quoted, site

__all__ = ["Joined", "arguments_of", "arrival_of", "check_way", "moment", "next_moment", "received", "way"]


class Joined(torch.autograd.Function):
    """Joins a received tensor to the graph; a plain result, not a leaf, so that it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, arrival: Any) -> Tensor:
        """``arrival`` has the ``tensor``, and is given its ``gradient``."""
        ctx.arrival = arrival
        out: Tensor = arrival.tensor
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.arrival.gradient = gradients[0]
        return None, None


def arguments_of(args: Any, kwargs: Any) -> tuple[list[Any], list[Any]]:
    """The outputs and the inputs that ``torch.autograd.grad`` is called with: tensors, or edges of the graph."""
    outputs = args[0] if args else kwargs["outputs"]
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    return _listed(outputs), _listed(inputs)


def way(outputs: list[Any], inputs: list[Any]) -> list[Node]:
    """The nodes of the graph that lie between outputs and inputs.

    Args:
        outputs: What is differentiated.
        inputs: By what.
    """
    ends = {(edge.node, edge.output_nr) for edge in _edges(inputs)}
    leads: dict[Node, bool] = {}
    for node in _reached(outputs):  # what a node leads to comes before it
        leads[node] = any((n, i) in ends or (n is not None and leads[n]) for n, i in node.next_functions)
    return [node for node, found in leads.items() if found]


def received(outputs: list[Any], inputs: list[Any]) -> list[Any]:
    """What has been received from other stages, where a way from outputs to inputs may go on.

    Args:
        outputs: What is differentiated.
        inputs: By what.
    """
    own = {(edge.node, edge.output_nr) for edge in _edges(inputs)}
    # of several inputs, one may have been made from another
    nodes = _reached(outputs, own if len(own) == 1 else set())
    return [node.arrival for node in nodes if _is_joined(node)]  # type: ignore[attr-defined]


def arrival_of(value: Any) -> Any:
    """What a tensor, or an edge of the graph, has been received as; ``None`` if it was made here."""
    node = _edge(value).node if _is_followed(value) else None
    return node.arrival if node is not None and _is_joined(node) else None  # type: ignore[attr-defined]


def check_way(
    args: Any,
    kwargs: Any,
    stage: int,
    known: Collection[tuple[Site, int]],
    source: Callable[[Any], Tensor | None] | None = None,
    former: Callable[[Any], list[Any]] = lambda value: [value],
) -> None:
    """Make sure that all that ``torch.autograd.grad`` goes through is in this stage, and in one piece.

    Args:
        args: The arguments of the call.
        kwargs: Those by name.
        stage: The stage in which it is.
        known: The calls that the step showed when it was looked at, with their stage: the partition has seen to them.
        source: From what has been received to the tensor itself, if this very stage has made it earlier in the step.
        former: From an input to what it was earlier in the step.

    Raises:
        PipelineError: where it may not be.
    """
    place = site()
    seen = (place, stage) in known
    if seen and source is None:
        return
    outputs, inputs = arguments_of(args, kwargs)
    if not seen and any(is_placeholder(tensor) for tensor in inputs):
        raise _elsewhere(place, stage, "one of the inputs is a weight of another stage")
    begins = [before for value in inputs for before in former(value)]
    pending = received(outputs, inputs)
    done: set[int] = set()
    while pending:
        arrival = pending.pop()
        if id(arrival) in done:
            continue
        done.add(id(arrival))
        made = source(arrival) if source is not None else None
        if made is not None and way([made], begins):
            raise PipelineError(
                f"{quoted(place)}: a backward pass, or layers of another rank, come between the inputs and the outputs "
                "of `torch.autograd.grad`. In manual optimization, take gradients before `manual_backward`."
            )
        if made is not None:
            pending += received([made], begins)
        elif not seen:
            layer = f"layer '{arrival.name.unit}'" if arrival.name.unit else "the beginning of the step"
            raise _elsewhere(place, stage, f"{layer} is in stage {arrival.stage}")


def _elsewhere(place: Site, stage: int, what: str) -> PipelineError:
    return PipelineError(
        f"{quoted(place)} in stage {stage}: all layers between the inputs and the outputs of `torch.autograd.grad` "
        f"have to be in one stage, but {what}. When the step was looked at before training, it did not come here. "
        "Name layers in `partition=[...]` so that no stage begins between both ends, or let the first batch come here "
        "too: then they are kept together."
    )


def moment(node: Node) -> int:
    """When a node was made: nodes are numbered in each thread (a private name of torch's)."""
    return node._sequence_nr()  # type: ignore[attr-defined, no-any-return]


def next_moment() -> int:
    """The number of the node that this thread makes next (the same)."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined, no-any-return]


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor | GradientEdge) else list(value)


def _edges(values: list[Any]) -> Iterator[GradientEdge]:
    return (_edge(value) for value in values if _is_followed(value))


def _edge(value: Any) -> GradientEdge:
    with torch._C.DisableTorchFunction():
        return value if isinstance(value, GradientEdge) else get_gradient_edge(value)


def _is_followed(value: Any) -> bool:
    return isinstance(value, GradientEdge) or value.requires_grad


def _is_joined(node: Node) -> bool:
    return getattr(type(node), "_forward_cls", None) is Joined


def _reached(outputs: list[Any], ends: set[tuple[Node, int]] = frozenset()) -> list[Node]:  # type: ignore[assignment]
    """All nodes that a backward pass from outputs comes to, not beyond ``ends``; each after those that it leads to."""
    seen: set[Node] = set()
    order: list[Node] = []
    for edge in _edges(outputs):
        if edge.node in seen or (edge.node, edge.output_nr) in ends:
            continue
        seen.add(edge.node)
        stack = [(edge.node, iter(edge.node.next_functions))]
        while stack:
            node, following = stack[-1]
            for after, number in following:
                if after is not None and after not in seen and (after, number) not in ends:
                    seen.add(after)
                    stack.append((after, iter(after.next_functions)))
                    break
            else:
                stack.pop()
                order.append(node)
    return order
