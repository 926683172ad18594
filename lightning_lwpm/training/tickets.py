"""What stands for a batch on its way through Lightning's loop."""

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Key", "Place", "Ticket", "has_tickets", "map_tickets", "tickets"]

Key = tuple[str, int]
"""Under what a batch is sent: "train", "early" (training, before its turn) or "ahead" (evaluation), and a number."""

Place = tuple[int, int]
"""An iteration: the number of the loader, and how often it has been iterated."""


class Ticket:
    """Stands for a batch on its way through Lightning's loop to ``batch_to_device``."""

    def __init__(self, value: Any = None, key: Key | None = None) -> None:
        self.value = value  # the batch, where it is known already
        self.key = key  # elsewhere: under what it was sent ahead; None if it will be sent later
        self.given = False  # whether it has come to its end


def tickets(batch: Any) -> Iterator[Ticket]:
    if isinstance(batch, Ticket):
        yield batch
    elif isinstance(batch, dict):
        for item in batch.values():
            yield from tickets(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from tickets(item)


def has_tickets(batch: Any) -> bool:
    return next(tickets(batch), None) is not None


def map_tickets(batch: Any, fn: Callable[[Ticket], Any]) -> Any:
    if isinstance(batch, Ticket):
        return fn(batch)
    if isinstance(batch, dict):
        return {key: map_tickets(item, fn) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        items = [map_tickets(item, fn) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
