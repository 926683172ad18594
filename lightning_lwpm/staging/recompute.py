"""Activations computed again in the backward pass instead of being kept.

::

    activation_checkpointing    kept of a micro-batch from F to B
    "none"                      x   h.0 [.....]   h.1 [.....]   h.2 [.....]     everything
    "layer"                     x   h.0           h.1           h.2             what goes into each layer
    "stage"                     x                                               what the stage has received

Numbers and side effects are those of a run that keeps everything: what is computed again draws the same random
numbers, finds modules as they were at its first run, and leaves them as they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_lwpm.errors import PipelineError
from lightning_lwpm.staging.contents import containers, content_of, fill
from lightning_lwpm.staging.forwards import replaced
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.randomness import python_random, python_state
from lightning_lwpm.staging.record import Record, version
from lightning_lwpm.staging.remote import Name, Remote
from lightning_lwpm.staging.tree import flatten, map_tensors
from lightning_lwpm.staging.versions import NOT_STATE

__all__ = ["MODES", "Recompute", "again", "layers_of"]

MODES = ("none", "layer", "stage")

_LEFT_ALONE = NOT_STATE | {"forward"}  # which whoever runs a step puts there for its time


class Recompute:
    """What a rank computes again.

    The last stage goes by layers in any case: what it logs and measures is no part of the model.

    Args:
        mode: One of ``MODES``.
        root: The model.
        units: The units; none where the whole model is one stage.
        last: The last stage.

    Attributes:
        stages: Whether stages other than the last one run their whole part of the step again.
    """

    def __init__(self, mode: str, root: nn.Module, units: Sequence[Unit] = (), last: int = 0) -> None:
        self.stages, self.modules = mode == "stage", list(root.modules())
        names = [unit.name for unit in units if not self.stages or last in unit.stages] if units else None
        self.layers = list(map(_Again, layers_of(root, names))) if mode != "none" else []

    def batch(self) -> AbstractContextManager[None]:
        """The time of a batch, in which calls of layers keep only what goes into them.

        Where the user's own checkpoint calls a layer again in a backward pass, it is called as it was the first time.
        """
        for stand_in in self.layers:
            stand_in.forward = stand_in.layer.forward
        return replaced({stand_in.layer: stand_in for stand_in in self.layers})

    def run(self, step: Callable[[Any], Any], peers: Any, last: bool) -> Any:
        """Run a stage's part of a step with a backward pass to come.

        Args:
            step: Runs it, asking the peers that it is given.
            peers: Answers for the earlier stages.
            last: Whether it is the last stage.
        """
        if self.stages and not last:
            return again(lambda: step(_Pristine(peers)), self.modules, to_its_end=True)
        return step(peers)


def layers_of(root: nn.Module, within: Iterable[str] | None = None) -> list[nn.Module]:
    """The layers that are worth computing again: blocks in lists, where there are such; single operations are not.

    Args:
        root: The model.
        within: The modules to look in; by default the whole model.
    """
    found: list[nn.Module] = []
    for name in [child for child, _ in root.named_children()] if within is None else within:
        module = root.get_submodule(name)
        parent = root.get_submodule(name.rpartition(".")[0])
        blocks = [module] if isinstance(parent, nn.ModuleList | nn.Sequential) else list(_blocks(module))
        found += [block for block in blocks or [module] if _composite(block)]
    return list(dict.fromkeys(found))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of lists in a module that are made of several layers."""
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _composite(child):
            yield child
        else:
            yield from _blocks(child)


def _composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


class _Again:
    """Stands in for a layer's ``forward``: always the same object, or a compiler would begin anew each time."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.forward = layer, layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler sees to side effects itself
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return again(self.forward, list(self.layer.modules()), args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.forward


def again(
    function: Callable[..., Any],
    modules: Sequence[nn.Module],
    args: Any = (),
    kwargs: Any = None,
    to_its_end: bool = False,
) -> Any:
    """Call a function, and again in the backward pass, as if it were called once.

    Args:
        function: Called with ``args`` and ``kwargs``.
        modules: What it may change: their buffers, attributes, and what lists, dicts and objects among these hold.
        args: Kept for the second call.
        kwargs: The same.
        to_its_end: Whether the second call may not be left by an exception once all is there.

    Raises:
        PipelineError: in the backward pass, if what the function was called with has been changed in place.
    """
    found = _State(modules)
    taken: list[Tensor] = []
    flatten((args, kwargs or {}), taken)
    versions = [version(tensor) for tensor in taken]
    kept = map_tensors(lambda tensor: tensor, (args, kwargs or {}))  # containers that the call may change
    calls = 0

    def call(_: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            out = function(*args, **(kwargs or {}))
            found.let_go()
            return out
        if versions != [version(tensor) for tensor in taken]:
            raise PipelineError(
                "a tensor that goes into a layer was changed in place, so the layer cannot be computed again: leave "
                'activation_checkpointing at "none", or write `x = x + y` in the place of `x += y`'
            )
        return function(*kept[0], **kept[1])

    where = torch.empty(0, device=_device(modules))  # tells whose random numbers and precision are to be put back
    with set_checkpoint_early_stop(not to_its_end):
        return checkpoint(call, where, use_reentrant=False, context_fn=lambda: (nullcontext(), _Each(found.back)))


def _device(modules: Sequence[nn.Module]) -> torch.device:
    parameters = (p for module in modules for p in module._parameters.values() if p is not None)
    return next((p.device for p in parameters), torch.device("cpu"))


@dataclass
class _Buffer:
    """A buffer as it was."""

    tensor: Tensor
    version: int
    copy: Tensor | None

    def again(self) -> Tensor:
        """One like it, which may be changed."""
        if self.copy is not None:
            return self.copy.clone()
        if version(self.tensor) != self.version:
            raise PipelineError(
                f"a buffer {tuple(self.tensor.shape)} of a layer was changed after a call that left it as it was, "
                'so the layer cannot be computed again: leave activation_checkpointing at "none"'
            )
        return self.tensor


class _State:
    """Modules as they are now, but for parameters, and the generators of Python and NumPy.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.buffers = [
            {k: _Buffer(b, version(b), b.detach().clone()) for k, b in module._buffers.items() if b is not None}
            for module in modules
        ]
        self.attributes = _Attributes(modules)
        self.random = python_state()

    def let_go(self) -> None:
        """Let go of the copies of what has not been changed since: most buffers are constants."""
        for buffers in self.buffers:
            if "running_mean" in buffers:  # torch changes running statistics without counting it as a change
                continue
            for buffer in buffers.values():
                if version(buffer.tensor) == buffer.version:
                    buffer.copy = None

    @contextmanager
    def back(self) -> Iterator[None]:
        """The modules as they were; afterwards they are as before."""
        now = _Attributes(self.modules)
        held = [dict(module._buffers) for module in self.modules]
        with python_random(self.random):
            try:
                for module, buffers in zip(self.modules, self.buffers, strict=True):
                    # by replacement: whatever holds the buffers themselves sees no change
                    module._buffers.update({key: buffer.again() for key, buffer in buffers.items()})
                self.attributes.put()
                yield
            finally:
                for module, before in zip(self.modules, held, strict=True):
                    module._buffers.update(before)
                now.put()


class _Each:
    """A context that is entered again and again, also within itself: a step may take gradients by itself.

    Args:
        make: Makes the context of one time.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self.make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(self.make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class _Attributes:
    """Attributes of modules as they are now, and what is in them.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.plain = [(m, {k: v for k, v in vars(m).items() if k not in _LEFT_ALONE}) for m in modules]
        found = containers(value for _, plain in self.plain for value in plain.values())
        self.inside = [(container, content_of(container)) for container in found.values()]

    def put(self) -> None:
        """Let them be so again."""
        for module, plain in self.plain:
            for key in [key for key in vars(module) if key not in _LEFT_ALONE and key not in plain]:
                del module.__dict__[key]
            module.__dict__.update(plain)
        for container, content in self.inside:
            fill(container, content)


class _Pristine:
    """Answers a staged step with copies of what was received, so that it can be run again from the same tensors.

    Args:
        peers: Answers with the tensors themselves.
    """

    def __init__(self, peers: Any) -> None:
        self.peers = peers
        self._given: dict[tuple[int, Name], Tensor] = {}

    def record(self, stage: int, key: Any) -> Record:
        """What the call ``key`` of an earlier stage returned."""
        return self.peers.record(stage, key)  # type: ignore[no-any-return]

    def value(self, remote: Remote) -> Tensor:
        """A copy of the data of a remote tensor, the same one each time."""
        key = (remote.stage, remote.label)
        if key not in self._given:
            tensor = self.peers.value(remote)
            with torch.enable_grad():  # the first to ask may be code without gradients, and others may ask later
                # elements that share a place cannot be changed in place
                self._given[key] = tensor if 0 in tensor.stride() else tensor.clone()
        return self._given[key]
