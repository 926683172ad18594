"""Data is read by one rank and sent to the others: every stage sees the same draw, and a pipeline reads once.

    rank 0 (last stage)                          every other rank
    -------------------                          ----------------
    iterates the real DataLoader                 iterates a shadow of it: one ticket for each batch announced
    runs the transfer hooks                      skips them
    sends small leaves to all, large ones        finds the batch behind its ticket; a large leaf that it was not
    to those who have used them before           given is a placeholder, fetched when a layer touches it

In evaluation rank 0 reads and sends a few batches ahead, because it holds the last stage: the first stages work on
them meanwhile. In training it sends when Lightning moves the batch to the device.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import Placeholder
from lightning_lwpm.staging.remote import Meta
from lightning_lwpm.staging.tree import unflatten
from lightning_lwpm.training.loop import Loop
from lightning_lwpm.training.private import forget_indices

__all__ = ["Feed", "Ticket", "has_tickets"]


class Ticket:
    """Stands for a batch on its way through Lightning's loop to ``batch_to_device``."""

    def __init__(self, value: Any = None, number: int = 0) -> None:
        self.value = value  # on the reading rank: the batch, if it has been sent ahead
        self.number = number  # elsewhere: the number under which it was sent ahead; 0 if it will be sent later


class Feed:
    """Gives every rank its batches.

    Args:
        mailbox: The control connections.
        loop: What Lightning's loop is doing.
        ahead: How many batches are read and sent ahead in evaluation.
    """

    def __init__(self, mailbox: Mailbox, loop: Loop, ahead: int) -> None:
        self.mailbox, self.loop, self.ahead, self.device = mailbox, loop, ahead, loop.device
        self.reads = mailbox.rank == 0
        self._streams = 0
        self._number = {"train": 0, "ahead": 0}
        self._sent: dict[tuple[str, int], Batch] = {}
        self._wanted: dict[tuple[int, Hashable], set[int]] = defaultdict(set)
        if self.reads:
            mailbox.handle("?leaf", self._on_leaf)

    # -- loaders -------------------------------------------------------------------------------------------------

    def wrap(self, loader: Any) -> Any:
        """The loader that this rank iterates in the place of ``loader``; it still is a DataLoader if that was one."""
        stream = self._streams
        self._streams += 1
        mixin = _Source if self.reads else _Shadow
        if isinstance(loader, DataLoader):
            kind: Any = type(type(loader).__name__, (mixin, type(loader)), {})
            wrapped = kind.__new__(kind)  # a shallow copy: the user's own loader stays as it is
            wrapped.__dict__.update(loader.__dict__)
        else:
            wrapped = type("Pipelined" + type(loader).__name__, (mixin, _Proxy), {})(loader)
        wrapped.__dict__["_lwpm"] = (self, stream, [0], [])
        return wrapped

    def read(self, loader: Any) -> Any:
        """The first batch of a loader as it would come, without a trace; only for the reading rank."""
        dataset: Any = getattr(loader, "dataset", None)
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None or isinstance(dataset, IterableDataset) or not hasattr(loader, "collate_fn"):
            return loader.peek() if isinstance(loader, _Source) else next(iter(loader))
        sampler = copy.deepcopy(sampler, {id(dataset): dataset})  # its generator goes on as if nothing had been drawn
        indices = next(iter(sampler))
        fetch = getattr(dataset, "__getitems__", None)
        return loader.collate_fn(fetch(indices) if fetch else [dataset[i] for i in indices])

    # -- batches -------------------------------------------------------------------------------------------------

    def give(self, batch: Any, transfer: Callable[[Any], Any]) -> Any:
        """What Lightning's loop hands to ``batch_to_device``, on the device, the same on every rank.

        Args:
            batch: What the loader of this rank gave.
            transfer: Moves a raw batch to the device, on the reading rank.
        """
        tickets = list(_tickets(batch))
        if not tickets:
            self._number["train"] += 1
            batch = transfer(batch)
            self._send(("train", self._number["train"]), batch)
            return batch
        if self.reads:
            return _map(batch, lambda ticket: ticket.value)
        if all(ticket.number for ticket in tickets):
            return _map(batch, lambda ticket: self._take(("ahead", ticket.number)))
        self._number["train"] += 1
        return self._take(("train", self._number["train"]))

    def used(self, kind: str) -> None:
        """Every stage has begun with the oldest batch of a kind ("train" or "ahead"): its leaves can go."""
        oldest = next((key for key in self._sent if key[0] == kind), None)
        if oldest is not None:
            del self._sent[oldest]

    def _send(self, key: tuple[str, int], value: Any) -> None:
        batch = Batch.of(value, 1)
        self._sent[key] = batch
        structure = batch.structure()
        for rank in range(1, self.mailbox.world):
            leaves = batch.lean(self._wanted[rank, structure])
            try:
                self.mailbox.post(rank, "batch", key, (batch.spec, leaves))
            except LWPMError:
                raise
            except Exception as error:
                raise ConfigurationError(
                    "a batch holds something that cannot be sent to the other ranks, because it cannot be pickled: "
                    f"{type(error).__name__}: {error}. Leave it out of the batch, in the dataset or the `collate_fn`."
                ) from error

    def send_ahead(self, value: Any) -> int:
        """Send a batch of an evaluation before its turn; returns its number."""
        self._number["ahead"] += 1
        self._send(("ahead", self._number["ahead"]), value)
        return self._number["ahead"]

    def forget_ahead(self) -> None:
        """A new evaluation begins: what the last one left unused is dropped."""
        self._sent = {key: batch for key, batch in self._sent.items() if key[0] != "ahead"}

    def fetch(self, placeholder: Any) -> Tensor:
        """A leaf that was not sent, from the reading rank, which sends it from now on."""
        origin = getattr(placeholder, "origin", None)
        if origin is None:
            raise PipelineError(
                "a tensor made in a hook from a part of the batch that this rank was not given: make it in "
                "`on_after_batch_transfer` or in the step instead"
            )
        key = (*origin, self.mailbox.rank)
        self.mailbox.post(0, "?leaf", key)
        leaf = self.mailbox.take("leaf", key, f"leaf {origin[1]} of batch {origin[0][1]} from rank 0")
        return to_device(leaf, self.device)

    def _take(self, key: tuple[str, int]) -> Any:
        spec, leaves = self.mailbox.take("batch", key, f"batch {key[1]} from rank 0, which reads the data")

        def local(index: int, leaf: Tensor | Meta) -> Any:
            if isinstance(leaf, Tensor):
                return to_device(leaf, self.device)
            shell = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device="meta")
            absent = Placeholder(shell, self.device)
            absent.origin = (key, index)  # type: ignore[attr-defined]
            return absent

        return unflatten(spec, iter([local(index, leaf) for index, leaf in enumerate(leaves)]))

    def _on_leaf(self, source: int, key: Any, payload: Any) -> None:
        number, index, rank = key
        batch = self._sent.get(number)
        if batch is None:
            raise PipelineError(f"rank {rank} asked for leaf {index} of batch {number} after its end")
        self._wanted[rank, batch.structure()].add(index)
        self.mailbox.post(source, "leaf", key, batch.leaves[index])


class _Proxy:
    """Passes everything on to an iterable that is no DataLoader."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)


class _Source:
    """Iterates the real data and tells the other ranks, batch by batch, that there is one more."""

    _lwpm: tuple[Feed, int, list[int], list[Any]]

    def peek(self) -> Any:
        """The first batch of the iteration that has begun, or is about to; a stream read once loses nothing."""
        current = self._lwpm[3]
        if not current:
            current[:] = [_Items(super().__iter__(), pending=True)]  # type: ignore[misc]
        return current[0].peek()

    def __iter__(self) -> Iterator[Any]:
        feed, stream, rounds, current = self._lwpm
        rounds[0] += 1
        if not (current and current[0].pending):
            # at once, not at the first batch: what a loader draws at its start is drawn when one device draws it
            current[:] = [_Items(super().__iter__())]  # type: ignore[misc]
        current[0].pending = False
        run = self._evaluation if feed.loop.evaluating() else self._training
        return run(stream, rounds[0], current[0])

    def _training(self, stream: int, turn: int, items: "_Items") -> Iterator[Any]:
        feed = self._lwpm[0]
        count = 0
        for item in items:
            feed.mailbox.post_all("more", (stream, turn, count), 0)
            count += 1
            yield item
        feed.mailbox.post_all("more", (stream, turn, count), None)

    def _evaluation(self, stream: int, turn: int, items: "_Items") -> Iterator[Any]:
        feed = self._lwpm[0]
        feed.forget_ahead()
        window: deque[Ticket] = deque()
        index = feed.loop.index(self)
        limit = feed.loop.limit(index)
        count = 0
        while True:
            while len(window) <= feed.ahead and count < limit:
                item = next(items, _END)
                if item is _END:
                    limit = count
                    break
                value = feed.loop.transfer(item, index)
                number = feed.send_ahead(value)
                feed.mailbox.post_all("more", (stream, turn, count), number)
                window.append(Ticket(value))
                count += 1
            if not window:
                feed.mailbox.post_all("more", (stream, turn, count), None)
                return
            yield window.popleft()


_END = object()


class _Items:
    """An iterator of which the first item can be looked at."""

    def __init__(self, iterator: Iterator[Any], pending: bool = False) -> None:
        self.iterator = iterator
        self.pending = pending  # looked at before anybody iterates: the next to iterate takes this one
        self._first: list[Any] = []
        self._waits = False

    def peek(self) -> Any:
        """The first item, whether it has been taken or not."""
        if not self._first:
            self._first = [next(self.iterator)]
            self._waits = True
        return self._first[0]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._waits:
            self._waits = False
            return self._first[0]
        item = next(self.iterator)
        self._first = self._first or [item]
        return item


class _Shadow:
    """Iterates tickets for the batches that rank 0 announces; reads no data and starts no workers."""

    _lwpm: tuple[Feed, int, list[int], list[Any]]

    def __iter__(self) -> Iterator[Any]:
        feed, stream, rounds, _ = self._lwpm
        rounds[0] += 1
        forget_indices(self)
        return self._tickets(feed, stream, rounds[0])

    @staticmethod
    def _tickets(feed: Feed, stream: int, turn: int) -> Iterator[Any]:
        count = 0
        while True:
            what = f"word from rank 0 whether there is a batch {count}"
            number = feed.mailbox.take("more", (stream, turn, count), what)
            if number is None:
                return
            yield Ticket(number=number)
            count += 1


def _tickets(batch: Any) -> Iterator[Ticket]:
    if isinstance(batch, Ticket):
        yield batch
    elif isinstance(batch, dict):
        for item in batch.values():
            yield from _tickets(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _tickets(item)


def has_tickets(batch: Any) -> bool:
    return next(_tickets(batch), None) is not None


def _map(batch: Any, fn: Callable[[Ticket], Any]) -> Any:
    if isinstance(batch, Ticket):
        return fn(batch)
    if isinstance(batch, dict):
        return {key: _map(item, fn) for key, item in batch.items()}
    if isinstance(batch, list | tuple):
        items = [_map(item, fn) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
