"""A micro-batch between its forward and its backward, as one stage holds it."""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.pipeline.agreement import Entry
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Receive, Transport
from lightning_lwpm.staging.record import Trace
from lightning_lwpm.staging.remote import Meta, Name
from lightning_lwpm.staging.ways import Joined

__all__ = ["Arrival", "Desk", "Flight", "Item", "Layout", "blank", "count", "join", "proves", "tell"]

Layout = tuple[int, ...] | None
"""The strides of a gradient; ``None`` where there is no gradient."""


@dataclass(frozen=True)
class Item:
    """A micro-batch as the pipeline sees it.

    Attributes:
        serial: Running number, the same on all ranks.
        microbatch: Its number within the batch, for people.
        structure: What the batch is made of, without sizes: the step expected to need the same tensors.
        signature: The same with sizes: the step expected to make tensors of the same shapes.
        grad: Whether a backward pass follows.
        leaf: Fetches a leaf of the batch that this rank was not given.
    """

    serial: int
    microbatch: int
    structure: Hashable
    signature: Hashable
    grad: bool
    leaf: Callable[[int], Tensor]


@dataclass
class Arrival:
    """A tensor of another stage, as a root of this stage's autograd graph."""

    name: Name
    stage: int
    tensor: Tensor
    meta: Meta
    pulled: bool
    gradient: Tensor | None = None
    joined: Tensor | None = None

    def release(self) -> None:
        """Let go of all data: the arrival and its graph hold each other, and whoever keeps the loss keeps both."""
        del self.tensor
        self.gradient = self.joined = None


@dataclass
class Flight:
    """All that a stage holds of one micro-batch between its forward and its backward."""

    item: Item
    known: dict[int, Trace] = field(default_factory=dict)  # by producer, as of this micro-batch
    agreed: dict[int, list[Entry]] = field(default_factory=dict)  # by producer: what it sends unasked
    arrivals: dict[Name, Arrival] = field(default_factory=dict)
    retained: dict[Name, Tensor] = field(default_factory=dict)
    trace: Trace | None = None  # set once the forward has left
    pulls: list[tuple[int, Name]] = field(default_factory=list)
    sent: dict[int, list[Entry]] = field(default_factory=dict)  # by consumer: what it sends a gradient for unasked
    gradients: dict[int, list[Receive]] = field(default_factory=dict)  # by consumer, for each entry of ``sent``
    handed: list[tuple[int, Name, Tensor]] = field(default_factory=list)  # gradients of stages on the same rank
    done: set[int] = field(default_factory=set)


class Desk:
    """What the sending and the receiving side of a stage share.

    Args:
        mailbox: For requests and answers.
        stage: The stage.
        ranks: The rank of each stage.
        here: The desks of all stages of this rank; this one joins them.
    """

    def __init__(self, mailbox: Mailbox, stage: int, ranks: Sequence[int], here: "dict[int, Desk]") -> None:
        self.mailbox, self.stage, self.ranks, self.here = mailbox, stage, list(ranks), here
        self.last = stage == len(ranks) - 1
        self.lock = threading.RLock()
        self.flights: dict[int, Flight] = {}
        self.room = threading.Event()
        here[stage] = self

    def away(self, stages: Iterable[int]) -> list[int]:
        """Those of some stages that are on other ranks."""
        return [stage for stage in stages if self.ranks[stage] != self.mailbox.rank]

    @property
    def final(self) -> bool:
        """Whether this is the latest stage of its rank: what a rank has only once may change in its hands."""
        return self.stage == max(self.here)

    def evaluated(self, serial: int, stage: int) -> None:
        """In evaluation, a later stage is done with a micro-batch; what all are done with is let go of."""
        with self.lock:
            flight = self.flights.get(serial)
            if flight is None:
                return
            flight.done.add(stage)
            if len(flight.done) == len(self.ranks) - 1 - self.stage:
                del self.flights[serial]
                self.room.set()

    # A request names the stage that it is for in its kind, so that each stage of a rank has handlers of its own.

    def handle(self, kind: str, handler: Callable[[int, Any, Any], None]) -> None:
        """Let ``handler(source, key, payload)`` answer the requests of a kind that are for this stage."""
        self.mailbox.handle(f"?{kind} {self.stage}", handler)

    def request(self, stage: int, kind: str, key: Any, payload: Any = None) -> None:
        """Post a request for another stage."""
        self.mailbox.post(self.ranks[stage], f"?{kind} {stage}", key, payload)

    def ask(self, stage: int, kind: str, item: Item, payload: Any, what: str) -> Any:
        """Ask another stage and wait for its answer."""
        key = (item.serial, kind, self.stage)
        self.request(stage, kind, key, payload)
        return self.mailbox.take("answer", (*key, stage), what)

    def answer(self, key: Any, payload: Any) -> None:
        """Answer what a stage has asked.

        An answer passes through the answering thread of who asked, which so learns what both ends must know in the
        order in which it was said.
        """
        self.request(key[2], "answer", (*key, self.stage), payload)

    def says(self, what: str, item: Item, name: Name | None, stage: int) -> str:
        """What is waited for, for people."""
        tensor = f" ({tell(name)})" if name is not None else ""
        return f"the {what}{tensor} of micro-batch {item.microbatch} from stage {stage} (rank {self.ranks[stage]})"


_ticket = torch.empty(0, requires_grad=True)


def join(arrival: Arrival, grad: bool) -> Tensor:
    """The received tensor, joined to the autograd graph where it has a gradient."""
    if arrival.joined is None:
        if arrival.meta.requires_grad and grad:
            with torch.enable_grad():
                arrival.joined = Joined.apply(_ticket, arrival)
        else:
            arrival.joined = arrival.tensor
    return arrival.joined


def count(meta: Meta) -> int:
    """Number of elements."""
    return meta.nbytes // meta.dtype.itemsize


def blank(meta: Meta, device: torch.device, value: float) -> Tensor:
    """A flat tensor to send where there is none: full of ``value``, or of zeros where the type is too narrow for it."""
    real = meta.dtype.is_floating_point or meta.dtype.is_complex
    where = "cpu" if meta.on_host else device
    return torch.full((count(meta),), value if real else 0, dtype=meta.dtype, device=where)


def proves(transport: Transport, entries: Iterable[Entry]) -> bool:
    """Whether these entries, once they are there, prove to their receiver that all was told that came before them."""
    return transport.arrives and any(count(entry.meta) for entry in entries)


def tell(name: Name) -> str:
    """A name, for people."""
    if name.index == 0:
        return f"output {name.leaf} of layer '{name.unit}'" if name.leaf >= 0 else f"an input of layer '{name.unit}'"
    after = f"after layer '{name.unit}'" if name.unit else "before the first layer"
    return f"the result of torch function {name.index} {after}"
