"""Data is read by one rank and sent to the others: every stage sees the same draw, and a pipeline reads once.

    rank 0 (last stage)                          every other rank
    -------------------                          ----------------
    iterates the real DataLoader                 iterates a shadow of it: one ticket for each batch announced
    runs the transfer hooks                      skips them
    sends small leaves to all, large ones        finds the batch behind its ticket; a large leaf that it was not
    to those who have used them before           given is a placeholder, fetched when a layer touches it

In evaluation rank 0 reads and sends a few batches ahead, because it holds the last stage: the first stages work on
them meanwhile. In training it does so where batches overlap, or with one batch where nobody can tell; else it sends
when Lightning moves a batch to the device.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import Placeholder
from lightning_lwpm.staging.remote import Meta
from lightning_lwpm.staging.tree import unflatten
from lightning_lwpm.training.loaders import Proxy, Shadow, Source, Stateless, Upcoming, iterates_itself
from lightning_lwpm.training.loop import Loop
from lightning_lwpm.training.private import given
from lightning_lwpm.training.pulled import Pulled
from lightning_lwpm.training.tickets import Key, Place, Ticket, map_tickets, tickets

__all__ = ["Feed"]

_DRAWN_BEFORE = (RandomSampler, SequentialSampler, DistributedSampler)
"""Samplers that draw nothing from the process's generators after their first index."""


class Feed:
    """Gives every rank its batches.

    Args:
        mailbox: The control connections.
        loop: What Lightning's loop is doing.
        ahead: How many batches are read and sent ahead in evaluation.
        train_ahead: The same in training.
    """

    def __init__(self, mailbox: Mailbox, loop: Loop, ahead: int, train_ahead: int = 0) -> None:
        self.mailbox, self.loop, self.ahead, self.device = mailbox, loop, ahead, loop.device
        self.reads = mailbox.rank == 0
        self.train_ahead = train_ahead
        self.aside: Callable[[Iterator[Any] | None], Iterator[Any]] | None = None
        self._upcoming: dict[int, Upcoming] = {}  # by loader
        self._streams = 0
        self._number = {"train": 0, "early": 0, "ahead": 0}
        self._sent: dict[tuple[str, int], Batch] = {}
        self._given: dict[bool, list[Key]] = {True: [], False: []}  # in training, in evaluation; not yet used up
        self._places: dict[Key, Place] = {}  # of what has been read ahead
        self._wanted: dict[tuple[int, Hashable], set[int]] = defaultdict(set)
        if self.reads:
            mailbox.handle("?leaf", self._on_leaf)

    # -- loaders -------------------------------------------------------------------------------------------------

    def wrap(self, loader: Any) -> Any:
        """The loader that this rank iterates in the place of ``loader``; it still is a DataLoader if that was one."""
        stream = self._streams
        self._streams += 1
        mixins: tuple[type, ...] = (Source if self.reads else Shadow,)
        if not self.reads and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            mixins += (Stateless,)
        if isinstance(loader, DataLoader):
            kind: Any = type(type(loader).__name__, (*mixins, type(loader)), {})
            wrapped = kind.__new__(kind)  # a shallow copy: the user's own loader stays as it is
            wrapped.__dict__.update(loader.__dict__)
        else:
            wrapped = type("Pipelined" + type(loader).__name__, (*mixins, Proxy), {})(loader)
        wrapped.__dict__["_lwpm"], wrapped.__dict__["_lwpm_for"] = (self, stream, [0], []), loader
        return wrapped

    def read(self, loader: Any, number: int = 0) -> Any:
        """A batch of a loader as it would come, without a trace; only for the reading rank.

        Args:
            loader: The loader.
            number: Of the batch in the iteration to come.

        Raises:
            StopIteration: where there is no such batch.
        """
        dataset: Any = getattr(loader, "dataset", None)
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None or isinstance(dataset, IterableDataset) or not hasattr(loader, "collate_fn"):
            return loader.peek(number) if isinstance(loader, Source) else next(islice(loader, number, None))
        sampler = copy.deepcopy(sampler, {id(dataset): dataset})  # its generator goes on as if nothing had been drawn
        fetch = getattr(dataset, "__getitems__", None)
        try:
            indices = next(islice(sampler, number, None))
            return loader.collate_fn(fetch(indices) if fetch else [dataset[i] for i in indices])
        except StopIteration:
            raise
        except Exception:
            if (
                not number and isinstance(loader, Source) and iterates_itself(loader)
            ):  # such as one that reads several others
                return loader.peek()
            raise

    @contextmanager
    def read_aside(self, read: Callable[[Iterator[Any] | None], Iterator[Any]]) -> Iterator[None]:
        """Within the block, in which the user's code runs, loaders are read by the way.

        Args:
            read: Iterates a loader; it is given the iteration of the real one, on the reading rank.
        """
        before, self.aside = self.aside, read
        try:
            yield
        finally:
            self.aside = before

    # -- batches -------------------------------------------------------------------------------------------------

    def give(self, batch: Any, transfer: Callable[[Any], Any]) -> Any:
        """What Lightning's loop hands to ``batch_to_device``, on the device, the same on every rank.

        Args:
            batch: What the loader of this rank gave.
            transfer: Moves a raw batch to the device, on the reading rank.
        """
        found = list(tickets(batch))
        if not found:
            batch = transfer(batch)
            self._given[True].append(self.send("train", batch))
            return batch
        for ticket in found:
            ticket.given = True
        if self.reads:
            self._given[not self.loop.evaluating()] += [ticket.key for ticket in found if ticket.key is not None]
            return map_tickets(batch, lambda ticket: ticket.value)
        if all(ticket.key is not None for ticket in found):
            return map_tickets(batch, self._value)
        self._number["train"] += 1
        return self._take(("train", self._number["train"]))

    def pull(self, dataloader_iter: Any) -> Pulled:
        """The next batch of a step that takes its batches itself, the same on every rank."""
        if self.train_ahead and not self.loop.evaluating():
            raise ConfigurationError(
                'a `training_step` that takes `dataloader_iter` cannot be read ahead: with schedule="async" take '
                "`batch`, or use an exact schedule"
            )
        batch, *place = next(dataloader_iter)
        if self.mailbox.world > 1:
            batch = self.give(batch, lambda raw: raw)
            given(dataloader_iter, batch)
        return Pulled(batch, (place[0], place[1]))

    def peek(self, index: int) -> Any:
        """A training batch to come, on the device; ``None`` where the epoch ends before.

        Args:
            index: 0 for the next one; less than ``train_ahead``.
        """
        loaders, structure = tree_flatten(self.loop.trainer.train_dataloader)
        coming = [self._upcoming[loader._lwpm[1]].ticket(index) for loader in loaders]
        found = [ticket for ticket in coming if ticket is not None]
        if len(found) < len(loaders):  # a loader that has ended may begin anew
            return None
        return tree_unflatten([self._value(ticket) for ticket in found], structure)

    def _value(self, ticket: Ticket) -> Any:
        if ticket.value is None:
            assert ticket.key is not None
            ticket.value = self._take(ticket.key)
        return ticket.value

    def used(self, training: bool) -> None:
        """Every stage has begun with all that has been given in training or in evaluation: the leaves can go."""
        for key in self._given[training]:
            self._drop(key)
        self._given[training].clear()

    def _drop(self, key: Key) -> None:
        self._sent.pop(key, None)
        self._places.pop(key, None)

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

    def send(self, kind: str, value: Any, place: Place | None = None) -> Key:
        """Send a batch on the device to all ranks; returns under what.

        Args:
            kind: See ``Key``.
            value: The batch.
            place: The iteration that has read it before its turn.
        """
        self._number[kind] += 1
        key = (kind, self._number[kind])
        if place is not None:
            self._places[key] = place
        self._send(key, value)
        return key

    def look_ahead(self, stream: int, upcoming: Upcoming) -> None:
        """Take the training batches to come of a loader from an iteration that has begun."""
        self._upcoming[stream] = upcoming

    def forget(self, place: Place) -> None:
        """An iteration begins: what those of this loader have read ahead and left unused is dropped.

        But for the last one: loaders that are read in turn begin anew while a batch is on its way through the loop.
        """
        stream, turn = place
        for key in [key for key, (s, t) in self._places.items() if s == stream and t < turn - 1]:
            self._drop(key)

    def reads_early(self, loader: Any) -> bool:
        """Whether a training batch can be read, moved and sent while the one before is computed, and nobody could tell.

        So it is where workers read, in an order that has been drawn before, where the loader has no state that a
        checkpoint holds, and where no hook of the user takes part.
        """
        return (
            isinstance(loader, DataLoader)
            and loader.num_workers > 0
            and (isinstance(loader.dataset, IterableDataset) or type(loader.sampler) in _DRAWN_BEFORE)
            and (loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler)
            and not hasattr(loader, "state_dict")
            and self.loop.trainer.train_dataloader is loader
            and not self.loop.hooks_transfer()
        )

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
