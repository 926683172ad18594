"""Who sends what to whom unasked: learned from the first requests, the same list at both ends.

A consumer that touches a remote tensor for the first time asks for it; from a micro-batch on that both ends know,
the producer sends it unasked. Changes never reach back: an entry counts from a serial number that lies beyond what
the producer has sent and beyond what the consumer has posted receives for.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from lightning_lwpm.staging.record import Trace
from lightning_lwpm.staging.remote import Meta, Name

__all__ = ["Agreement", "Entry", "meta_of"]

FOREVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is sent unasked.

    Attributes:
        number: The producer's count of entries: gives the order of sending.
        name: The tensor.
        meta: Shape and type that both ends rely on.
        first: First serial number for which it is sent.
        last: Last one.
    """

    number: int
    name: Name
    meta: Meta
    first: int
    last: int = FOREVER


class Agreement:
    """The entries of one producer and one consumer, by signature of the batch."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, list[Entry]] = {}

    def active(self, signature: Hashable, serial: int) -> list[Entry]:
        """What is sent for a micro-batch, in order of sending."""
        return [entry for entry in self.entries.get(signature, ()) if entry.first <= serial <= entry.last]

    def add(self, signature: Hashable, entry: Entry) -> None:
        """Add an entry in its place."""
        entries = self.entries.setdefault(signature, [])
        entries.append(entry)
        entries.sort(key=lambda known: known.number)

    def has(self, signature: Hashable, name: Name) -> bool:
        """Whether ``name`` is sent, now or from some later micro-batch on."""
        return any(entry.name == name and entry.last == FOREVER for entry in self.entries.get(signature, ()))

    def change(self, signature: Hashable, changed: Trace, last: int) -> None:
        """Let entries of which the meta changed end with serial ``last`` and begin anew after it."""
        entries = self.entries.get(signature, [])
        for i, entry in enumerate(list(entries)):
            record = changed.get(entry.name[:3])
            if record is None or entry.last != FOREVER:
                continue
            meta = record.meta(entry.name.leaf)
            if meta is not None and meta != entry.meta:
                entries[i] = replace(entry, last=last)
                entries.append(replace(entry, meta=meta, first=last + 1))
        entries.sort(key=lambda known: known.number)


def meta_of(trace: Trace, name: Name) -> Meta | None:
    """The meta of a named tensor, ``None`` where this trace has no such call."""
    record = trace.get(name[:3])
    return record.meta(name.leaf) if record is not None else None
