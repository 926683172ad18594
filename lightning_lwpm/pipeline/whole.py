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
from lightning_lwpm.staging.others import Made
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.staging.randomness import TorchRandom, put_python, python_state
from lightning_lwpm.staging.recompute import Recompute
from lightning_lwpm.staging.record import Key, Record, Trace, version
from lightning_lwpm.staging.remote import Meta, Name, Remote
from lightning_lwpm.staging.whole import WholeStep

__all__ = ["Whole"]


class Whole:
    """Runs whole steps on all ranks at the same time.

    Args:
        mailbox: The control connections.
        root: The model, with this rank's share of the weights.
        layout: The partition. Weights that several layers share may be in several stages.
        device: This rank's device.
        activation_checkpointing: What is computed again in backward passes: see ``staging.recompute``. A rank receives
            what it needs piece by piece, so ``"stage"`` goes by layers.

    Attributes:
        step: The step that runs now.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        root: nn.Module,
        layout: Layout,
        device: torch.device,
        activation_checkpointing: str = "none",
    ) -> None:
        self.mailbox, self.device, self.ranks = mailbox, device, layout.ranks
        self.stage = self.ranks.index(mailbox.rank) if mailbox.rank in self.ranks else -1
        mode = "layer" if activation_checkpointing == "stage" else activation_checkpointing
        self.root, self.homes = root, {**layout.parameters, **layout.buffers}
        self.recompute = Recompute(mode, root, layout.units)
        self.interception = Interception([(unit, root.get_submodule(unit.name)) for unit in layout.units])
        self.derivations = layout.derivations
        self.shared = {name: {self.ranks[stage] for stage in stages} for name, stages in layout.shared.items()}
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
            What it returned; tensors of other ranks are remote, until :meth:`end`.
        """
        self._serial += 1
        whole = WholeStep(self.stage, self.mailbox.rank == 0, self.interception, self.device, self.derivations)
        whole.peers = self._turns = _Turns(self, whole, self._serial, accumulated)
        whole.homes = {id(t): (t, self.homes[name]) for name, t in named_tensors(self.root) if name in self.homes}
        return self._run(self._turns, step, "the step")

    def draw_on(self) -> None:
        """In a step: random numbers go on from rank 0's generators, which has drawn some by itself."""
        assert self._turns is not None
        self._turns.draw_on()

    def has_made(self, tensor: Tensor) -> bool:
        """Whether it comes from what this rank has run of the step that has ended last."""
        return self._turns is not None and id(tensor) in self._turns.step.made

    def go_on(self, made: Tensor, now: Tensor, run: Callable[[Tensor], Any]) -> None:
        """Go on with the step that has ended last, on every rank.

        Args:
            made: A tensor that it has returned.
            now: What has become of it since, outside of the step; its graph is on the rank that has made it.
            run: Is given that as a part of the step.
        """
        turns = self._turns
        assert turns is not None
        self._run(turns, lambda: run(turns.step.taken_up(made, now)), "the backward pass")

    def _run(self, turns: "_Turns", function: Callable[[], Any], what: str) -> Any:
        self.step = turns.step
        with self.mailbox.guarded(lambda: what), self.recompute.batch(), self.interception.batch():
            turns.draw_on()
            out = turns.step.run(function)
            turns.step.turn(turns.step.at)
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
        self.stages: list[int | None] = []  # of the segments that have ended; none where nothing was made
        self._told: Trace | None = None  # of the present segment
        self._after: Any = None  # the states of generators at its end
        self._data: dict[Name, tuple[Tensor, Meta]] = {}
        self._arrivals: dict[int, dict[Name, Arrival]] = defaultdict(dict)
        self._backwards = 0

    # -- turns ---------------------------------------------------------------------------------------------------

    def draw_on(self) -> None:
        """Random numbers go on from rank 0's generators."""
        key = ("generators", self.serial)
        self._adopt(self.mailbox.broadcast(key, self._generators(), what="the states of random generators"))

    def turn(self, stage: int) -> None:
        """End the present segment."""
        trace = self.step.trace
        if self.step.at == self.step.stage:
            self.mailbox.post_all("segment", (self.serial, self.step.segment), (trace, self._generators()))
        else:
            trace = self._hear()
            self._adopt(self._after)
        self.stages.append(self.step.at if trace else None)
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

    def know(self, name: Name, value: Tensor, meta: Meta) -> None:
        self._data[name] = value.detach(), meta

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
                f"{self.mailbox.rank}: where ranks take turns (manual optimization, schedule='sequential'), make a new "
                "tensor (`x = x + y` for `x += y`)"
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
        shared = [
            (n, p) for n, p in self.whole.root.named_parameters() if self.mailbox.rank in self.whole.shared.get(n, ())
        ]
        for segment, stage in reversed(list(enumerate(self.stages))):
            if stage is None:
                continue
            rank = self.whole.ranks[stage]
            key = (self.serial, self._backwards, segment)
            if rank == self.mailbox.rank:
                before = [(name, _Grad(parameter)) for name, parameter in shared]
                returned = self._backward(segment, gradients, retain_graph)
                # each adds to what has come before, wherever that was: in the order of one device
                changed = [(name, grad.parameter.grad) for name, grad in before if grad.is_another()]
                totals = {name: to_wire(grad) for name, grad in changed if grad is not None}
                for other in range(self.mailbox.world):
                    if other != rank:
                        theirs = {name: flat for name, flat in totals.items() if other in self.whole.shared[name]}
                        self.mailbox.post(other, "whole-gradients", key, (returned[other], theirs))
            else:
                what = f"the gradients of {self.mailbox.names[rank]}"
                coming, totals = self.mailbox.take("whole-gradients", key, what, rank)
                for name, flat, stride in coming:
                    meta = Meta.of(self.step.by_name[name].tensor)._replace(stride=stride)
                    self._add(gradients, name, from_wire(flat, meta, self.device))
                for name, parameter in shared:
                    if name in totals:
                        parameter.grad = from_wire(totals[name], Meta.of(parameter.detach()), self.device)
        self.accumulated.end()
        self.accumulated.hand_over()

    def _backward(self, segment: int, gradients: dict[Name, Tensor], retain_graph: bool) -> dict[int, list[Any]]:
        """The backward pass of a segment of this rank; returns gradients for other ranks."""
        arrivals = self._arrivals[segment].values()
        names = [name for name in gradients if self.step.by_name[name].segment == segment]
        roots = [self.step.by_name[name].tensor for name in names]
        if roots:
            own = [gradients.pop(name) for name in names]
            hooked = []
            for parameter in self.accumulated.parameters:
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                    hooked.append(_Grad(parameter))
                    continue
                # first what later segments have given: one device adds up all uses of a weight one after another
                roots.append(parameter)
                own.append(parameter.grad)
                parameter.grad = None
            torch.autograd.backward(roots, own, retain_graph=retain_graph)
            if any(grad.is_another() for grad in hooked):
                raise PipelineError(
                    "a weight with a hook on its gradient (`register_hook`) is used in several turns of a step, and "
                    "the hook would be called for each: do its work in `on_after_backward`, on `weight.grad`"
                )
        for earlier in range(segment):
            for arrival in self._arrivals[earlier].values() if earlier in self._arrivals else ():
                if arrival.gradient is not None:
                    raise PipelineError(
                        f"something made from {tell(arrival.name)}, before layers of another rank ran, has come into a "
                        "later layer otherwise than as an argument (in a closure or an attribute), so its gradient "
                        "would be lost: where ranks take turns (manual optimization, schedule='sequential'), give it "
                        "to that layer as an argument"
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


class _Grad:
    """A gradient as it is now."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.grad = parameter, parameter.grad  # held: another tensor cannot take its place in memory
        self.version = 0 if self.grad is None else version(self.grad)

    def is_another(self) -> bool:
        """Whether something has been added since."""
        now = self.parameter.grad
        return now is not self.grad or (now is not None and version(now) != self.version)
