"""Loaders that take the place of the user's: rank 0 iterates the real one, every other rank what rank 0 announces.

::

    in the user's hooks  rank 0 reads, and tells each batch where others read too
    exact training       rank 0 says that there is one more batch, and sends it when Lightning moves it to the device,
                         or while the one before is computed
    read ahead           rank 0 transfers and sends some batches before their turn; others may look at those to come
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_lwpm.training.private import forget_indices
from lightning_lwpm.training.random_state import after, generators, put_generators, same_generators
from lightning_lwpm.training.tickets import Key, Place, Ticket

if TYPE_CHECKING:
    from lightning_lwpm.training.data import Feed

__all__ = ["Proxy", "Shadow", "Source", "Stateless", "Upcoming", "iterates_itself"]


class Proxy:
    """Passes everything on to an iterable that is no DataLoader."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)


class _Standing:
    """Stands in for a loader of the user. A copy, or what is read from a file, is the user's own."""

    _lwpm: "tuple[Feed, int, list[int], list[Any]]"
    _lwpm_for: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self._lwpm_for,)


def _itself(loader: Any) -> Any:
    return loader


class Source(_Standing):
    """Iterates the real data and tells the other ranks, batch by batch, that there is one more."""

    def peek(self, number: int = 0) -> Any:
        """A batch of the iteration that has begun, or is about to; a stream read once loses nothing.

        Args:
            number: Its number.

        Raises:
            StopIteration: if there are not as many, or those after the first have been taken.
        """
        feed, _, _, current = self._lwpm
        before = generators(feed.device)
        if not current:
            current[:] = [_Items(super().__iter__(), pending=True)]  # type: ignore[misc]
        return current[0].peek(number, feed.device, before)

    def __iter__(self) -> Iterator[Any]:
        feed, stream, rounds, current = self._lwpm
        if feed.aside is not None:
            return feed.aside(super().__iter__())  # type: ignore[misc]
        rounds[0] += 1
        if not (current and current[0].pending) or reads_again(self):
            # at once, not at the first batch: what a loader draws at its start is drawn when one device draws it
            current[:] = [_Items(super().__iter__())]  # type: ignore[misc]
        current[0].pending = False
        place = stream, rounds[0]
        if feed.loop.evaluating():
            return iter(_Window(feed, self, place, current[0], "ahead"))
        if feed.train_ahead:
            window = _Window(feed, self, place, current[0], "train")
            feed.look_ahead(stream, window)
            return iter(window)
        if feed.reads_early(self):
            return iter(_Window(feed, self, place, current[0], "early"))
        return self._training(*place, current[0])

    def _training(self, stream: int, turn: int, items: "_Items") -> Iterator[Any]:
        feed = self._lwpm[0]
        count = 0
        for item in items:
            feed.mailbox.post_all("more", (stream, turn, count), _LATER)
            count += 1
            yield item
        feed.mailbox.post_all("more", (stream, turn, count), None)


def reads_again(loader: Source) -> bool:
    """Whether what was looked at can be let go: then it is drawn anew, when one device draws it."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and not iterates_itself(loader)
    )


def iterates_itself(loader: Source) -> bool:
    """Whether the user's class of a loader has an ``__iter__`` of its own."""
    kinds = (kind for kind in type(loader).__mro__ if "__iter__" in vars(kind) and kind is not Source)
    return next(kinds) is not DataLoader


_END = object()
_LATER: Key = ("", 0)  # a batch that is sent when its turn has come


class Upcoming(Protocol):
    """An iteration of which the tickets to come can be looked at."""

    def ticket(self, index: int) -> Ticket | None:
        """The ticket that comes after ``index`` others; ``None`` if there are not as many."""


class _Iteration:
    """An iteration of which the tickets to come can be looked at: those on their way through Lightning's loop first."""

    def __init__(self) -> None:
        self.on_the_way: deque[Ticket] = deque()

    def leaves(self, ticket: Ticket) -> Ticket:
        """The ticket, which Lightning's loop gets now, and maybe keeps for a while."""
        self.on_the_way.append(ticket)
        return ticket

    def ticket(self, index: int) -> Ticket | None:
        """See :class:`Upcoming`."""
        while self.on_the_way and self.on_the_way[0].given:
            self.on_the_way.popleft()
        waiting = len(self.on_the_way)
        return self.on_the_way[index] if index < waiting else self.inside(index - waiting)

    def inside(self, index: int) -> Ticket | None:
        """The same of those that the loop has not got yet."""
        raise NotImplementedError


class _Window(_Iteration):
    """Reads and sends batches ahead, and tells the other ranks of them, before Lightning's loop gets them.

    Args:
        feed: Sends them.
        loader: The loader that is iterated.
        place: Names the iteration.
        items: The batches.
        kind: "train" or "early" in training, "ahead" in evaluation.
    """

    def __init__(self, feed: "Feed", loader: Any, place: Place, items: "_Items", kind: str) -> None:
        super().__init__()
        self.feed, self.loader, self.place, self.items, self.kind = feed, loader, place, items, kind
        self.window: deque[Ticket] = deque()

    def __iter__(self) -> Iterator[Any]:
        feed, count, index, ended = self.feed, 0, 0, False
        limit, ahead = feed.loop.training_limit(), feed.train_ahead or 1
        feed.forget(self.place)
        if self.kind == "ahead":
            # what loaders that are read in turn draw from one generator, they draw in turn
            index, ahead = feed.loop.index(self.loader), feed.ahead if feed.loop.one_after_another() else 0
            limit = feed.loop.limit(index)
        while True:
            while len(self.window) <= ahead and not ended:
                item = next(self.items, _END) if count < limit else _END
                if item is _END:
                    ended = True
                    if self.kind == "train":  # somebody may look for the next one already
                        feed.mailbox.post_all("more", (*self.place, count), None)
                    break
                value = feed.loop.transfer(item, index)
                key = feed.send(self.kind, value, self.place)
                feed.mailbox.post_all("more", (*self.place, count), key)
                self.window.append(Ticket(value, key))
                count += 1
            if not self.window:
                if self.kind != "train":
                    feed.mailbox.post_all("more", (*self.place, count), None)
                return
            yield self.leaves(self.window.popleft())

    def inside(self, index: int) -> Ticket | None:
        """See :class:`_Iteration`."""
        return self.window[index] if index < len(self.window) else None


class _Items:
    """An iterator of which the items to come can be looked at, and the first one also later."""

    def __init__(self, iterator: Iterator[Any], pending: bool = False) -> None:
        self.iterator = iterator
        self.pending = pending  # looked at before anybody iterates: the next to iterate takes this one
        self._seen: list[Any] = []  # the first one, and those that have been looked at and not taken
        self._taken = 0
        self._drawn: dict[int, Callable[[], None]] = {}  # by number of an item

    def peek(self, number: int, device: torch.device, before: dict[str, Any]) -> Any:
        """An item; the first one whether it has been taken or not.

        Args:
            number: Its number.
            device: Of this rank.
            before: Where random generators were. Who looks puts them back; who takes the item draws what it has drawn.
        """
        while len(self._seen) <= number:
            if self._taken > len(self._seen):
                raise StopIteration
            self._seen.append(next(self.iterator))
            later = generators(device)
            self._drawn[len(self._seen) - 1] = partial(_draw, device, before, later)
            before = later
        return self._seen[number]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._drawn.pop(self._taken, _nothing)()
        item = self._seen[self._taken] if self._taken < len(self._seen) else next(self.iterator)
        self._taken += 1
        self._seen = self._seen or [item]
        if self._taken == len(self._seen):
            del self._seen[1:]
        return item


def _draw(device: torch.device, before: dict[str, Any], later: dict[str, Any]) -> None:
    """Let random generators go on as if what was drawn between two places were drawn now."""
    now = generators(device)
    if same_generators(now, before):
        put_generators(later, device)
    elif (there := after(now, before, later)["torch"]) is not later["torch"]:
        torch.set_rng_state(there)  # other loaders have drawn since


def _nothing() -> None:
    """What an item draws that nobody has looked at."""


class Shadow(_Standing):
    """Iterates tickets for the batches that rank 0 announces; reads no data and starts no workers."""

    def __iter__(self) -> Iterator[Any]:
        feed, stream, rounds, _ = self._lwpm
        if feed.aside is not None:
            return feed.aside(None)
        rounds[0] += 1
        forget_indices(self)
        announced = _Announced(feed, (stream, rounds[0]))
        if feed.train_ahead and not feed.loop.evaluating():
            feed.look_ahead(stream, announced)
        return iter(announced)


class Stateless:
    """For a shadow of a loader that has a state: it is that of rank 0's."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing; the loader itself would begin to read in order to tell."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class _Announced(_Iteration):
    """The tickets of the batches that rank 0 announces.

    Args:
        feed: Hears of them.
        place: Names the iteration.
    """

    def __init__(self, feed: "Feed", place: Place) -> None:
        super().__init__()
        self.feed, self.place = feed, place
        self.known: deque[Ticket] = deque()
        self.count, self.ended = 0, False

    def __iter__(self) -> Iterator[Any]:
        while self.inside(0) is not None:
            yield self.leaves(self.known.popleft())

    def inside(self, index: int) -> Ticket | None:
        """See :class:`_Iteration`."""
        while len(self.known) <= index and not self.ended:
            what = f"word from rank 0 whether there is a batch {self.count}"
            key = self.feed.mailbox.take("more", (*self.place, self.count), what)
            self.count += 1
            self.ended = key is None
            if key is not None:
                self.known.append(Ticket(key=key if key != _LATER else None))
        return self.known[index] if index < len(self.known) else None
