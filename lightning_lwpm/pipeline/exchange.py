"""One stage's dealings with the others: activations in and out, gradients back, and answers to what they ask.

    F of a micro-batch        wait for what was agreed -> run -> send what was agreed -> post receives for gradients
    first touch               ask the producer (it keeps everything until its own backward); agree that it is sent
    another shape than told   tell every later stage and wait until it knows, before anything is sent
    B of a micro-batch        wait for gradients -> run -> send gradients back

A rank answers requests from a thread of its own, at any time: learning never stops the schedule.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.agreement import Agreement, Entry, meta_of
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.transport import Receive, Transport
from lightning_lwpm.pipeline.wire import dense_stride, from_wire, to_wire
from lightning_lwpm.staging.record import Key, Record, Trace
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Exchange", "Item"]


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
class _Arrival:
    """A tensor of another stage, as a root of this stage's autograd graph."""

    name: Name
    stage: int
    tensor: Tensor
    meta: Meta
    pulled: bool
    gradient: Tensor | None = None
    joined: Tensor | None = None


@dataclass
class _Flight:
    """All that a stage holds of one micro-batch between its forward and its backward."""

    item: Item
    arrivals: dict[Name, _Arrival] = field(default_factory=dict)
    retained: dict[Name, Tensor] = field(default_factory=dict)
    trace: Trace | None = None  # set once the forward has left
    pulls: list[tuple[int, Name]] = field(default_factory=list)
    gradients: dict[int, list[tuple[Name, Meta, Receive]]] = field(default_factory=dict)
    without: set[tuple[int, Name]] = field(default_factory=set)
    done: set[int] = field(default_factory=set)


class _Join(torch.autograd.Function):
    """Joins a received tensor to the graph; a plain result, not a leaf, so that it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, arrival: _Arrival) -> Tensor:
        ctx.arrival = arrival
        return arrival.tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.arrival.gradient = gradients[0]
        return None, None


class Exchange:
    """The dealings of one stage.

    Args:
        mailbox: For requests and answers.
        transport: For data.
        stage: This rank's stage.
        ranks: The rank of each stage.
        device: Where tensors of this stage live.
        lookahead: How many micro-batches ahead receives are posted.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        transport: Transport,
        stage: int,
        ranks: Sequence[int],
        device: torch.device,
        lookahead: int = 2,
    ) -> None:
        self.mailbox, self.transport, self.stage, self.ranks = mailbox, transport, stage, list(ranks)
        self.device, self.lookahead = device, lookahead
        self.last = stage == len(ranks) - 1
        self._lock = threading.RLock()
        self._flights: dict[int, _Flight] = {}
        # as producer
        self._traces: dict[Hashable, Trace] = {}
        self._out: dict[int, Agreement] = {t: Agreement() for t in range(stage + 1, len(ranks))}
        self._wanted: dict[tuple[int, Hashable], list[Name]] = defaultdict(list)  # by structure, for new signatures
        self._count = 0
        self._sent_to = -1
        self._waiting: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self._room = threading.Event()
        # as consumer
        self._known: dict[tuple[int, Hashable], Trace] = {}
        self._in: dict[int, Agreement] = {p: Agreement() for p in range(stage)}
        self._posted: dict[int, int] = dict.fromkeys(range(stage), -1)
        self._receives: dict[tuple[int, int], list[tuple[Entry, Receive]]] = {}
        self._ticket = torch.empty(0, requires_grad=True)
        mailbox.handle("?trace", self._on_trace)
        mailbox.handle("?value", self._on_value)
        mailbox.handle("?changed", self._on_changed)
        mailbox.handle("?without", self._on_without)
        mailbox.handle("?forward-done", self._on_forward_done)

    # -- consumer: forward ---------------------------------------------------------------------------------------

    def post(self, items: Sequence[Item]) -> None:
        """Post receives for coming micro-batches as far as their signature is known, in order."""
        for producer in range(self.stage):
            with self._lock:
                for item in items:
                    if item.serial > self._posted[producer] and not self._post(producer, item):
                        break

    def _post(self, producer: int, item: Item) -> bool:
        if (producer, item.signature) not in self._known:
            return False
        self._receives[producer, item.serial] = [
            (entry, self.transport.receive("down", self.ranks[producer], _count(entry.meta), entry.meta.dtype))
            for entry in self._in[producer].active(item.signature, item.serial)
        ]
        self._posted[producer] = item.serial
        return True

    def open(self, item: Item) -> "_Peers":
        """Wait until everything agreed for a micro-batch is here; what its step then asks goes to the result."""
        flight = _Flight(item)
        with self._lock:
            flight = self._flights.setdefault(item.serial, flight)
        for producer in range(self.stage):
            if (producer, item.signature) not in self._known:
                self._learn(producer, item)
            with self._lock:
                if self._posted[producer] < item.serial:
                    self._post(producer, item)
            for entry, receive in self._receives.pop((producer, item.serial)):
                flat = receive.wait(self._says("activation", item, entry.name, producer))
                with self._lock:
                    told = meta_of(self._known[producer, item.signature], entry.name)
                if told == entry.meta:  # otherwise it changed meanwhile: what came is no data
                    tensor = from_wire(flat, entry.meta, self.device)
                    flight.arrivals[entry.name] = _Arrival(entry.name, producer, tensor, entry.meta, pulled=False)
        return _Peers(self, flight)

    def _learn(self, producer: int, item: Item) -> None:
        """Ask a producer what its calls returned, and what it sends unasked."""
        what = f"the shapes of stage {producer} (rank {self.ranks[producer]}) for micro-batch {item.microbatch}"
        trace, entries = self._ask(producer, "trace", item, (item.structure, item.signature), what)
        with self._lock:
            self._known.setdefault((producer, item.signature), {}).update(trace)
            if item.signature not in self._in[producer].entries:
                self._in[producer].entries[item.signature] = list(entries)

    def record(self, flight: _Flight, stage: int, key: Key) -> Record:
        """What a call of an earlier stage returned."""
        known = self._known.get((stage, flight.item.signature))
        record = known.get(key) if known is not None else None
        if record is None:
            self._learn(stage, flight.item)
            record = self._known[stage, flight.item.signature].get(key)
        if record is None:
            layer, occurrence, index = key
            place = f"torch function {index} after layer '{layer}'" if index else f"layer '{layer}'"
            raise PipelineError(
                f"{place} (call {occurrence}) ran on stage {self.stage} but not on stage {stage}: the step took another "
                "path on different ranks. It may depend on the rank, on a random number that is not drawn with `random`, "
                "`numpy.random` or `torch`, or on state that only one rank has."
            )
        return record

    def value(self, flight: _Flight, remote: Remote) -> Tensor:
        """The data of a remote tensor, joined to the autograd graph."""
        if remote.stage < 0:
            return flight.item.leaf(remote.label.leaf)
        arrival = flight.arrivals.get(remote.label)
        if arrival is None:
            arrival = self._pull(flight, remote.label, remote.stage)
        if arrival.joined is None:
            if arrival.meta.requires_grad and flight.item.grad:
                with torch.enable_grad():
                    arrival.joined = _Join.apply(self._ticket, arrival)
            else:
                arrival.joined = arrival.tensor
        return arrival.joined

    def _pull(self, flight: _Flight, name: Name, producer: int) -> _Arrival:
        item = flight.item
        with self._lock:
            posted = self._posted[producer]
        what = self._says("activation", item, name, producer)
        tensor, meta, entry = self._ask(producer, "value", item, (name, posted), what)
        if tensor is None:
            raise PipelineError(
                f"{_tell(name)} is needed by stage {self.stage} but was not made by stage {producer} for micro-batch "
                f"{item.microbatch}: the step took another path on different ranks"
            )
        with self._lock:
            if entry is not None:
                self._in[producer].add(item.signature, entry)
        tensor = from_wire(tensor, meta, self.device)
        arrival = flight.arrivals[name] = _Arrival(name, producer, tensor, meta, pulled=True)
        return arrival

    # -- producer: forward ---------------------------------------------------------------------------------------

    def wait_for_room(self, item: Item, window: int) -> None:
        """In evaluation, do not run further ahead of the last stage than ``window`` micro-batches."""
        while not self.last:
            with self._lock:
                if len(self._flights) < window:
                    return
                self._room.clear()
            self.mailbox.wait(self._room, f"later stages, which are over {window} batches behind stage {self.stage}")

    def publish(self, item: Item, step: StagedStep) -> None:
        """The forward has left: send what was agreed, answer who has asked early."""
        flight = self._flights[item.serial]
        if not self.last:
            self._announce(item, step.trace)
            with self._lock:
                self._enlist(item)
                flight.retained, flight.trace = step.retained, step.trace
                sending = {t: agreement.active(item.signature, item.serial) for t, agreement in self._out.items()}
                self._sent_to = item.serial
                waiting = self._waiting.pop(item.serial, [])
            for consumer, entries in sending.items():
                for entry in entries:
                    tensor = step.retained.get(entry.name)
                    if tensor is None or Meta.of(tensor) != entry.meta:
                        flat = torch.full((_count(entry.meta),), _poison(entry.meta.dtype), dtype=entry.meta.dtype)
                    else:
                        flat = to_wire(tensor)
                    self.transport.send("down", self.ranks[consumer], flat)
                if item.grad:
                    flight.gradients[consumer] = [
                        (
                            e.name,
                            e.meta,
                            self.transport.receive("up", self.ranks[consumer], _count(e.meta), e.meta.dtype),
                        )
                        for e in entries
                        if e.meta.requires_grad
                    ]
            for answer in waiting:
                answer()
        if not item.grad:
            for producer in range(self.stage):
                self.mailbox.post(self.ranks[producer], "?forward-done", item.serial, self.stage)
            if self.last:
                self._flights.pop(item.serial)

    def _announce(self, item: Item, trace: Trace) -> None:
        """Merge this micro-batch's records into what others know; where one changed, tell them before going on."""
        with self._lock:
            known = self._traces.setdefault(item.signature, {})
            changed = {key: record for key, record in trace.items() if key in known and known[key] != record}
            known.update(trace)
        if not changed:
            return
        for consumer, agreement in self._out.items():
            what = f"stage {consumer} (rank {self.ranks[consumer]}) to learn that shapes of stage {self.stage} changed"
            posted = self._ask(consumer, "changed", item, (self.stage, item.signature, changed), what)
            with self._lock:
                agreement.change(item.signature, changed, max(posted, item.serial - 1))

    def _enlist(self, item: Item) -> None:
        """At a new signature, begin with what the same structure of batch has needed before."""
        for consumer, agreement in self._out.items():
            if item.signature in agreement.entries:
                continue
            agreement.entries[item.signature] = []
            for name in self._wanted[consumer, item.structure]:
                meta = meta_of(self._traces[item.signature], name)
                if meta is not None:
                    self._count += 1
                    agreement.add(item.signature, Entry(self._count, name, meta, item.serial))

    # -- backward ------------------------------------------------------------------------------------------------

    def gradients(self, item: Item) -> tuple[list[Tensor], list[Tensor]]:
        """Wait for the gradients of a micro-batch: the tensors they belong to, and the gradients.

        Contributions of several stages are added in the order in which one device would meet them: latest first.
        """
        flight = self._flights[item.serial]
        after = self.stage + 1
        if not flight.gradients.get(after):
            # nothing was agreed with the next stage: only its word tells that no request is still to come
            self.mailbox.take("backward-done", item.serial, self._says("end of backward", item, None, after))
        sums: dict[Name, Tensor] = {}
        arrived: dict[int, list[tuple[Name, Tensor | None]]] = defaultdict(list)
        for consumer in sorted(flight.gradients, key=lambda stage: stage != after):
            for name, meta, receive in flight.gradients[consumer]:
                flat = receive.wait(self._says("gradient", item, name, consumer))
                if (consumer, name) not in flight.without:
                    arrived[consumer].append((name, from_wire(flat, meta, self.device)))
        for consumer, name in flight.pulls:
            what = self._says("gradient", item, name, consumer)
            gradient = self.mailbox.take("gradient", (item.serial, name, consumer), what)
            if gradient is not None:
                arrived[consumer].append((name, from_wire(gradient, Meta.of(flight.retained[name]), self.device)))
        for consumer in sorted(arrived, reverse=True):
            for name, gradient in arrived[consumer]:
                assert gradient is not None
                sums[name] = sums[name] + gradient if name in sums else gradient
        return [flight.retained[name] for name in sums], list(sums.values())

    def return_gradients(self, item: Item) -> None:
        """Send the gradients of what was received to its producers, and let go of the micro-batch."""
        flight = self._flights[item.serial]
        for producer in reversed(range(self.stage)):
            agreed = [e for e in self._sent(producer, item) if e.meta.requires_grad]
            missing = [
                e.name for e in agreed if (a := flight.arrivals.get(e.name)) is None or a.pulled or a.gradient is None
            ]
            if missing:
                what = f"stage {producer} (rank {self.ranks[producer]}) to learn that some gradients are none"
                self._ask(producer, "without", item, (self.stage, missing), what)
            for entry in agreed:
                arrival = flight.arrivals.get(entry.name)
                if entry.name in missing or arrival is None or arrival.gradient is None:
                    flat = torch.zeros(_count(entry.meta), dtype=entry.meta.dtype)
                else:
                    flat = to_wire(_like(arrival.gradient, entry.meta))
                self.transport.send("up", self.ranks[producer], flat)
            for arrival in flight.arrivals.values():
                if arrival.pulled and arrival.stage == producer and arrival.meta.requires_grad:
                    gradient = None if arrival.gradient is None else to_wire(_like(arrival.gradient, arrival.meta))
                    self.mailbox.post(
                        self.ranks[producer], "gradient", (item.serial, arrival.name, self.stage), gradient
                    )
            if producer == self.stage - 1 and not agreed:
                self.mailbox.post(self.ranks[producer], "backward-done", item.serial)
        with self._lock:
            del self._flights[item.serial]

    def _sent(self, producer: int, item: Item) -> list[Entry]:
        with self._lock:
            return self._in[producer].active(item.signature, item.serial)

    # -- answers, from the reading threads -----------------------------------------------------------------------

    def _ask(self, stage: int, kind: str, item: Item, payload: Any, what: str) -> Any:
        key = (item.serial, kind, self.stage)
        self.mailbox.post(self.ranks[stage], f"?{kind}", key, payload)
        return self.mailbox.take("answer", (*key, stage), what)

    def _answer(self, source: int, key: Any, payload: Any) -> None:
        self.mailbox.post(source, "answer", (*key, self.stage), payload)

    def _when_left(self, serial: int, answer: Callable[[], None]) -> None:
        """Answer now, or once the forward of this micro-batch has left."""
        with self._lock:
            flight = self._flights.get(serial)
            if (flight is None or flight.trace is None) and serial > self._sent_to:
                self._waiting[serial].append(answer)
                return
        answer()

    def _on_trace(self, source: int, key: Any, payload: Any) -> None:
        serial, _, consumer = key
        _, signature = payload

        def answer() -> None:
            with self._lock:
                reply = dict(self._traces[signature]), list(self._out[consumer].entries[signature])
            self._answer(source, key, reply)

        self._when_left(serial, answer)

    def _on_value(self, source: int, key: Any, payload: Any) -> None:
        serial, _, consumer = key
        name, posted = payload

        def answer() -> None:
            with self._lock:
                flight = self._flights.get(serial)
                tensor = flight.retained.get(name) if flight is not None else None
                if flight is None or tensor is None:
                    return self._answer(source, key, (None, None, None))
                item, meta, entry = flight.item, Meta.of(tensor), None
                if not self._out[consumer].has(item.signature, name):
                    self._count += 1
                    entry = Entry(self._count, name, meta, max(self._sent_to, posted) + 1)
                    self._out[consumer].add(item.signature, entry)
                    if name not in self._wanted[consumer, item.structure]:
                        self._wanted[consumer, item.structure].append(name)
                if item.grad and meta.requires_grad:
                    flight.pulls.append((consumer, name))
                flat = to_wire(tensor)
            return self._answer(source, key, (flat, meta, entry))

        self._when_left(serial, answer)

    def _on_changed(self, source: int, key: Any, payload: Any) -> None:
        serial, _, _ = key
        producer, signature, changed = payload
        with self._lock:
            self._known.setdefault((producer, signature), {}).update(changed)
            posted = self._posted[producer]
            self._in[producer].change(signature, changed, max(posted, serial - 1))
        self.mailbox.post(source, "answer", (*key, self.stage), posted)

    def _on_without(self, source: int, key: Any, payload: Any) -> None:
        serial, _, _ = key
        consumer, names = payload
        with self._lock:
            self._flights[serial].without.update((consumer, name) for name in names)
        self._answer(source, key, None)

    def _on_forward_done(self, source: int, serial: int, stage: int) -> None:
        with self._lock:
            flight = self._flights.get(serial)
            if flight is None:
                return
            flight.done.add(stage)
            if len(flight.done) == len(self.ranks) - 1 - self.stage:
                del self._flights[serial]
                self._room.set()

    def _says(self, what: str, item: Item, name: Name | None, stage: int) -> str:
        tensor = f" {_tell(name)}" if name is not None else ""
        return f"{what}{tensor} of micro-batch {item.microbatch} from stage {stage} (rank {self.ranks[stage]})"


class _Peers:
    """The exchange, for the step of one micro-batch."""

    def __init__(self, exchange: Exchange, flight: _Flight) -> None:
        self.exchange, self.flight = exchange, flight

    def record(self, stage: int, key: Key) -> Record:
        """See :meth:`Exchange.record`."""
        return self.exchange.record(self.flight, stage, key)

    def value(self, remote: Remote) -> Tensor:
        """See :meth:`Exchange.value`."""
        return self.exchange.value(self.flight, remote)


def _count(meta: Meta) -> int:
    return meta.nbytes // meta.dtype.itemsize


def _like(gradient: Tensor, meta: Meta) -> Tensor:
    """The gradient in the memory layout of its tensor, so that no shape has to be sent."""
    if gradient.stride() == meta.stride and gradient.layout is torch.strided:
        return gradient
    return torch.empty_strided(meta.shape, dense_stride(meta), dtype=meta.dtype, device=gradient.device).copy_(gradient)


def _tell(name: Name) -> str:
    if name.index == 0:
        return f"output {name.leaf} of layer '{name.unit}'" if name.leaf >= 0 else f"an input of layer '{name.unit}'"
    after = f"after layer '{name.unit}'" if name.unit else "before the first layer"
    return f"the result of torch function {name.index} {after}"


def _poison(dtype: torch.dtype) -> float | int | bool:
    return float("nan") if dtype.is_floating_point or dtype.is_complex else 0
