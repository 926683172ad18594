"""The user's step, run from its first line to its last on every rank, backward passes included.

::

    the step         z -> G -> D -> loss   backward, opt.step()   D(x)  G(z) -> D -> loss   backward, opt.step()
    segment               0    1                   |               2     3      4                   |
    run by rank           1    0                  both             0     1      0                  both

Each layer is run by the rank that holds its weights; on all others its call is ghosted. A segment is what one rank
runs between two changes of rank, with the code between its layers. What an earlier segment made is joined to this
one's part of the autograd graph, also where both are of the same rank: so a backward pass goes through each segment
once, latest first, as it does on one device.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.beside import Attributes, Objects
from lightning_lwpm.staging.functions import HOOKS, RANDOM, VALUES
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.others import Made, Others
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.record import Key, observe, version
from lightning_lwpm.staging.remote import Meta, Name, Remote, asked, is_metadata
from lightning_lwpm.staging.sites import Site
from lightning_lwpm.staging.step import StagedStep
from lightning_lwpm.staging.transforms import check_transforms
from lightning_lwpm.staging.tree import map_tensors, tensors
from lightning_lwpm.staging.ways import arrival_of, check_way

__all__ = ["WholeStep"]

_TAKEN_UP = Name("loss", -1, 0, 0)
"""Of what was made outside of the step."""


class WholeStep(StagedStep):
    """One run of the user's step on a batch, on every rank at the same time.

    Args:
        stage: What this rank runs; -1 for a rank that runs no layer.
        last: Whether it is the one that reports.
        interception: Brings it the calls of units.
        device: The device of remote tensors.
        derivations: See :class:`~lightning_lwpm.staging.layout.Layout`.

    Attributes:
        segment: The number of the present segment.
        homes: By ``id``, each weight, and buffer that is not everywhere, and the stages that hold it.
        made: By ``id``, the tensors that this rank has made.
        by_name: The same by name.
    """

    peers: Others  # type: ignore[assignment]  # set by whoever answers

    def __init__(
        self,
        stage: int,
        last: bool,
        interception: Interception,
        device: torch.device,
        derivations: Collection[tuple[Site, int]] = (),
    ) -> None:
        super().__init__(stage, last, interception, None, device, None, derivations)  # type: ignore[arg-type]
        self.segment = 0
        self.homes: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self.made: dict[int, Made] = {}
        self.by_name: dict[Name, Made] = {}
        self._touched: list[Remote] = []
        self._fetched: dict[Name, list[Tensor]] = defaultdict(list)
        self._labels: dict[int, Name] = {}  # by ``id``, of what was fetched

    @override
    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call(unit, module, partial(self._with_made, module, forward), args, kwargs)

    def _with_made(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a layer; weights that the step has made (``functional_call``) go into it as arguments do."""
        stores: list[dict[str, Any]] = [s for part in module.modules() for s in (part._parameters, part._buffers)]
        made = [(s, n, t) for s in stores for n, t in s.items() if t is not None and self._is_derived(t)]
        joined = [self._local(tensor) for _, _, tensor in made]
        for (store, name, _), tensor in zip(made, joined, strict=True):
            store[name] = tensor
        try:
            return forward(*args, **kwargs)
        finally:
            for (store, name, before), tensor in zip(made, joined, strict=True):
                if store[name] is tensor:
                    store[name] = before

    @override
    def run(self, step: Callable[[], Any]) -> Any:
        self.inside = False  # it may go on after its end
        return super().run(step)

    # -- segments ------------------------------------------------------------------------------------------------

    @override
    def _reach_stage(self, stage: int, unit: Unit) -> int:
        if stage != self.at:
            check_transforms(unit.name)
            self.turn(stage)
        return stage

    def turn(self, stage: int) -> None:
        """End the present segment, and begin one of a stage."""
        self.peers.turn(stage)
        self.segment += 1
        self.at, self.trace = stage, {}
        for remote in self._touched:  # what is joined belongs to one segment
            if remote.local is not None and remote.local.requires_grad:
                remote.local = None
        self._touched = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is part of the step: every rank acts on what it holds, such as its weights."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def resumed(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that is part of the step, though an optimizer calls it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.inside = self.inside, False
            try:
                return closure(*args, **kwargs)
            finally:
                self.inside = before

        return run

    def taken_up(self, made: Tensor, now: Tensor) -> Tensor:
        """What has become, outside of the step, of a tensor that it has made, as a part of the step.

        Args:
            made: The tensor, as this rank has it.
            now: The other; its graph is on the rank that has made the tensor.
        """
        if type(made) is Remote:
            meta = Meta.of(now)._replace(requires_grad=made.requires_grad)
            self.peers.know(_TAKEN_UP, now, meta)
            return Remote(meta, self.device, _TAKEN_UP, made.stage, self)
        if id(made) in self.made:
            segment = self.made[id(made)].segment  # its graph goes through that one's
            self.made[id(now)] = self.by_name[_TAKEN_UP] = Made(now, _TAKEN_UP, segment, version(now))
        return now

    # -- functions between layers --------------------------------------------------------------------------------

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        if is_metadata(func):
            return self._metadata(func, args, kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.backward:
            raise PipelineError(
                "`torch.autograd.backward` inside the step: call `self.manual_backward(loss)` instead, or "
                "`loss.backward()` with automatic optimization"
            )
        return self._function(func, types, args, kwargs)

    @override
    def _function(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        given = tensors((args, kwargs))
        homes = [self.homes[id(tensor)][1] for tensor in given if id(tensor) in self.homes]
        if not any(map(self._is_derived, given)):
            if homes and (func in HOOKS or _is_for_each(func)):
                return func(*args, **kwargs)  # each rank's affair with the weights that it holds
            if not homes and func not in RANDOM:
                return func(*args, **kwargs)  # alike on every rank
        if homes:
            self._go_home(func, homes)
        if func in VALUES:
            args, kwargs = map_tensors(self._value, (args, kwargs))
            return func(*args, **kwargs)
        if func in HOOKS and type(args[0]) is not Remote:
            return func(*args, **kwargs)
        if func in HOOKS:
            raise PipelineError(
                f"`{func.__name__}` on a tensor that another rank made: put it into the `forward` of the layer that "
                "makes the tensor"
            )
        self.index += 1
        key = (self.unit, self.occurrence, self.index)
        called = getattr(func, "__name__", "") or type(func).__name__
        if self.at == self.stage:
            args, kwargs, given = self._given(args, kwargs)
            return self._real(key, called, func, args, kwargs, given)
        replay = lambda: func(*map_tensors(self._local, args), **map_tensors(self._local, kwargs))  # noqa: E731
        return self._ghost(key, called, given, replay if func is not torch.autograd.grad else None)

    def _go_home(self, func: Any, homes: list[tuple[int, ...]]) -> None:
        """A function of weights is run by a rank that holds them."""
        if _is_for_each(func) and any(len(stages) > 1 for stages in homes):
            raise PipelineError(
                f"`{func.__name__}` between layers changes weights that several ranks hold: do it in "
                "`on_train_batch_end`, or share no weights between these layers"
            )
        if not all(self.at in stages for stages in homes):
            self.turn(next((s for s in homes[0] if all(s in stages for stages in homes)), homes[0][0]))

    def _value(self, tensor: Tensor) -> Tensor:
        """A tensor of which the values are looked at."""
        return self._local(self._function(Tensor.clone, (), (tensor,), {}) if id(tensor) in self.homes else tensor)

    @override
    def _beside(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> Attributes:
        return Objects(unit, module, (args, kwargs), self.made)

    def _is_derived(self, tensor: Tensor) -> bool:
        """Whether a tensor comes from layers or from torch's generator: then only one rank computes with it."""
        return type(tensor) is Remote or id(tensor) in self.made

    @override
    def _local(self, tensor: Tensor) -> Tensor:
        if type(tensor) is Remote:
            return tensor.materialise()
        made = self.made.get(id(tensor))
        if made is None or made.segment == self.segment or not tensor.requires_grad:
            return tensor
        with self.paused(), torch._C.DisableTorchFunction():
            return self.peers.joined(made)

    @override
    def _real(self, key: Key, called: str, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        foreign = next((t for t in given if is_placeholder(t) and key[2]), None)
        if foreign is not None:
            raise PipelineError(
                f"`{called}` between layers uses a parameter {tuple(foreign.shape)} that lives on another rank than "
                "others that it uses. Use it in the `forward` of a layer, or name layers in `partition=[...]` so that "
                "they are on one rank."
            )
        before = [version(tensor) for tensor in given]
        out = self._run(func, args, kwargs)
        record, results = observe(called, out, given, before)
        self.trace[key] = record
        plain = set()
        for i, _ in record.mutated:
            changed, made = given[i], self.made.get(id(given[i]))
            if made is not None and made.segment == self.segment:
                self._note(changed, Name(*key, -1 - i))
            elif isinstance(changed, nn.Parameter):
                continue
            elif made is not None or changed.requires_grad or id(changed) in self._labels:
                raise PipelineError(
                    f"`{called}` changes in place what was made before the last layer call of another rank, or gives a "
                    "gradient to a tensor made by hand: where ranks take turns (manual optimization, "
                    "schedule='sequential'), make a new tensor (`torch.cat`, `torch.where`, `x = x + y`)"
                )
            else:
                plain.add(id(changed))  # every rank does the same to its own
        for i, tensor in enumerate(results):
            if id(tensor) not in plain and not isinstance(tensor, nn.Parameter):
                self._note(tensor, Name(*key, i))
        return out

    @override
    def _check_way(self, args: Any, kwargs: Any) -> None:
        check_way(args, kwargs, self.stage, self.derivations, self._source, self._former)

    def _source(self, arrival: Any) -> Tensor | None:
        """What this rank has made in an earlier segment, and the present one has been given."""
        made = self.by_name.get(arrival.name)
        return made.tensor if made is not None else None

    def _former(self, value: Any) -> list[Any]:
        """What a tensor was in earlier segments."""
        arrival = arrival_of(value)
        made = self._source(arrival) if arrival is not None else None
        if made is not None:
            return [made]
        label = self._labels.get(id(value))
        return list(self._fetched[label]) if label is not None else [value]

    def _note(self, tensor: Tensor, name: Name) -> None:
        made = Made(tensor, name, self.segment, version(tensor))
        self.made[id(tensor)] = self.by_name[name] = made

    # -- values --------------------------------------------------------------------------------------------------

    @override
    def materialise(self, remote: Remote) -> Tensor:
        if self.closed:
            return super().materialise(remote)  # raises
        self._touched.append(remote)
        with self.paused(), torch._C.DisableTorchFunction():
            if remote.base is not None and remote.replay is not None:
                remote.base.materialise()
                value = remote.replay()
            else:
                value = self.peers.value(remote)
            value = asked(remote, value)
        self._fetched[remote.label].append(value)
        self._labels[id(value)] = remote.label
        return value

    @override
    def keep(self, value: Any) -> None:
        """Everything is kept until the step ends."""

    # -- backward ------------------------------------------------------------------------------------------------

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """``loss.backward()``, at the same place on every rank."""
        if create_graph or inputs is not None:
            raise PipelineError("`backward` with `create_graph` or `inputs` cannot go through several ranks")
        if is_placeholder(loss) or not self._is_derived(loss) or not loss.requires_grad:
            raise PipelineError(
                "`backward` (or `manual_backward`) was given a loss that does not depend on the output of any "
                "trainable layer (it does not require a gradient). Compute it from the model's output, outside "
                "`torch.no_grad()` and without `.detach()`."
            )
        if loss.numel() != 1 and gradient is None:
            raise PipelineError("`backward` of a loss of several elements: give it a mean or a sum")
        self.turn(self.at)
        with self.paused(), self.as_written.left():  # layers that are computed again run compiled, as they did
            self.peers.backward(loss, gradient, bool(retain_graph))


def _is_for_each(func: Any) -> bool:
    """Whether a function changes its first argument, by its name, or asks for what a weight has for itself."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in ("data", "grad")
    return name in ("__set__", "__setitem__") or name.startswith("__i") or (name[-1:] == "_" and name[-2:] != "__")
