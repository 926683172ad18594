"""Calls of layers in hooks that every rank runs: a layer runs where its weights are, or they come to its caller.

::

    a call, on every rank                 a rank with the weights     every other rank
    ---------------------                 -----------------------     ----------------
    of tensors and plain values           runs the layer, tells       takes what it returned
    of objects that it may change, too    tells its weights           runs it with these
    on rank 0 alone                       gives weights when asked    (rank 0) runs it with these

So every rank has all activations, and the code between layers runs as on one device.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.onward import with_weights
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.staging.record import version
from lightning_lwpm.staging.tree import duplicate, is_plain, map_tensors, tensors
from lightning_lwpm.training.reading import Reading
from lightning_lwpm.training.weights import Holders

__all__ = ["Running"]


class Running:
    """Decides, in a hook, what a call of a layer does; an ``Interceptor``.

    Args:
        reading: The functions in the same hook.
        module: The partitioned model.
        holders: Who holds what.
    """

    inside = False

    def __init__(self, reading: Reading, module: nn.Module, holders: Holders) -> None:
        self.reading = reading
        self._places = {id(tensor): frozenset(holders(name)) for name, tensor in named_tensors(module)}
        self.rank, self.world = reading.mailbox.rank, reading.mailbox.world

    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a layer."""
        places = {name: self._places[id(tensor)] for name, tensor in named_tensors(module)}
        if self.reading.idle or all(len(ranks) == self.world for ranks in places.values()):
            return forward(*args, **kwargs)
        args, kwargs = map_tensors(self.reading.whole, (args, kwargs))
        owners = frozenset.intersection(*places.values())
        told = None
        if owners and not unit.attributes and all(map(_unchangeable, (*args, *kwargs.values()))):
            told = self._told(unit, owners, module, forward, args, kwargs)
        out = told[0] if told is not None else self._with_weights(unit, places, module, forward, args, kwargs)
        return map_tensors(_at_an_end, out)

    def apply(self, cls: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of an ``autograd.Function`` between layers."""
        return run(*args, **kwargs)

    def _told(
        self,
        unit: Unit,
        owners: frozenset[int],
        module: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What an owner's call has returned, and changed of its arguments; ``None`` if no owner comes to it."""
        given = tensors((args, kwargs))

        def give() -> Any:
            before = [duplicate(t) if t.is_inference() else version(t) for t in given]
            drawn = self.reading.drawn.here()
            with self.reading.aside():
                out = forward(*args, **kwargs)
                changed = {i: t for i, t in enumerate(given) if _changed(t, before[i])}
                return out, changed, prints, self.reading.drawn.since(drawn)

        with self.reading.aside():
            prints = [_print(tensor) for tensor in given]
        told = self.reading.exchange(owners, ("call", unit.name), give)
        if told is None or self.rank in owners:
            return told
        out, changed, theirs, drawn = told
        if not all(map(_alike, prints, theirs)):
            raise ConfigurationError(
                f"{self.reading.lockstep.what} runs '{unit.name}' on rank {self.rank} with other numbers than on rank "
                f"{min(owners)}: something in it differs from rank to rank, such as the time, or random numbers that "
                "only one rank draws. Let it do the same on every rank, or run the model on rank 0 "
                "only, under `if trainer.is_global_zero`."
            )
        self.reading.drawn.adopt(drawn)
        for i, values in changed.items():
            given[i].copy_(values)
        device = next(tensor.device for _, tensor in named_tensors(module))
        return (map_tensors(lambda tensor: to_device(tensor, device), out),)

    def _with_weights(
        self,
        unit: Unit,
        places: dict[str, frozenset[int]],
        module: nn.Module,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What the call returns on this rank, with the weights of others."""
        come: dict[str, Tensor] = {}
        asked: dict[str, Tensor] = {}
        for name, tensor in named_tensors(module):
            if len(places[name]) < self.world:
                values = self.reading.exchange(places[name], ("weight", unit.name, name), tensor.detach)
                if values is None:
                    values = self.reading.values(tensor)
                    if not isinstance(tensor, nn.Parameter):
                        asked[name] = duplicate(values)
                if self.rank not in places[name]:
                    come[name] = to_device(values, tensor.device)
        with self.reading.aside():
            out = with_weights(module, forward, come)(*args, **kwargs)
        for name, before in asked.items():
            if not torch.equal(before, come[name]):
                raise ConfigurationError(
                    f"{self.reading.lockstep.what} runs '{unit.name}' on rank {self.rank} alone, which changes "
                    f"'{name}' of it (BatchNorm in training mode does): call `eval()` before, or run it on every "
                    "rank, not under `if trainer.is_global_zero`."
                )
        return out


def _unchangeable(value: Any) -> bool:
    """Whether a layer can change nothing of an argument but the numbers in tensors."""
    if isinstance(value, tuple):
        return all(map(_unchangeable, value))
    return isinstance(value, Tensor) or is_plain(value)


def _changed(tensor: Tensor, before: Tensor | int) -> bool:
    return not torch.equal(tensor, before) if isinstance(before, Tensor) else version(tensor) != before


def _print(tensor: Tensor) -> tuple[Any, ...]:
    """A few numbers of a tensor, to tell it from another one."""
    if not tensor.numel() or tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
        return (tuple(tensor.shape),)
    values = tensor.detach().flatten()
    some = values[:: max(1, len(values) // 32)].double()
    return tuple(tensor.shape), float(values.double().nansum()), some.tolist()


def _alike(here: tuple[Any, ...], there: tuple[Any, ...]) -> bool:
    """Whether these are of the same tensor, as near as two devices compute it."""
    if here[0] != there[0] or len(here) == 1:
        return here[0] == there[0]
    pairs = [(here[1], there[1]), *zip(here[2], there[2], strict=True)]
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) or (a != a and b != b) for a, b in pairs)


class _End(torch.autograd.Function):
    """What other ranks have computed has no graph here."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # type: ignore[override]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ConfigurationError(
            "a backward pass through the model in a hook: layers of other ranks have no graph here. Do it in a step, "
            "on `trainer.strategy.merged_module()`, or after the run."
        )


def _at_an_end(tensor: Tensor) -> Tensor:
    return _End.apply(tensor) if tensor.requires_grad and torch.is_grad_enabled() else tensor
