"""Training that does not wait at optimizer steps: passes of the next batches are admitted while one ends.

Two stages, two micro-batches in a batch, numbered across batches, S a step; what ``train`` does at each call:

    stage 1      1F0 1B0 1F1 1B1 S | 1F2 1B2 1F3 1B3 S | 1F4 1B4 ...
    stage 0  0F0 0F1     0B0 0F2 0B1 S | 0F3 0B2 0F4 0B3 S | 0F5 ...

The executor is that of exact training, and so are the actions; only when a forward pass is admitted differs: stage k
of p runs up to p-1-k micro-batches ahead of the backward pass that is next, if need be of batches after the present
one. Where nothing after the present batch is admitted, the pipeline drains, and the next batch begins like the first.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.pipeline.exchange import Item
from lightning_lwpm.pipeline.rendezvous import Message, received
from lightning_lwpm.pipeline.schedule import Action
from lightning_lwpm.staging.batch import Batch
from lightning_lwpm.staging.placeholder import is_placeholder

__all__ = ["Continuous", "Work", "window"]


@dataclass(frozen=True)
class Work:
    """A batch to train on.

    Args:
        batch: The batch, split into micro-batches.
        step: Number of the optimizer step that its gradients go to.
        forward: Runs the user's step on one of its micro-batches: ``forward(microbatch, number)``.
        backward: On the last stage, runs the backward pass of one output: ``backward(output, number)``.
        fetch: Fetches a whole leaf of the batch that this rank was not given.
    """

    batch: Batch
    step: int
    forward: Callable[[Any, int], Any]
    backward: Callable[[Any, int], None]
    fetch: Callable[[int], Tensor] | None = None


def window(stage: int, ahead: int, begin: int, end: int, admitted: int, known: int) -> list[Action]:
    """What a stage does for one batch: its backward passes, and all forward passes that they admit.

    >>> window(0, 1, begin=2, end=4, admitted=3, known=6)
    [0F3, 0B2, 0F4, 0B3]

    Args:
        stage: The stage.
        ahead: How many micro-batches it may be ahead of the backward pass that is next.
        begin: Number of the batch's first micro-batch.
        end: Number of the first one after the batch.
        admitted: The first one of which the forward pass is not done yet.
        known: The first one that must not be begun: the pipeline drains before it.
    """
    actions = []
    for number in range(begin, end):
        until = min(number + ahead + 1, known)
        actions += [Action("F", stage, forward) for forward in range(admitted, until)]
        admitted = max(admitted, until)
        actions.append(Action("B", stage, number))
    return actions


class Continuous:
    """Trains batch after batch without a flush in between.

    Args:
        engine: The pipeline, with one stage a rank.
        ahead: For each stage, how many micro-batches it may run ahead.

    Attributes:
        correction: What is done about weights that change between the passes of a micro-batch; may be set later.
        begun: How many micro-batches the first stages may have begun of batches to come; the same on all ranks.

    Raises:
        ConfigurationError: if a rank has several stages.
    """

    def __init__(self, engine: Engine, ahead: Sequence[int]) -> None:
        if len(set(engine.ranks)) < len(engine.ranks):
            raise ConfigurationError(
                'schedule="async" needs one stage a device, but here a device has several: leave virtual_stages at 1, '
                "and use an exact schedule where a module is called again later in the step"
            )
        self.engine, self.ahead = engine, list(ahead)
        self.correction: Correction | None = None
        self.begun = 0
        self._forwards: dict[int, int] = {}  # by number of a micro-batch in flight: the step next at its forward pass
        self._next = (-1, 0)  # the step that is next, and the backward passes done for it
        self._places: dict[int, tuple[Work, int]] = {}  # what is known: by number the batch, and the number in it
        self._items: dict[int, Item] = {}
        self._marks: dict[int, _Mark] = {}  # by number of a batch's first micro-batch

    def train(self, works: Sequence[Work]) -> list[Any]:
        """The backward passes of a batch, and the forward passes that they admit.

        Args:
            works: The batch, and those after it that may be begun: as many as have the micro-batches that stage 0 may
                be ahead, or fewer where the pipeline is to drain; the same on all ranks.

        Returns:
            The outputs of ``forward`` for the batch on the last stage, ``None`` elsewhere.
        """
        engine, count = self.engine, len(works[0].batch)
        begin, present = engine.serial, works[0].step
        end = engine.serial = begin + count
        known = self._look(works, begin)
        self.begun = min(max(self.ahead), known - end)
        if engine.stage is None:
            return [None] * count
        self._next = (present, self._next[1] if self._next[0] == present else 0)
        row = window(engine.stage, self.ahead[engine.stage], begin, end, begin + len(self._forwards), known)

        def microbatch(stage: int, number: int) -> Any:
            work, i = self._places[number]
            return engine.microbatch(work.batch, stage, i)

        def forward(value: Any, number: int) -> Any:
            work, i = self._places[number]
            return work.forward(value, i)

        def backward(number: int, output: Any) -> None:
            work, i = self._places[number]
            work.backward(output, i)

        outputs = engine.execute(row, self._messages(row), self._items, microbatch, forward, backward, self._around)
        for number in range(begin, end):
            del self._places[number], self._items[number]
            self._marks.pop(number, None)
        return [outputs.get(number) for number in range(begin, end)]

    def discard(self) -> None:
        """Let go of what has been begun of batches to come, on all ranks at once: buffers and random numbers go back.

        What earlier stages have sent of it is received first: the next message is then that of a new beginning.
        """
        begun, self.begun = self.begun, 0
        stage, engine = self.engine.stage, self.engine
        begin = engine.serial
        engine.serial += max(self.ahead) if begun else 0
        if not begun or stage is None:
            return
        first = begin + len(self._forwards)
        sent = {other: range(first, begin + min(begun, self.ahead[other])) for other in range(stage)}
        assert engine.executor is not None
        with engine.mailbox.guarded(lambda: "the end of micro-batches that were begun"):
            engine.receive(sent, self._items)
            engine.forget(begin)
        if begin in self._marks:
            self._marks[begin].back(engine)
        self._forwards, self._places, self._items, self._marks = {}, {}, {}, {}

    def _look(self, works: Sequence[Work], begin: int) -> int:
        """Note all micro-batches of some batches; the number of the first one that is not known."""
        for work in works:
            count = len(work.batch)
            if begin not in self._places and self.engine.executor is not None:
                found = self.engine.items(work.batch, begin, "train", True, work.fetch)
                self._items.update((begin + i, item) for i, item in found.items())
                self._places.update((begin + i, (work, i)) for i in range(count))
            begin += count
        return begin

    @contextmanager
    def _around(self, action: Action) -> Iterator[None]:
        """Correct the weights for a pass."""
        number, (present, done) = action.microbatch, self._next
        work, i = self._places[number]
        if action.kind == "F":
            if i == 0 and self.ahead[action.stage]:
                self._marks[number] = _Mark(self.engine)
            self._forwards[number] = present
            with self.correction.forward(work.step - present, done) if self.correction else nullcontext():
                yield
        else:
            crossed = present - self._forwards.pop(number)
            with self.correction.backward(crossed) if self.correction else nullcontext():
                yield
            self._next = (present, done + 1)

    def _messages(self, row: Sequence[Action]) -> dict[int, list[Message]]:
        """By rank, what it sends for some actions: in the order of micro-batches, as all ranks run them."""
        messages: dict[int, list[Message]] = {}
        for action in row:
            for message in received(action, self.engine.links):
                messages.setdefault(self.engine.ranks[message.producer.stage], []).append(message)
        return messages


class _Mark:
    """Buffers and random numbers as they were before a batch's first forward pass."""

    def __init__(self, engine: Engine) -> None:
        assert engine.executor is not None and engine.stage is not None
        held = [b for b in engine.root.buffers() if not is_placeholder(b)]
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in held]
        self.random = engine.executor.random[engine.stage].position()

    def back(self, engine: Engine) -> None:
        assert engine.executor is not None and engine.stage is not None
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        engine.executor.random[engine.stage].back_to(self.random)
