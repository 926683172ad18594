"""The user's step, run for one stage: ghost before, real inside, exit after.

    stage 1 of 3          layer 1    glue    layer 2     glue     layer 3
    ------------------    -------    -----   --------    -----    -------
    belongs to stage      0          0       1           1        2
    is                    ghosted    ghosted run         run      StageExit
    returns               Remote     Remote  a tensor    a tensor

Glue is the code between layer calls. What a ghosted call returns is looked up in the records that the stage which
ran it has published; so a ghost call is one look-up, and no layer is ever run on fake data.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.beside import Attributes
from lightning_lwpm.staging.compiled import AsWritten
from lightning_lwpm.staging.deferral import deferring
from lightning_lwpm.staging.functions import ASKING, BACKWARD, HOOKS, RANDOM, VALUES
from lightning_lwpm.staging.ghost import NoHandle, Peers, like
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layer_random import LayerRandom
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.placeholder import Placeholder
from lightning_lwpm.staging.reach import Reach
from lightning_lwpm.staging.record import Key, Trace, observe, version
from lightning_lwpm.staging.reentrant import not_reentrant
from lightning_lwpm.staging.remote import Remote, asked, is_metadata, localise
from lightning_lwpm.staging.sites import Site, step_runner
from lightning_lwpm.staging.transforms import check_transforms
from lightning_lwpm.staging.tree import flatten, map_tensors, tensors, unflatten
from lightning_lwpm.staging.ways import check_way

__all__ = ["StageExit", "StagedStep"]

_CHECKPOINT = CheckpointFunction.forward.__code__.co_filename


class StageExit(BaseException):
    """Leaves the user's step at the first layer call of a later stage. Not an ``Exception``: user code lets it pass."""


class StagedStep(TorchFunctionMode):
    """One run of the user's step on one micro-batch, for one stage.

    Args:
        stage: The stage that this rank executes.
        last: Whether it is the last one, which runs to the loss.
        interception: Brings it the calls of units, within a batch.
        peers: Answers for the earlier stages.
        device: The device of remote tensors.
        random: Draws random numbers for each layer, if that is wanted.
        derivations: See :class:`~lightning_lwpm.staging.layout.Layout`.

    Attributes:
        reach: What a later stage may ask for.
        trace: What each call of this stage returned.
    """

    def __init__(
        self,
        stage: int,
        last: bool,
        interception: Interception,
        peers: Peers,
        device: torch.device,
        random: LayerRandom | None = None,
        derivations: Collection[tuple[Site, int]] = (),
    ) -> None:
        super().__init__()
        self.stage, self.last, self.peers, self.device = stage, last, peers, device
        self.interception = interception
        self.random, self.derivations = random, derivations
        self.as_written = AsWritten()
        self.reach = Reach()
        self.trace: Trace = {}
        self.calls: dict[str, int] = {}
        self.unit, self.occurrence, self.index, self.at = "", 0, 0, 0
        self.inside = False
        self.closed = False

    # -- running -------------------------------------------------------------------------------------------------

    @step_runner
    def run(self, step: Callable[[], Any]) -> Any:
        """Run ``step``; returns what it returns, or ``None`` where it left at this stage's end."""
        interception = self.interception
        before, interception.step = interception.step, self
        try:
            with self.as_written, self:
                return step()
        except StageExit:
            return None
        finally:
            interception.step = before
            self.inside = True  # whatever runs from now on (recomputation in backward) is not the step

    # -- layers --------------------------------------------------------------------------------------------------

    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a unit's ``forward``, at the place where it belongs on the timeline."""
        occurrence = self.calls.get(unit.name, 0)
        self.calls[unit.name] = occurrence + 1
        # a module called more often than planned goes on in the stage of its last planned call
        stage = self._reach_stage(unit.stages[min(occurrence, len(unit.stages) - 1)], unit)
        self.unit, self.occurrence, self.index, self.at = unit.name, occurrence, 0, stage
        self.__exit__(None, None, None)  # inside a layer nothing is intercepted: it runs at full speed
        self.inside = True
        try:
            key = (unit.name, occurrence, 0)
            beside = self._beside(unit, module, args, kwargs)
            if stage != self.stage:
                if self.random is not None:
                    self.random.pass_over(module)
                out = self._ghost(key, "layer", tensors((args, kwargs)), None)
                if not beside:
                    return out
                out, values = out
                self._adopt(unit, beside, values)
                return out

            def run(*args: Any, **kwargs: Any) -> Any:
                with self.as_written.left():
                    out = forward(*args, **kwargs)
                return (out, beside.changed()) if beside else out

            args, kwargs, given = self._given(args, kwargs)
            out = self._real(key, "layer", run, args, kwargs, given)
            return out[0] if beside else out
        finally:
            self.inside = False
            self.__enter__()

    def _reach_stage(self, stage: int, unit: Unit) -> int:
        """A layer of a stage is called: the stage in which the step goes on, if it does here."""
        if stage < self.at:
            if self.calls[unit.name] > len(unit.stages):
                raise PipelineError(
                    f"layer '{unit.name}' of stage {stage} was called again after a layer of stage {self.at}, though "
                    "not in the step that was looked at before training, on the first batch. Where only some batches "
                    "run layers again (scheduled sampling), let the first one do so too (`if batch_idx == 0 or ...`): "
                    "the model is then partitioned for that. Or pass schedule='sequential', which takes any order, and "
                    "saves memory, not time."
                )
            raise PipelineError(
                f"layer '{unit.name}' of stage {stage} was called after a layer of stage {self.at}: the step called "
                "its layers in another order than when it was partitioned. Name the layers that begin a stage in "
                "`partition=[...]` so that those called in changing order share a stage, or pass "
                "schedule='sequential': it takes any order, and saves memory, not time."
            )
        if stage > self.stage:
            self._leave()
        if stage > self.at:
            check_transforms(unit.name)
        return stage

    def _adopt(self, unit: Unit, beside: Attributes, values: Any) -> None:
        """Take what a layer of another stage has changed beside returning something."""
        beside.adopt(values)

    def _leave(self) -> NoReturn:
        """Leave the user's step."""
        self.reach.prune()  # here, where all variables of the step are still there
        raise StageExit

    def _beside(self, unit: Unit, module: nn.Module, args: Any, kwargs: Any) -> Attributes:
        """What a call of a layer may change beside returning something."""
        return Attributes(unit, module)

    def _local(self, tensor: Tensor) -> Tensor:
        """A tensor as a call of this stage is given it."""
        return localise(tensor)

    def _given(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
        """Arguments as a call of this stage is given them, the very ones where all are here; and their tensors."""
        given: list[Tensor] = []
        spec = flatten((args, kwargs), given)
        local = [self._local(tensor) for tensor in given]
        if any(new is not old for new, old in zip(local, given, strict=True)):
            args, kwargs = unflatten(spec, iter(local))
        return args, kwargs, local

    # -- glue ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            return self._metadata(func, args, kwargs)
        if func is Tensor.detach and sys._getframe(1).f_code.co_filename == _CHECKPOINT:
            # a checkpoint that computes this step again, and saves what one of the user's calls is given: no code of it
            return args[0] if type(args[0]) is Remote else func(*args, **kwargs)
        if func in BACKWARD:
            raise PipelineError(
                f"`{getattr(func, '__name__', func)}` inside a step that is cut into stages: take gradients by "
                "`torch.autograd.grad(outputs, inputs)`, which returns them, or use `devices=1`"
            )
        return self._function(func, types, args, kwargs)

    @staticmethod
    def _metadata(func: Any, args: Any, kwargs: Any) -> Any:
        """A function that needs no data."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if func in ASKING and type(args[0]) is Remote and args[0].local is not None:
                args[0].local.requires_grad_(args[0].requires_grad)  # it has been fetched before
        return out

    def apply(self, cls: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A user's ``autograd.Function`` between layers: torch's modes do not see it, so it comes here."""
        if cls is CheckpointFunction:
            return not_reentrant(*args)
        self.__exit__(None, None, None)
        try:
            return self._function(run, {type(tensor) for tensor in tensors((args, kwargs))}, args, kwargs)
        finally:
            self.__enter__()

    def _function(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """One function call between layers."""
        if self.at == self.stage:
            if func in HOOKS and type(args[0]) is Remote:
                args = (args[0].materialise(), *args[1:])
            given: list[Tensor] = []
            if Remote in types or not self.last or func is torch.autograd.grad:
                args, kwargs, given = self._given(args, kwargs)
            if not given and not self.last and func not in RANDOM:
                return self._run(func, args, kwargs)
            if func in VALUES:
                self.keep((args, kwargs))
            self.index += 1
            return self._real((self.unit, self.occurrence, self.index), _called(func), func, args, kwargs, given)
        arguments: list[Tensor] = []
        flatten((args, kwargs), arguments)
        if not arguments and func not in RANDOM:
            # each rank calls it itself, so it is not counted: one that imports a module in the step may call some more
            return func(*args, **kwargs)
        self.index += 1
        key = (self.unit, self.occurrence, self.index)
        remote = False
        for tensor in arguments:
            kind = type(tensor)
            if kind is Remote or kind is Placeholder or isinstance(tensor, nn.Parameter | Placeholder):
                remote = True
                break
        if not remote and func not in RANDOM:
            return func(*args, **kwargs)
        if func in VALUES:
            args, kwargs = map_tensors(localise, (args, kwargs))
            return func(*args, **kwargs)
        if func in HOOKS:
            return NoHandle()
        replay = lambda: func(*map_tensors(localise, args), **map_tensors(localise, kwargs))  # noqa: E731
        # what a gradient shares memory with is made of a graph that is not here
        return self._ghost(key, _called(func), arguments, replay if func is not torch.autograd.grad else None)

    # -- real and ghost ------------------------------------------------------------------------------------------

    def _real(self, key: Key, called: str, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run a call of this stage and note what it returned and changed; ``given`` are the tensors it is given."""
        if self.last:
            return self._run(func, args, kwargs)
        versions = [version(tensor) for tensor in given]
        out = self._run(func, args, kwargs)
        record, made = observe(called, out, given, versions)
        self.trace[key] = record
        self.reach.note(key, record, given, made)
        return out

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call ``func`` as one thing: nothing inside it is intercepted."""
        if func is torch.autograd.grad:
            self._check_way(args, kwargs)
        inside, self.inside = self.inside, True
        try:
            return deferring(func)(*args, **kwargs)
        finally:
            self.inside = inside

    def _check_way(self, args: Any, kwargs: Any) -> None:
        """Make sure that a call of ``torch.autograd.grad`` finds its whole way here."""
        check_way(args, kwargs, self.stage, self.derivations)

    def _ghost(self, key: Key, called: str, arguments: list[Tensor], replay: Callable[[], Any] | None) -> Any:
        """Return the like of what an earlier stage's call returned."""
        record = self.peers.record(self.at, key)
        if record.function != called:
            after = f"after layer '{key[0]}'" if key[0] else "before the first layer"
            raise PipelineError(
                f"torch function {key[2]} {after} is `{called}` on stage {self.stage} but `{record.function}` on stage "
                f"{self.at}: the step took another path on different ranks. Code between layers must do the same on "
                "every rank; put what only one rank does (`if self.trainer.is_global_zero: ...`) after the last layer."
            )
        return like(record, key, self.at, arguments, replay, self.device, self)

    # -- values --------------------------------------------------------------------------------------------------

    def materialise(self, remote: Remote) -> Tensor:
        """Fetch a remote tensor, or make it again as a view of a fetched one."""
        if self.closed:
            raise PipelineError(
                f"a tensor of stage {remote.stage} ({remote!r}) is used after its micro-batch has ended: a step may "
                "not keep tensors of other stages for later steps; keep a value made in the step's own code instead, "
                "or pass schedule='sequential'"
            )
        entered = not self.inside
        if entered:
            self.inside = True
        try:
            with torch._C.DisableTorchFunction():
                if remote.base is not None and remote.replay is not None:
                    remote.base.materialise()
                    return asked(remote, remote.replay())
                return asked(remote, self.peers.value(remote))
        finally:
            if entered:
                self.inside = False

    def aside(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run something that is no part of the model (a metric, a log call): on real values, and not counted."""
        args, kwargs = map_tensors(localise, (args, kwargs))
        if self.inside or self.closed:
            return function(*args, **kwargs)
        self.__exit__(None, None, None)
        self.inside = True
        try:
            return function(*args, **kwargs)
        finally:
            self.inside = False
            self.__enter__()

    def keep(self, value: Any) -> None:
        """Keep the tensors in ``value``, though only a later stage looks at them (a metric, a log call)."""
        if self.at == self.stage and not self.last:
            self.reach.keep(tensors(value))

    def close(self) -> None:
        """The micro-batch is over: nothing can be fetched any more."""
        self.closed = True


def _called(func: Any) -> str:
    return getattr(func, "__name__", "") or type(func).__name__
