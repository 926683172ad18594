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

PATIENCE = 3
"""How often a tensor may change its shape before it is sent on request only."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor that is sent unasked.

    Attributes:
        number: The producer's count of entries: gives the order of sending.
        name: The tensor.
        meta: Shape and type that both ends rely on.
        first: First serial number for which it is sent.
        last: Last one.
        changes: How often its meta has changed before.
    """

    number: int
    name: Name
    meta: Meta
    first: int
    last: int = FOREVER
    changes: int = 0


class Agreement:
    """The entries of one producer and one consumer, by signature of the batch."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, list[Entry]] = {}
        self._fickle: set[tuple[Hashable, Name]] = set()

    def active(self, signature: Hashable, serial: int) -> list[Entry]:
        """What is sent for a micro-batch, in order of sending."""
        return [entry for entry in self.entries.get(signature, ()) if entry.first <= serial <= entry.last]

    def add(self, signature: Hashable, entry: Entry) -> None:
        """Add an entry in its place."""
        entries = self.entries.setdefault(signature, [])
        entries.append(entry)
        entries.sort(key=lambda known: known.number)

    def welcomes(self, signature: Hashable, name: Name) -> bool:
        """Whether ``name`` may be added: it is not sent from some micro-batch on, and it keeps its shape."""
        if (signature, name) in self._fickle:
            return False
        return not any(entry.name == name and entry.last == FOREVER for entry in self.entries.get(signature, ()))

    def change(self, signature: Hashable, changed: Trace, number: int, last: int, past: int) -> None:
        """Let entries of which the meta changed end with serial ``last`` and begin anew after it.

        What changes again and again is no longer sent unasked.

        Args:
            signature: Of the batch.
            changed: The new records.
            number: The latest entry made before the change: newer ones know of it.
            last: The last serial number for which the old shapes are agreed.
            past: Entries that ended by this serial number are forgotten.
        """
        kept = []
        for entry in self.entries.get(signature, []):
            record = changed.get(entry.name[:3])
            meta = record.meta(entry.name.leaf) if record is not None else None
            if entry.number <= number and entry.last == FOREVER and meta is not None and meta != entry.meta:
                kept.append(replace(entry, last=last))
                if entry.changes < PATIENCE:
                    kept.append(replace(entry, meta=meta, first=last + 1, changes=entry.changes + 1))
                else:
                    self._fickle.add((signature, entry.name))
            elif entry.last > past:
                kept.append(entry)
        self.entries[signature] = sorted(kept, key=lambda known: known.number)


def meta_of(trace: Trace, name: Name) -> Meta | None:
    """The meta of a named tensor, ``None`` where this trace has no such call."""
    record = trace.get(name[:3])
    return record.meta(name.leaf) if record is not None else None
