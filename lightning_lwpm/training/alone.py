"""Hooks that only rank 0 runs may use and change all weights: those of other ranks are fetched, and sent back.

    rank 0, in a hook                              every other rank, at the same hook
    -----------------                              ----------------------------------
    touches a weight that lives elsewhere  ------> sends it, or its gradient, if it is the first that holds it
    has changed weights of others          ------> takes the new values
    ends                                   ------> goes on

The others wait in the same hook, so no weight changes meanwhile. Where they do not wait, in evaluation, rank 0 may use
theirs, but to change one is an error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.functions import written
from lightning_lwpm.staging.placeholder import Placeholder, placeholders_read
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.staging.tree import map_tensors
from lightning_lwpm.training.collectives import data_axis
from lightning_lwpm.training.gradients import GRAD, lent
from lightning_lwpm.training.weights import Holders

__all__ = ["Alone"]


class Alone:
    """The weights in hooks that only rank 0 runs.

    Args:
        mailbox: The control connections.
        module: The partitioned model.
        holders: Gives who holds what now.

    Attributes:
        active: Whether rank 0 is in such a hook; never on other ranks.
        reached: Whether the last hook that was heard has used or changed a weight that another rank holds.
    """

    def __init__(self, mailbox: Mailbox, module: LightningModule, holders: Callable[[], Holders]) -> None:
        self.mailbox, self.module, self.holders = mailbox, module, holders
        self.active = self.reached = False
        self._messages = 0
        mailbox.handle("?alone weight", self._lend)

    @contextmanager
    def unheard(self, hook: str) -> Iterator[None]:
        """On rank 0, around a hook after a batch of evaluation in which no other rank listens.

        Args:
            hook: Its name.

        Raises:
            ConfigurationError: if it changes a weight that another rank holds.
        """
        with self._reaching(self._borrow) as reaching:
            yield
        for name, _ in self._changes(reaching):
            raise ConfigurationError(
                f"`{hook}` changes '{name}', which other ranks hold. It did no such thing after the first batch of "
                "this pass, so they do not wait for it. Let it do the same after each batch, or do it in "
                f"`{hook.replace('batch', 'epoch')}`."
            )

    @contextmanager
    def heard(self) -> Iterator[None]:
        """On rank 0, around a hook in which all others :meth:`listen`; :meth:`end` has to follow."""
        some = any(parameter.grad is not None for parameter in self.module.parameters())
        lending = lent(self.module) if some else nullcontext(dict[str, Tensor]())
        with lending as gradients, self._reaching(self._fetch, gradients) as reaching:
            yield
        self.reached = bool(reaching.fetched)
        for name, values in self._changes(reaching):
            self.reached = True
            self._tell(("changed", name, values.detach()))

    @contextmanager
    def _reaching(
        self, fetch: Callable[[str, torch.device], Tensor], gradients: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator["_Reaching"]:
        self.active = True
        names = {id(tensor): name for name, tensor in [*named_tensors(self.module), *gradients.items()]}
        try:
            with data_axis(), _Reaching(names, fetch) as reaching, placeholders_read(reaching.values):
                yield reaching
        finally:
            self.active = False

    def _changes(self, reaching: "_Reaching") -> Iterator[tuple[str, Tensor]]:
        """What has been written and is held by other ranks too, with its new values."""
        holders = self.holders()
        for name, tensor in named_tensors(self.module):
            values = reaching.fetched.get(name, tensor)
            if any(rank for rank in holders(name)) and reaching.changed(name, values):
                yield name, values

    def end(self, message: Any) -> None:
        """Let the others go on.

        Args:
            message: What their :meth:`listen` returns.
        """
        self._tell(("end", "", message))

    def listen(self, what: str) -> Any:
        """On other ranks: give and take weights until the hook has ended on rank 0.

        Args:
            what: Says, for people, what is waited for.
        """
        named: dict[str, Tensor] = {}
        while True:
            self._messages += 1
            kind, name, value = self.mailbox.take("alone", self._messages, what, source=0)
            if kind == "end":
                return value
            named = named or dict(named_tensors(self.module))
            holders = self.holders()(name.removesuffix(GRAD))
            if kind == "weight" and self.mailbox.rank == min(holders):
                self.mailbox.post(0, "alone weight", name, _values(named, name))
            elif kind == "changed" and self.mailbox.rank in holders:
                named[name].data.copy_(value)  # through `data`: passes under way may have kept what was there

    def _tell(self, message: Any) -> None:
        self._messages += 1
        self.mailbox.post_all("alone", self._messages, message)

    def _borrow(self, name: str, device: torch.device) -> Tensor:
        """What does not change in evaluation, from a rank that goes on meanwhile."""
        owner = min(self.holders()(name))
        self.mailbox.post(owner, "?alone weight", name)
        what = f"the weights '{name}' from rank {owner}, for a hook"
        return to_device(self.mailbox.take("alone weight", name, what, source=owner), device)

    def _lend(self, source: int, name: str, payload: Any) -> None:
        self.mailbox.post(source, "alone weight", name, _values(dict(named_tensors(self.module)), name))

    def _fetch(self, name: str, device: torch.device) -> Tensor:
        self._tell(("weight", name, None))
        owner = min(self.holders()(name.removesuffix(GRAD)))
        what = f"the weights '{name}' from rank {owner}, for a hook"
        return to_device(self.mailbox.take("alone weight", name, what, source=owner), device)


class _Reaching(TorchDispatchMode):
    """Puts values in the place of placeholders, and notes what is written.

    Args:
        names: Of parameters and buffers, by the ``id`` of each.
        fetch: Gives the values of one, from its name, on a device.

    Attributes:
        fetched: The values that have been fetched, by name.
    """

    def __init__(self, names: dict[int, str], fetch: Callable[[str, torch.device], Tensor]) -> None:
        super().__init__()
        self.names, self.fetch = names, fetch
        self.fetched: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real_args, real_kwargs = map_tensors(self.values, (args, kwargs or {}))
        out = func(*real_args, **real_kwargs)
        if not func._schema.is_mutable:
            return out
        changed = written(func, real_args, real_kwargs)
        self._written.update(_storage(tensor) for tensor in changed if not isinstance(tensor, Placeholder))
        return args[0] if args and isinstance(args[0], Placeholder) and isinstance(out, Tensor) else out

    def changed(self, name: str, values: Tensor) -> bool:
        """Whether a parameter or buffer has been written."""
        if isinstance(values, Placeholder):
            return False
        before = self._before.get(name)  # batch normalisation does not say that it writes
        return _storage(values) in self._written or (before is not None and not torch.equal(before, values))

    def values(self, tensor: Tensor) -> Tensor:
        """The values of a placeholder; any other tensor as it is."""
        name = self.names.get(id(tensor)) if isinstance(tensor, Placeholder) else None
        if name is None:
            return tensor
        if name not in self.fetched:
            self.fetched[name] = self.fetch(name, tensor.device)
            if not isinstance(tensor, torch.nn.Parameter) and not name.endswith(GRAD):
                self._before[name] = self.fetched[name].clone()
        return self.fetched[name]


def _values(named: Mapping[str, Tensor], name: str) -> Tensor:
    """Those of a parameter or buffer, or of a gradient: zeros where there is none."""
    if not name.endswith(GRAD):
        return named[name].detach()
    parameter = named[name.removesuffix(GRAD)]
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
