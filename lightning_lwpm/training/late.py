"""Hooks that come with each batch: the ranks meet in one only where it uses weights or the model.

::

    rank 0    hook .......... pl_module(x)   begins, and waits for all        runs it together with the others
    rank 1    hook .......... pl_module(x)   the same
    rank 2    hook ... has ended             hears that others have begun     joins them, and gives what they ask for

Most such hooks count, log and measure time. To prepare for what they might read takes as long as a small batch, so it
is left until one of them, on any rank, does so.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.staging.tree import tensors
from lightning_lwpm.training.reading import Listening, Reading, memory
from lightning_lwpm.training.running import Running

__all__ = ["Late"]

_USED = "together used"


class Late(Listening):
    """Begins to read together where a hook first needs it; an ``Interceptor``.

    Args:
        mailbox: The control connections.
        turn: Numbers the hooks, the same on all ranks.
        what: Names this one, for people.
        module: The partitioned model.
        begin: Begins; all ranks have to come.

    Attributes:
        said: What each of the others says at its end, by rank, where none has begun.
    """

    inside = False

    def __init__(
        self,
        mailbox: Mailbox,
        turn: int,
        what: str,
        module: nn.Module,
        begin: Callable[[], tuple[Reading, Running]],
    ) -> None:
        super().__init__()
        self.mailbox, self.turn, self.what, self.module = mailbox, turn, what, module
        self._begin, self._begun = begin, False
        self._together: tuple[Reading, Running] | None = None
        self.said: dict[int, Any] = {}
        self._weights: frozenset[int] | None = None  # where weights and gradients of this rank are

    def together(self) -> tuple[Reading, Running]:
        """Begin, if need be."""
        if self._together is None:
            if not self._begun:
                self._begun = True
                self.mailbox.post_all(_USED, (self.turn, self.mailbox.rank), (True, None))
            with self.aside():
                self._together = self._begin()
        return self._together

    def needed(self, last: Any = None) -> bool:
        """At the end of the hook: whether this rank or another one has begun; waits until all have, or have ended.

        Args:
            last: What this rank has to say at its end, where none has begun.
        """
        if not self._begun:
            self.mailbox.post_all(_USED, (self.turn, self.mailbox.rank), (False, last))
        others = [rank for rank in range(self.mailbox.world) if rank != self.mailbox.rank]
        told = [self.mailbox.take(_USED, (self.turn, rank), f"{self.what} on rank {rank}", rank) for rank in others]
        self.said = {rank: value for rank, (_, value) in zip(others, told, strict=True)}
        if not self._begun and any(begun for begun, _ in told):
            self._begun = True
            self.together()
        return self._begun

    def call(self, unit: Unit, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a layer."""
        if self.idle:
            return forward(*args, **kwargs)
        return self.together()[1].call(unit, module, forward, args, kwargs)

    def apply(self, cls: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of an ``autograd.Function`` between layers."""
        return run(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._together is None and (self.idle or not self._matters(func, args, kwargs or {})):
            return func(*args, **(kwargs or {}))
        return self.together()[0].__torch_dispatch__(func, types, args, kwargs)

    def _matters(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a function draws random numbers, or is one of weights, gradients or what this rank has not."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return True
        if self._weights is None:
            held = [tensor for _, tensor in named_tensors(self.module) if not is_placeholder(tensor)]
            held += [tensor.grad for tensor in held if tensor.is_leaf and tensor.grad is not None]
            self._weights = frozenset(map(memory, held))
        return any(is_placeholder(tensor) or memory(tensor) in self._weights for tensor in tensors((args, kwargs)))
