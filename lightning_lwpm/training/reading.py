"""Functions of gradients and weights in hooks that every rank runs: each rank computes what follows from its own.

::

    the hook, on every rank          the rank that holds p          every other rank
    -----------------------          ---------------------          ----------------
    half = p.grad / 2                half                           a placeholder: too large to be sent for nothing
    norm = half.norm()               norm, sent to the others       norm, taken from the holder
    self.log("norm", norm)           the same number                the same number

All ranks run the same code, so whoever waits for a number waits for one that the holder comes to, and nobody serves
requests. What is computed from values of several holders (``torch.cat`` of gradients) is computed everywhere. What one
rank alone reads (``if trainer.is_global_zero``) it asks for, once the holder waits or has ended the hook.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.functions import written
from lightning_lwpm.staging.placeholder import Placeholder, is_placeholder
from lightning_lwpm.staging.tree import map_tensors, tensors
from lightning_lwpm.training.drawn import Drawn
from lightning_lwpm.training.gradients import GRAD
from lightning_lwpm.training.lockstep import Lockstep
from lightning_lwpm.training.weights import Holders

__all__ = ["ASKED", "Listening", "Reading", "memory"]

_SENT = 256
"""Results of up to so many numbers are sent to the ranks that lack them: norms, means, histograms."""
ASKED = "?together"
_OF_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Listening(TorchDispatchMode):
    """A mode that can let functions pass for a while.

    Attributes:
        idle: Whether it does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.idle = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around code for which functions are left as they are."""
        before, self.idle = self.idle, True
        try:
            yield
        finally:
            self.idle = before


class Reading(Listening):
    """Computes what follows from tensors of one rank there, and lets the others know small results.

    What this rank wants of another that goes on another path, and what code wants as arrays, it asks for.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        known: Mapping[str, Tensor],
        holders: Holders,
        small: set[str],
        drawn: Drawn,
    ) -> None:
        super().__init__()
        self.drawn = drawn
        self.small = small  # forms of functions with small results: shapes take long to compute
        self.lockstep, self.mailbox, self.known = lockstep, lockstep.mailbox, known
        self._owners: dict[int, frozenset[int]] = {}  # by placeholder, or by memory
        self._alive: dict[int, list[Any]] = {}  # references to temporary ones
        self._origins: dict[int, tuple[Any, ...]] = {}  # of placeholders: a name, or a function and its arguments
        for name, tensor in known.items():
            if len(owners := frozenset(holders(name.removesuffix(GRAD)))) < self.mailbox.world:
                self._owners[memory(tensor)] = owners
                self._origins[id(tensor)] = (name,)
        self._lasting = frozenset(map(memory, known.values()))
        self._views: set[int] = set()  # placeholders that stand for views of those

    # -- what functions do ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.idle:
            return func(*args, **(kwargs or {}))
        if func._schema.name.startswith("aten::_foreach") and not func._schema.is_mutable:  # one by one
            lists = [isinstance(arg, list | tuple) and len(arg) == len(args[0]) for arg in args]
            out: list[Tensor] = []
            for i in range(len(args[0])):
                single = [[arg[i]] if listed else arg for arg, listed in zip(args, lists, strict=True)]
                out += self._run(func, single, kwargs or {})
            return out
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = {owners for tensor in tensors((args, kwargs)) if (owners := self.of(tensor))}
        if func._schema.is_mutable:
            return self._write(func, args, kwargs, found)
        if not found:
            return func(*args, **kwargs)
        if len(found) > 1:
            args, kwargs = map_tensors(self.whole, (args, kwargs))
            return func(*args, **kwargs)
        return self._read(func, args, kwargs)

    def _write(self, func: Any, args: Any, kwargs: Any, found: set[frozenset[int]]) -> Any:
        """A function that changes tensors: what is written into one that may be on every rank is sent."""
        targets = written(func, args, kwargs)
        if found:
            self.lockstep.begin_changes()
        self.lockstep.changes += sum(self._lasts(target) for target in targets)
        if found and any({self.of(target)} != found for target in targets) and len(targets) == 1:
            args, kwargs = map_tensors(lambda t: t if t is targets[0] else self.whole(t), (args, kwargs))
        return func(*args, **kwargs)

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of tensors that the same ranks hold."""
        owners, device = self._place(args, kwargs)
        key = ""
        small = any(tag in func.tags for tag in _OF_VALUES)
        out = None
        if self.mailbox.rank in owners:
            out = func(*args, **kwargs)
        elif not small and not (small := (key := _form(func, args, kwargs)) in self.small):
            on_meta = {"device": torch.device("meta")} if kwargs.get("device") is not None else {}
            shells, options = map_tensors(_shell, (args, kwargs))
            out = map_tensors(lambda shell: Placeholder(shell, device), func(*shells, **{**options, **on_meta}))
        view = any(result.alias_info is not None for result in func._schema.returns)
        if small or (not view and all(tensor.numel() <= _SENT for tensor in tensors(out))):
            if key:
                self.small.add(key)
            return self._share(func, args, kwargs, out)
        lasts = view and self._lasts(tensors((args, kwargs))[0])
        for index, tensor in enumerate(tensors(out)):
            self._note(tensor, owners, func, args, kwargs, index)
            if lasts and is_placeholder(tensor):
                self._views.add(id(tensor))
        return out

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor with values, on every rank."""
        return self._share(torch.ops.aten.clone.default, (tensor,), {}, tensor) if self.of(tensor) else tensor

    # -- between ranks -------------------------------------------------------------------------------------------

    def _share(self, func: Any, args: Any, kwargs: Any, value: Any) -> Any:
        """What a holder has computed, on every rank."""
        owners, device = self._place(args, kwargs)
        form = tuple(tensors((args, kwargs))[0].shape)
        data = self.exchange(owners, form, lambda: [tensor.detach() for tensor in tensors(value)] or value)
        if self.mailbox.rank in owners:
            return value
        if data is None:
            return func(*map_tensors(self.values, args), **map_tensors(self.values, kwargs))
        if not isinstance(data, list):
            return data
        found = [to_device(tensor, device) for tensor in data]
        # one rank may have called for a list of tensors what another calls for one
        listed = len(func._schema.returns) > 1 or func._schema.name.startswith("aten::_foreach")
        return found if listed else found[0]

    def exchange(self, owners: Collection[int], form: Any, give: Callable[[], Any]) -> Any:
        """What some ranks have, on every rank.

        Args:
            owners: These ranks.
            form: What is wanted: so that it is noticed where ranks want different things.
            give: Gives it, on these ranks.

        Returns:
            What ``give`` has given, or the first of these ranks has told; ``None`` if that one does no such thing.
        """
        rank, first = self.mailbox.rank, min(owners)
        if rank in owners:
            given = give()
            if rank == first:
                self.lockstep.tell((other for other in self.lockstep.others if other not in owners), (form, given))
            self.lockstep.advance()
            return given
        heard = self.lockstep.hear(first)
        if heard is None:
            return None
        self.lockstep.advance()
        number, (told, data) = heard
        if (number, told) != (self.lockstep.count, form):
            raise ConfigurationError(
                f"{self.lockstep.what} reads gradients or weights on rank {rank} in another order than on rank "
                f"{first}, which holds them: some under `if trainer.is_global_zero`, some not. Let it read the same on "
                "every rank, and do on one what is done with the numbers; or do it in `on_train_batch_end` of the "
                "module."
            )
        return data

    # -- values that are asked for -------------------------------------------------------------------------------

    def values(self, tensor: Tensor) -> Tensor:
        """The values of a placeholder, from a rank that holds them and has changed nothing yet."""
        if not is_placeholder(tensor):
            return tensor
        origin = self._origins.get(id(tensor), ())
        if len(origin) == 4:
            func, args, kwargs, index = origin
            return tensors(func(*map_tensors(self.values, args), **map_tensors(self.values, kwargs)))[index]
        values = None
        if origin and not self.lockstep.changing:
            owner = min(self.of(tensor))
            self.mailbox.post(owner, ASKED, (self.lockstep.turn, self.mailbox.rank), origin[0])
            values = self.mailbox.take("values", self.lockstep.turn, f"'{origin[0]}' from rank {owner}", owner)
        if values is None:
            raise ConfigurationError(
                f"{self.lockstep.what} changes gradients or weights, and reads them afterwards as arrays or lists "
                "(`.numpy()`, `.tolist()`), or on one rank only, such as under `if trainer.is_global_zero`. Let it "
                "read before it changes them, or compute with tensors, the same on every rank."
            )
        return to_device(values, tensor.device)

    # -- which tensors -------------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> frozenset[int]:
        """The ranks that hold it; none if all do."""
        return self._owners.get(memory(tensor), frozenset())

    def _lasts(self, tensor: Tensor) -> bool:
        """Whether it is a weight or gradient, or a view of one."""
        key = memory(tensor)
        return key in self._lasting or key in self._views

    def _place(self, args: Any, kwargs: Any) -> tuple[frozenset[int], torch.device]:
        """Who holds what a function is of, and the device of what it returns."""
        tensor = next(tensor for tensor in tensors((args, kwargs)) if self.of(tensor))
        return self.of(tensor), torch.device(kwargs.get("device") or tensor.device)

    def _note(self, tensor: Tensor, owners: frozenset[int], *origin: Any) -> None:
        key = memory(tensor)
        if key in self._lasting:
            return
        self._owners[key] = owners
        if is_placeholder(tensor):
            self._origins[key] = origin
        self._alive.setdefault(key, []).append(weakref.ref(tensor, lambda reference: self._forget(key, reference)))

    def _forget(self, key: int, reference: Any) -> None:
        """A temporary tensor is gone; others may take its place."""
        alive = self._alive.get(key, [])
        if reference in alive:
            alive.remove(reference)
        if not alive:
            self._alive.pop(key, None)
            self._owners.pop(key, None)
            self._origins.pop(key, None)
            self._views.discard(key)

    def close(self) -> None:
        """Let go of all tensors."""
        self._alive.clear()
        self.known = {}


def memory(tensor: Tensor) -> int:
    """What tells tensors with memory of their own apart; views of one are alike."""
    strided = tensor.layout is torch.strided and not is_placeholder(tensor)
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def _form(func: Any, args: Any, kwargs: Any) -> str:
    """What the shape of a function's result follows from."""
    return str((func, map_tensors(lambda tensor: (tensor.shape, tensor.dtype), (args, kwargs))))  # type: ignore[arg-type, return-value]


def _shell(tensor: Tensor) -> Tensor:
    return tensor.shell if isinstance(tensor, Placeholder) else tensor.to("meta")
