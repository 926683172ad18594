"""The receiving side of a stage: activations in, gradients back.

before F    wait for what was agreed with each earlier stage, and for its word where nothing was or arrivals are unseen
in F        first touch: ask the producer (it keeps everything until its own backward); agree that it is sent
after B     send the gradients of what was used, in the layout that the producer has been told

An earlier stage of the same rank has left its forward on this very thread: its tensors are passed on as they are,
detached, and their gradients handed back.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.agreement import Agreement, Entry, meta_of
from lightning_lwpm.pipeline.flight import Arrival, Desk, Flight, Item, Layout, blank, count, join, proves, tell
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.transport import Receive, Transport
from lightning_lwpm.pipeline.wire import dense_stride, from_wire, to_wire
from lightning_lwpm.staging.record import Key, Record, Trace
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.tree import duplicate

__all__ = ["Inbox", "Peers"]


@dataclass
class _Known:
    """What an earlier stage has told of its calls, for one signature of the batch."""

    trace: Trace = field(default_factory=dict)
    learned: bool = False
    unheard: tuple[Any, ...] | None = None  # the latest change told before that which it changes
    changes: list[tuple[int, Trace]] = field(default_factory=list)  # told early: each counts from a serial number on

    def advance(self, serial: int) -> Trace:
        """All records as they are for micro-batch ``serial``; forwards run in ascending order."""
        while self.changes and self.changes[0][0] <= serial:
            self.trace = {**self.trace, **self.changes.pop(0)[1]}
        return self.trace


class Inbox:
    """The receiving side of one stage.

    Args:
        desk: Shared with the sending side.
        transport: For data.
        postings: The order of receives.
        device: Where tensors of this stage live.
    """

    def __init__(self, desk: Desk, transport: Transport, postings: Postings, device: torch.device) -> None:
        self.desk, self.transport, self.postings, self.device = desk, transport, postings, device
        self.producers = desk.away(range(desk.stage))
        self._known: dict[tuple[int, Hashable], _Known] = defaultdict(_Known)
        self._agreed = {producer: Agreement() for producer in self.producers}
        self._posted = dict.fromkeys(self.producers, -1)
        self._receives: dict[tuple[int, int], list[tuple[Entry, Receive]]] = {}
        self._told: dict[tuple[int, Hashable, Name], Layout] = {}
        desk.handle("changed", self._on_changed)
        desk.handle("answer", self._on_answer)

    # -- forward -------------------------------------------------------------------------------------------------

    def post(self, producer: int, item: Item, learn: bool) -> bool:
        """Post the receives of a micro-batch from a producer.

        Args:
            producer: The stage that sends.
            item: The micro-batch.
            learn: Whether to wait, at a new signature, for word of what is sent.

        Returns:
            Whether it is known what is sent.
        """
        if not self._known[producer, item.signature].learned:
            if not learn:
                return False
            self._learn(producer, item)
        rank = self.desk.ranks[producer]
        with self.desk.lock:
            self._receives[producer, item.serial] = [
                (entry, self.transport.receive(rank, count(entry.meta), entry.meta.dtype, entry.meta.on_host))
                for entry in self._agreed[producer].active(item.signature, item.serial)
            ]
            self._posted[producer] = item.serial
        return True

    def _has_posted(self, producer: int, item: Item) -> bool:
        return self._posted[producer] >= item.serial

    def open(self, item: Item) -> "Peers":
        """Wait until everything agreed for a micro-batch is here; what its step then asks goes to the result."""
        with self.desk.lock:
            flight = self.desk.flights.setdefault(item.serial, Flight(item))
        for producer in self.producers:
            self.postings.until(self.desk.ranks[producer], partial(self._has_posted, producer, item))
        receives = {producer: self._receives.pop((producer, item.serial)) for producer in self.producers}
        flats = {producer: self._wait(producer, item, receives[producer]) for producer in self.producers}
        # now all earlier stages have left their forward, and told what has changed in it
        for producer in self.producers:
            with self.desk.lock:
                known = flight.known[producer] = self._known[producer, item.signature].advance(item.serial)
            flight.agreed[producer] = [entry for entry, _ in receives[producer]]
            for (entry, _), flat in zip(receives[producer], flats[producer], strict=True):
                if meta_of(known, entry.name) == entry.meta:  # otherwise it changed meanwhile: what came is no data
                    tensor = from_wire(flat, entry.meta, self.device)
                    flight.arrivals[entry.name] = Arrival(entry.name, producer, tensor, entry.meta, pulled=False)
        for stage, desk in self.desk.here.items():
            if stage < self.desk.stage:
                trace = desk.flights[item.serial].trace
                assert trace is not None
                flight.known[stage] = trace
        return Peers(self, flight)

    def drop(self, producer: int, item: Item) -> None:
        """Wait until everything agreed with a producer for a micro-batch is here, and let go of it."""
        self.postings.until(self.desk.ranks[producer], partial(self._has_posted, producer, item))
        self._wait(producer, item, self._receives.pop((producer, item.serial)))

    def _wait(self, producer: int, item: Item, receives: list[tuple[Entry, Receive]]) -> list[Tensor]:
        if producer == self.desk.stage - 1 and not proves(self.transport, (entry for entry, _ in receives)):
            # no data proves that the stage before has left its forward: it says so
            what = self.desk.says("end of forward", item, None, producer)
            self.desk.mailbox.take("forward-left", (item.serial, self.desk.stage), what)
        return [r.wait(partial(self.desk.says, "activation", item, e.name, producer)) for e, r in receives]

    def _learn(self, producer: int, item: Item) -> None:
        """Ask a producer what its calls returned, and what it sends unasked."""
        desk = self.desk
        what = f"the shapes of stage {producer} (rank {desk.ranks[producer]}) for micro-batch {item.microbatch}"
        desk.ask(producer, "trace", item, item.signature, what)

    def record(self, flight: Flight, stage: int, key: Key) -> Record:
        """What a call of an earlier stage returned."""
        record = flight.known[stage].get(key)
        if record is None and stage not in self.desk.here:
            self._learn(stage, flight.item)
            with self.desk.lock:
                flight.known[stage] = self._known[stage, flight.item.signature].advance(flight.item.serial)
            record = flight.known[stage].get(key)
        if record is None:
            layer, occurrence, index = key
            place = f"torch function {index} after layer '{layer}'" if index else f"layer '{layer}'"
            raise PipelineError(
                f"{place} (call {occurrence}) ran on stage {self.desk.stage} but not on stage {stage}: the step took "
                "another path on different ranks. It may depend on the rank, on a random number that is not drawn "
                "with `random`, `numpy.random` or `torch`, or on state that only one rank has. With "
                "schedule='sequential' every rank runs the whole step, so that all have that state."
            )
        return record

    def value(self, flight: Flight, remote: Remote) -> Tensor:
        """The data of a remote tensor, joined to the autograd graph."""
        if remote.stage < 0:
            leaf = flight.item.leaf(remote.label.leaf)
            return leaf if self.desk.final else duplicate(leaf)  # the step may change it in place
        arrival = flight.arrivals.get(remote.label)
        if arrival is None:
            get = self._pass if remote.stage in self.desk.here else self._pull
            arrival = flight.arrivals[remote.label] = get(flight, remote.label, remote.stage)
        return join(arrival, flight.item.grad or torch.is_grad_enabled())  # the step itself may take gradients

    def _pass(self, flight: Flight, name: Name, producer: int) -> Arrival:
        """A tensor of a stage of this rank: not a copy, so that a change in place is noticed as on one device."""
        tensor = self.desk.here[producer].flights[flight.item.serial].retained.get(name)
        if tensor is None:
            raise self._missing(flight, name, producer)
        return Arrival(name, producer, tensor.detach(), Meta.of(tensor), pulled=False)

    def _pull(self, flight: Flight, name: Name, producer: int) -> Arrival:
        item = flight.item
        with self.desk.lock:
            posted = self._posted[producer]
        what = self.desk.says("activation", item, name, producer)
        flat, meta = self.desk.ask(producer, "value", item, (name, posted), what)
        if flat is None:
            raise self._missing(flight, name, producer)
        return Arrival(name, producer, from_wire(flat, meta, self.device), meta, pulled=True)

    def _missing(self, flight: Flight, name: Name, producer: int) -> PipelineError:
        what = f"{tell(name)} is needed by stage {self.desk.stage} but was"
        if meta_of(flight.known[producer], name) is None:
            return PipelineError(
                f"{what} not made by stage {producer} for micro-batch {flight.item.microbatch}: the step took another "
                "path on different ranks"
            )
        return PipelineError(
            f"{what} let go by stage {producer}, where the step does not refer to it any more: code that only one rank "
            "runs (`if self.trainer.is_global_zero: ...`) looks at it. Keep it in a variable until the last layer has "
            "run, and look at it there."
        )

    # -- backward ------------------------------------------------------------------------------------------------

    def return_gradients(self, flight: Flight) -> None:
        """Send the gradients of what was received to its producers, in the order of the stages."""
        item, desk = flight.item, self.desk
        for arrival in flight.arrivals.values():
            if arrival.stage in desk.here and arrival.gradient is not None:
                handed = desk.here[arrival.stage].flights[item.serial].handed
                handed.append((desk.stage, arrival.name, arrival.gradient))
        for producer in self.producers:
            rank = desk.ranks[producer]
            agreed = [entry for entry in flight.agreed[producer] if entry.meta.requires_grad]
            gradients = {entry.name: self._gradient(flight, entry.name) for entry in agreed}
            self._tell_layouts(producer, flight, agreed, gradients)
            for entry in agreed:
                gradient = gradients[entry.name]
                self.transport.send(rank, blank(entry.meta, self.device, 0) if gradient is None else to_wire(gradient))
            for arrival in flight.arrivals.values():
                if arrival.pulled and arrival.stage == producer and arrival.meta.requires_grad:
                    gradient = arrival.gradient
                    payload = None if gradient is None else (to_wire(gradient), gradient.stride())
                    desk.mailbox.post(rank, "gradient", (item.serial, arrival.name, desk.stage), payload)
            if producer == desk.stage - 1 and not proves(self.transport, agreed):
                desk.mailbox.post(rank, "backward-done", (item.serial, producer))
        for arrival in flight.arrivals.values():
            arrival.release()

    def _gradient(self, flight: Flight, name: Name) -> Tensor | None:
        arrival = flight.arrivals.get(name)
        return None if arrival is None or arrival.pulled else arrival.gradient

    def _tell_layouts(
        self, producer: int, flight: Flight, agreed: list[Entry], gradients: dict[Name, Tensor | None]
    ) -> None:
        """Tell of gradients that are none, or laid out in memory in another way than before."""
        item, news = flight.item, {}
        for entry in agreed:
            key = (producer, item.signature, entry.name)
            gradient = gradients[entry.name]
            layout: Layout = None if gradient is None else gradient.stride()
            if self._told.get(key, dense_stride(entry.meta)) != layout:
                self._told[key] = news[entry.name] = layout
        if news:
            what = f"stage {producer} (rank {self.desk.ranks[producer]}) to learn how some gradients are laid out"
            self.desk.ask(producer, "layouts", item, (item.signature, news), what)

    # -- answers, from the answering thread ----------------------------------------------------------------------

    def _on_changed(self, source: int, key: Any, payload: Any) -> None:
        serial, _, _ = key
        producer, signature, changed, number = payload
        with self.desk.lock:
            known, posted = self._known[producer, signature], self._posted[producer]
            known.changes.append((serial, changed))
            change = (signature, changed, number, max(posted, serial - 1), posted)
            if known.learned:
                self._agreed[producer].change(*change)
            else:
                known.unheard = change
        self.desk.answer(key, posted)

    def _on_answer(self, source: int, key: Any, payload: Any) -> None:
        serial, kind, _, producer = key
        with self.desk.lock:
            if kind == "trace":
                signature, trace, entries = payload
                known = self._known[producer, signature]
                known.trace = {**known.trace, **trace}
                known.changes = [change for change in known.changes if change[0] > serial]
                if not known.learned:
                    known.learned = True
                    self._agreed[producer].entries[signature] = entries
                    if known.unheard is not None:  # all but the latest were in what is told, and to make it twice
                        self._agreed[producer].change(*known.unheard)  # is to make it once
                payload = None
            elif kind == "value":
                *payload, signature, entry = payload
                if entry is not None:
                    self._agreed[producer].add(signature, entry)
        self.desk.mailbox.post(self.desk.mailbox.rank, "answer", key, payload)


class Peers:
    """The inbox, for the step of one micro-batch."""

    def __init__(self, inbox: Inbox, flight: Flight) -> None:
        self.inbox, self.flight = inbox, flight

    def record(self, stage: int, key: Key) -> Record:
        """See :meth:`Inbox.record`."""
        return self.inbox.record(self.flight, stage, key)

    def value(self, remote: Remote) -> Tensor:
        """See :meth:`Inbox.value`."""
        return self.inbox.value(self.flight, remote)
