"""Hooks that every rank runs use all gradients and weights, and the model.

Functions of gradients and weights: see :mod:`~lightning_lwpm.training.reading`. Calls of layers: see
:mod:`~lightning_lwpm.training.running`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.intercept import Interception
from lightning_lwpm.staging.layout import Unit
from lightning_lwpm.staging.placeholder import is_placeholder, placeholders_read
from lightning_lwpm.staging.placement import named_tensors
from lightning_lwpm.training.gradients import GRAD, lent
from lightning_lwpm.training.lockstep import Lockstep
from lightning_lwpm.training.private import taking_norms
from lightning_lwpm.training.reading import ASKED, Reading
from lightning_lwpm.training.running import Running
from lightning_lwpm.training.weights import Holders

__all__ = ["Together"]


class Together:
    """The gradients and weights in hooks that every rank runs.

    Args:
        mailbox: The control connections.
        module: The partitioned model.
        holders: Gives who holds what now.
        units: Gives the largest modules of which each lies in one stage now.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        module: LightningModule,
        holders: Callable[[], Holders],
        units: Callable[[], Sequence[Unit]],
    ) -> None:
        self.mailbox, self.module, self.holders, self.units = mailbox, module, holders, units
        self._reading: Reading | None = None
        self._turn = 0
        self._small: set[str] = set()
        self._held: dict[str, Tensor] = {}
        mailbox.handle(ASKED, self._give)

    @contextmanager
    def hook(self, what: str) -> Iterator[None]:
        """Around a hook; the same on all ranks.

        Args:
            what: Names it, for people.

        Raises:
            ConfigurationError: if some things are read on one rank only and their values are there no more.
        """
        self._turn += 1
        named = list(self.module.named_parameters())
        own = {name + GRAD: p.grad for name, p in named if p.grad is not None}
        self._held = {**dict(named_tensors(self.module)), **own}
        lacking = [name for name, p in named if p.grad is None and not is_placeholder(p)]
        all_lacking = self.mailbox.gather(("together", self._turn), lacking, f"all ranks to come to {what}")
        with lent(self.module, set().union(*all_lacking)) as gradients:
            known = {**self._held, **gradients}
            lockstep = Lockstep(self.mailbox, self._turn, what)
            reading = Reading(lockstep, known, self.holders(), self._small)
            self._reading = reading
            calls = Interception([(unit, self.module.get_submodule(unit.name)) for unit in self.units()])
            calls.step = Running(reading, self.module, self.holders())
            try:
                with taking_norms(get_total_norm), reading, placeholders_read(reading.values), calls.batch():
                    yield
                lockstep.end()
            finally:
                self._reading, self._held = None, {}
                reading.close()

    @contextmanager
    def aside(self, changes: bool = False) -> Iterator[None]:
        """Around what the library itself does in a hook: it knows what other ranks hold.

        Args:
            changes: Whether it changes gradients or weights.
        """
        if self._reading is None:
            yield
            return
        if changes:
            self._reading.lockstep.begin_changes()
        with self._reading.aside():
            yield

    def _give(self, source: int, key: Any, name: str) -> None:
        """Answer a rank that is in the same hook, which this one has not left."""
        changed = self._reading is not None and self._reading.lockstep.changing
        self.mailbox.post(source, "values", key[0], None if changed else self._held[name].detach())
