"""Whole steps: every rank runs all of the user's step, and they take turns where its layers are theirs.

::

    rank 1    segment 0 ---+               (waits)            gradients ---> backward of 0, its optimizer's step
                 trace     | values                              ^
    rank 0     (waits)     +---> segment 1 -- backward of 1 -----+           its optimizer's step

What a segment returned is told to all at its end, with the states of the random generators: numbers are drawn in the
order of one device. Values are fetched by whoever touches them, and kept until the step ends.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.pipeline.flight import Arrival, join, tell
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import from_wire, to_wire
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.randomness import TorchRandom, put_python, python_state
from lightning_lwpm.staging.record import Key, Record, Trace, version
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.whole import Made, WholeStep

__all__ = ["Whole"]

_NOBODY = -2
"""Whose turn it is when the step has ended."""


class Whole:
    """Runs whole steps on all ranks at the same time.

    Args:
        mailbox: The control connections.
        root: The model, with this rank's share of the weights.
        layout: The partition, in which each weight is in one stage.
        device: This rank's device.

    Attributes:
        step: The step that runs now.
    """

    def __init__(self, mailbox: Mailbox, root: nn.Module, layout: Layout, device: torch.device) -> None:
        self.mailbox, self.device, self.ranks = mailbox, device, layout.ranks
        self.stage = self.ranks.index(mailbox.rank) if mailbox.rank in self.ranks else -1
        self.interception = Interception([(unit, root.get_submodule(unit.name)) for unit in layout.units])
        self.derivations = layout.derivations
        self.random = TorchRandom(0, 0, device)
        self.step: WholeStep | None = None
        self._serial = 0
        self._turns: _Turns | None = None
        mailbox.handle("?value", self._on_value)

    def run(self, step: Callable[[], Any], accumulated: Any) -> Any:
        """Run a step on every rank.

        Args:
            step: The user's step.
            accumulated: Keeps fresh gradients apart from those that are there: see ``training.gradients.Stash``.

        Returns:
            What it returned; tensors of other ranks are remote, until the next step.
        """
        self._serial += 1
        whole = WholeStep(self.stage, self.mailbox.rank == 0, self.interception, self.device, self.derivations)
        turns = self._turns = whole.peers = _Turns(self, whole, self._serial, accumulated)
        self.step = whole
        with self.mailbox.guarded(lambda: "the step"), self.interception.batch():
            turns.begin()
            out = whole.run(step)
            whole.turn(_NOBODY)
        self.step = None
        return out

    def end(self) -> None:
        """Every rank is done with the step and what it returned: let go of all that is held for others."""
        assert self._turns is not None
        self.mailbox.gather(("whole step", self._serial), None, "all ranks to end the step")
        self._turns.step.close()
        self._turns = None

    def _on_value(self, source: int, key: Any, payload: Any) -> None:
        _, name = key
        made = self._turns.step.by_name.get(name) if self._turns is not None else None
        answer = None
        if made is not None:
            tensor = made.tensor.detach()
            copied = to_wire(tensor).clone(), Meta.of(made.tensor)
            answer = copied if version(made.tensor) == made.version else None
        self.mailbox.post(source, "value", key, answer)


class _Turns:
    """The dealings of one step with the other ranks.

    Args:
        whole: Runs it.
        step: The step.
        serial: Its number.
        accumulated: Keeps fresh gradients apart.
    """

    def __init__(self, whole: Whole, step: WholeStep, serial: int, accumulated: Any) -> None:
        self.whole, self.step, self.serial, self.accumulated = whole, step, serial, accumulated
        self.mailbox, self.device = whole.mailbox, whole.device
        self.stages: list[int] = []  # of the segments that have ended
        self._told: Trace | None = None  # of the present segment
        self._after: Any = None  # the states of generators at its end
        self._data: dict[Name, tuple[Tensor, Meta]] = {}
        self._arrivals: dict[int, dict[Name, Arrival]] = defaultdict(dict)
        self._backwards = 0

    # -- turns ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Random numbers go on from rank 0's generators."""
        key = ("generators", self.serial)
        self._adopt(self.mailbox.broadcast(key, self._generators(), what="the states of random generators"))

    def turn(self, stage: int) -> None:
        """End the present segment."""
        if self.step.at == self.step.stage:
            told = self.step.trace, self._generators()
            self.mailbox.post_all("segment", (self.serial, self.step.segment), told)
        else:
            self._hear()
            self._adopt(self._after)
        self.stages.append(self.step.at)
        self._told = None

    def _hear(self) -> Trace:
        if self._told is None:
            rank = self.whole.ranks[self.step.at]
            what = f"what the layers of {self.mailbox.names[rank]} return"
            self._told, self._after = self.mailbox.take("segment", (self.serial, self.step.segment), what, rank)
        return self._told

    def _generators(self) -> Any:
        return python_state(), self.whole.random.position()

    def _adopt(self, generators: Any) -> None:
        python, states = generators
        put_python(python)
        self.whole.random.back_to(states)

    # -- values --------------------------------------------------------------------------------------------------

    def record(self, stage: int, key: Key) -> Record:
        """See :class:`~lightning_lwpm.staging.whole.Others`, as for all that follow."""
        record = self._hear().get(key)
        if record is None:
            raise PipelineError(
                f"{tell(Name(*key, 0))} is asked for on rank {self.mailbox.rank}, but rank {self.whole.ranks[stage]} "
                "has not made it: the step took another path on different ranks. What only one rank does (`if "
                "self.trainer.is_global_zero: ...`) may not compute with what layers return."
            )
        return record

    def value(self, remote: Remote) -> Tensor:
        arrivals, name = self._arrivals[self.step.segment], remote.label
        if name not in arrivals:
            data, meta = self._fetch(remote)
            arrivals[name] = Arrival(name, remote.stage, data.detach(), meta, pulled=True)
        return join(arrivals[name], True)

    def joined(self, made: Made) -> Tensor:
        arrivals = self._arrivals[self.step.segment]
        if made.name not in arrivals:
            meta = Meta.of(made.tensor)
            arrivals[made.name] = Arrival(made.name, self.step.stage, made.tensor.detach(), meta, pulled=False)
        return join(arrivals[made.name], True)

    def _fetch(self, remote: Remote) -> tuple[Tensor, Meta]:
        if remote.label in self._data:
            return self._data[remote.label]
        rank, key = self.whole.ranks[remote.stage], (self.serial, remote.label)
        if rank == self.mailbox.rank:
            made = self.step.by_name[remote.label]
            return made.tensor, Meta.of(made.tensor)
        self.mailbox.post(rank, "?value", key)
        answer = self.mailbox.take("value", key, f"{tell(remote.label)} of {self.mailbox.names[rank]}", rank)
        if answer is None:
            raise PipelineError(
                f"{tell(remote.label)} was changed in place on rank {rank} before it was looked at on rank "
                f"{self.mailbox.rank}: in manual optimization make a new tensor (`x = x + y` for `x += y`)"
            )
        flat, meta = answer
        self._data[remote.label] = from_wire(flat, meta, self.device), meta
        return self._data[remote.label]

    # -- backward ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool) -> None:
        self._backwards += 1
        gradients: dict[Name, Tensor] = {}  # of what this rank has made, by later segments
        if type(loss) is not Remote:
            start = gradient if gradient is not None else torch.ones_like(loss)
            gradients[self.step.made[id(loss)].name] = start
        self.accumulated.begin(zeroed=True)
        for arrivals in self._arrivals.values():
            for arrival in arrivals.values():
                arrival.gradient = None
        for segment in reversed(range(len(self.stages))):
            rank = self.whole.ranks[self.stages[segment]]
            key = (self.serial, self._backwards, segment)
            if rank == self.mailbox.rank:
                returned = self._backward(segment, gradients, retain_graph)
                for other in range(self.mailbox.world):
                    if other != rank:
                        self.mailbox.post(other, "whole-gradients", key, returned[other])
            else:
                what = f"the gradients of {self.mailbox.names[rank]}"
                for name, flat, stride in self.mailbox.take("whole-gradients", key, what, rank):
                    meta = Meta.of(self.step.by_name[name].tensor)._replace(stride=stride)
                    self._add(gradients, name, from_wire(flat, meta, self.device))
        self.accumulated.end()
        self.accumulated.hand_over()

    def _backward(self, segment: int, gradients: dict[Name, Tensor], retain_graph: bool) -> dict[int, list[Any]]:
        """The backward pass of a segment of this rank; returns gradients for other ranks."""
        arrivals = self._arrivals[segment].values()
        names = [name for name in gradients if self.step.by_name[name].segment == segment]
        roots = [self.step.by_name[name].tensor for name in names]
        if roots:
            torch.autograd.backward(roots, [gradients.pop(name) for name in names], retain_graph=retain_graph)
        for earlier in range(segment):
            for arrival in self._arrivals[earlier].values() if earlier in self._arrivals else ():
                if arrival.gradient is not None:
                    raise PipelineError(
                        f"something made from {tell(arrival.name)}, before layers of another rank ran, has come into a "
                        "later layer otherwise than as an argument (in a closure or an attribute), so its gradient "
                        "would be lost: in manual optimization give it to that layer as an argument"
                    )
        returned: dict[int, list[Any]] = defaultdict(list)
        for arrival in arrivals:
            gradient = arrival.gradient
            if gradient is None:
                continue
            rank = self.whole.ranks[arrival.stage]
            if rank == self.mailbox.rank:
                self._add(gradients, arrival.name, gradient)
            else:
                returned[rank].append((arrival.name, to_wire(gradient), gradient.stride()))
        return returned

    @staticmethod
    def _add(gradients: dict[Name, Tensor], name: Name, gradient: Tensor) -> None:
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
