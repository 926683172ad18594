"""The sending side of a stage: activations out, gradients in, and answers to what later stages ask.

after F     tell every later stage which shapes changed and wait until it knows; send what was agreed
before B    wait for the gradients of what was sent, add them up
any time    answer later stages, from a thread of its own: learning never stops the schedule
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.pipeline.agreement import Agreement, Entry, meta_of
from lightning_lwpm.pipeline.flight import Desk, Flight, Item, Layout, blank, count, proves
from lightning_lwpm.pipeline.postings import Postings
from lightning_lwpm.pipeline.transport import Transport
from lightning_lwpm.pipeline.wire import dense_stride, from_wire, to_wire
from lightning_lwpm.staging.record import Trace
from lightning_lwpm.staging.remote import Meta, Name
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Outbox"]


class Outbox:
    """The sending side of one stage.

    Args:
        desk: Shared with the receiving side.
        transport: For data.
        postings: The order of receives.
        device: Where tensors of this stage live.
    """

    def __init__(self, desk: Desk, transport: Transport, postings: Postings, device: torch.device) -> None:
        self.desk, self.transport, self.postings, self.device = desk, transport, postings, device
        self._traces: dict[Hashable, Trace] = {}
        self._agreed = {consumer: Agreement() for consumer in desk.away(range(desk.stage + 1, len(desk.ranks)))}
        self._wanted: dict[tuple[int, Hashable], list[Name]] = defaultdict(list)  # by structure, for new signatures
        self._layouts: dict[tuple[int, Hashable, Name], list[tuple[int, Layout]]] = {}
        self._count = 0
        self._sent_to = -1
        self._waiting: dict[int, list[Callable[[], None]]] = defaultdict(list)
        desk.handle("trace", self._on_trace)
        desk.handle("value", self._on_value)
        desk.handle("layouts", self._on_layouts)
        desk.handle("forward-done", lambda source, serial, stage: desk.evaluated(serial, stage))

    # -- forward -------------------------------------------------------------------------------------------------

    def wait_for_room(self, window: int) -> None:
        """Do not run further ahead of the last stage than ``window`` micro-batches."""
        desk = self.desk
        while not desk.last:
            with desk.lock:
                oldest = desk.flights[min(desk.flights)] if desk.flights else None
                # a later stage of this very rank has its turn in the table; to wait for it would be for ever
                own = {stage for stage in desk.here if stage > desk.stage}
                if len(desk.flights) < window or (oldest is not None and own - oldest.done):
                    return
                desk.room.clear()
            desk.mailbox.wait(
                desk.room.wait, f"later stages, which are over {window} batches behind stage {desk.stage}"
            )

    def publish(self, flight: Flight, step: StagedStep) -> None:
        """The forward has left: send what was agreed, answer who has asked early."""
        item = flight.item
        self._announce(item, step.trace)
        with self.desk.lock:
            self._enlist(item)
            flight.retained, flight.trace = step.reach.tensors, step.trace
            sending = {t: agreement.active(item.signature, item.serial) for t, agreement in self._agreed.items()}
            self._sent_to = item.serial
            waiting = self._waiting.pop(item.serial, [])
        for consumer, entries in sending.items():
            rank = self.desk.ranks[consumer]
            for entry in entries:
                tensor = flight.retained.get(entry.name)
                # its gradient may have been asked for since it was made: then it is where a graph begins
                if tensor is not None and entry.meta in (meta := Meta.of(tensor), meta._replace(requires_grad=False)):
                    self.transport.send(rank, to_wire(tensor))
                else:  # nonsense that hurts if used: this micro-batch made no such tensor
                    self.transport.send(rank, blank(entry.meta, self.device, float("nan")))
            if consumer == self.desk.stage + 1 and not proves(self.transport, entries):
                self.desk.mailbox.post(rank, "forward-left", (item.serial, consumer))
            if item.grad:
                flight.sent[consumer] = [entry for entry in entries if entry.meta.requires_grad]
        for answer in waiting:
            answer()

    def _announce(self, item: Item, trace: Trace) -> None:
        """Merge this micro-batch's records into what others know; where one changed, tell them before going on."""
        with self.desk.lock:
            known = self._traces.setdefault(item.signature, {})
            changed = {key: record for key, record in trace.items() if key in known and known[key] != record}
            known.update(trace)
            number = self._count  # entries made from here on know the new shapes
        if not changed:
            return
        for consumer, agreement in self._agreed.items():
            rank = self.desk.ranks[consumer]
            what = f"stage {consumer} (rank {rank}) to learn that shapes of stage {self.desk.stage} changed"
            news = (self.desk.stage, item.signature, changed, number)
            posted = self.desk.ask(consumer, "changed", item, news, what)
            with self.desk.lock:
                # not forgotten before it is posted: what the consumer has still to learn was sent long ago at times
                past = min(posted, item.serial - 1)
                agreement.change(item.signature, changed, number, max(posted, item.serial - 1), past)

    def _enlist(self, item: Item) -> None:
        """At a new signature, begin with what the same structure of batch has needed before."""
        for consumer, agreement in self._agreed.items():
            if item.signature in agreement.entries:
                continue
            agreement.entries[item.signature] = []
            for name in self._wanted[consumer, item.structure]:
                meta = meta_of(self._traces[item.signature], name)
                if meta is not None:
                    self._count += 1
                    agreement.add(item.signature, Entry(self._count, name, meta, item.serial))

    # -- backward ------------------------------------------------------------------------------------------------

    def post(self, consumer: int, item: Item) -> bool:
        """Post the receives of a micro-batch's gradients from a consumer; ``False`` before its forward has left."""
        flight = self.desk.flights.get(item.serial)
        if flight is None or consumer not in flight.sent:
            return False
        rank = self.desk.ranks[consumer]
        flight.gradients[consumer] = [
            self.transport.receive(rank, count(entry.meta), entry.meta.dtype, entry.meta.on_host)
            for entry in flight.sent[consumer]
        ]
        return True

    def gradients(self, flight: Flight) -> tuple[list[Tensor], list[Tensor]]:
        """Wait for the gradients of a micro-batch: the tensors they belong to, and the gradients.

        Contributions of several stages are added in the order in which one device would meet them: latest first.
        """
        item, desk, after = flight.item, self.desk, self.desk.stage + 1
        for consumer in flight.sent:
            self.postings.until(desk.ranks[consumer], partial(flight.gradients.__contains__, consumer))
        if after in flight.sent and not proves(self.transport, flight.sent[after]):
            # no data comes that this rank sees: only the next stage's word tells that no request is still to come
            desk.mailbox.take(
                "backward-done", (item.serial, desk.stage), desk.says("end of backward", item, None, after)
            )
        arrived: dict[int, list[tuple[Name, Tensor]]] = defaultdict(list)
        for consumer, name, gradient in flight.handed:
            arrived[consumer].append((name, gradient))
        for consumer in sorted(flight.sent, key=lambda stage: stage != after):
            receives = zip(flight.sent[consumer], flight.gradients[consumer], strict=True)
            flats = [
                receive.wait(partial(desk.says, "gradient", item, entry.name, consumer)) for entry, receive in receives
            ]
            # only data that has come, or that word, proves that all has been told of it, so first wait for all
            for entry, flat in zip(flight.sent[consumer], flats, strict=True):
                name, meta = entry.name, entry.meta
                layout = self._layout(consumer, item, name, meta)
                if layout is not None:
                    arrived[consumer].append((name, from_wire(flat, meta._replace(stride=layout), self.device)))
        for consumer, name in flight.pulls:
            what = desk.says("gradient", item, name, consumer)
            answer = desk.mailbox.take("gradient", (item.serial, name, consumer), what)
            if answer is not None:
                meta = Meta.of(flight.retained[name])._replace(stride=answer[1])
                arrived[consumer].append((name, from_wire(answer[0], meta, self.device)))
        sums: dict[Name, Tensor] = {}
        for consumer in sorted(arrived, reverse=True):
            for name, gradient in arrived[consumer]:
                sums[name] = sums[name] + gradient if name in sums else gradient
        return [flight.retained[name] for name in sums], list(sums.values())

    def _layout(self, consumer: int, item: Item, name: Name, meta: Meta) -> Layout:
        """How a gradient is laid out, as last told for a micro-batch up to this one; backwards run in order."""
        with self.desk.lock:
            told = self._layouts.get((consumer, item.signature, name), [])
            while len(told) > 1 and told[1][0] <= item.serial:
                told.pop(0)
            return told[0][1] if told and told[0][0] <= item.serial else dense_stride(meta)

    # -- answers, from the answering thread ----------------------------------------------------------------------

    def _when_left(self, serial: int, answer: Callable[[], None]) -> None:
        """Answer now, or once the forward of this micro-batch has left."""
        with self.desk.lock:
            flight = self.desk.flights.get(serial)
            if (flight is None or flight.trace is None) and serial > self._sent_to:
                self._waiting[serial].append(answer)
                return
        answer()

    def _on_trace(self, source: int, key: Any, signature: Any) -> None:
        serial, _, consumer = key

        def answer() -> None:
            with self.desk.lock:
                flight = self.desk.flights.get(serial)
                # this stage may be ahead: what has changed since is told as a change
                trace = self._traces[signature] if flight is None or flight.trace is None else flight.trace
                self.desk.answer(key, (signature, trace, list(self._agreed[consumer].entries[signature])))

        self._when_left(serial, answer)

    def _on_value(self, source: int, key: Any, payload: Any) -> None:
        serial, _, consumer = key
        name, posted = payload

        def answer() -> None:
            with self.desk.lock:
                flight = self.desk.flights.get(serial)
                tensor = flight.retained.get(name) if flight is not None else None
                if flight is None or tensor is None:
                    return self.desk.answer(key, (None, None, None, None))
                meta, signature = Meta.of(tensor), flight.item.signature
                latest = meta_of(self._traces[signature], name) or meta
                entry = self._agree(consumer, flight.item, name, latest, posted)
                if flight.item.grad and meta.requires_grad:
                    flight.pulls.append((consumer, name))
                return self.desk.answer(key, (to_wire(tensor), meta, signature, entry))

        self._when_left(serial, answer)

    def _agree(self, consumer: int, item: Item, name: Name, meta: Meta, posted: int) -> Entry | None:
        """An entry for what a consumer had to ask for, unless it has one or never keeps its shape."""
        if not self._agreed[consumer].welcomes(item.signature, name):
            return None
        self._count += 1
        entry = Entry(self._count, name, meta, max(self._sent_to, posted) + 1)
        self._agreed[consumer].add(item.signature, entry)
        if name not in self._wanted[consumer, item.structure]:
            self._wanted[consumer, item.structure].append(name)
        return entry

    def _on_layouts(self, source: int, key: Any, payload: Any) -> None:
        serial, _, consumer = key
        signature, news = payload
        with self.desk.lock:
            for name, layout in news.items():
                self._layouts.setdefault((consumer, signature, name), []).append((serial, layout))
        self.desk.answer(key, None)
