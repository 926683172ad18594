"""Weights that one rank lends another in evaluation, where they do not change."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.pipeline.wire import to_device
from lightning_lwpm.staging.layout import Layout
from lightning_lwpm.staging.placeholder import is_placeholder
from lightning_lwpm.staging.placement import named_tensors

__all__ = ["Lending"]


class Lending:
    """Asks other ranks for weights, and answers them; a ``Lender``.

    Args:
        mailbox: The control connections.
        root: The model, with this rank's share of the weights.
        layout: The partition.
        device: This rank's device.
    """

    def __init__(self, mailbox: Mailbox, root: nn.Module, layout: Layout, device: torch.device) -> None:
        self.mailbox, self.root, self.layout, self.device = mailbox, root, layout, device
        self._held = {name: tensor for name, tensor in named_tensors(root) if not is_placeholder(tensor)}
        named = dict(root.named_parameters())
        self._stages = {id(named[name]): stages for name, stages in layout.parameters.items() if name in named}
        self._lent: dict[str, Tensor] = {}
        self._count = 0
        mailbox.handle("?lend", self._on_lend)

    def weights(self, unit: str, module: nn.Module) -> dict[str, Tensor]:
        """The parameters and buffers of a module that are not here, by their names in it.

        Args:
            unit: The module's name.
            module: The module.
        """
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if is_placeholder(parameter):
                found[name] = self.values(parameter)
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if is_placeholder(buffer):  # one of another stage of this very rank has no placeholder of its own
                found[name] = self._borrow(f"{unit}.{name}", buffer)
        return found

    def values(self, placeholder: Tensor) -> Tensor:
        """The values of a parameter or buffer that is not here."""
        name = next(name for name, tensor in named_tensors(self.root) if tensor is placeholder)
        values = self._borrow(name, placeholder)
        return values.requires_grad_() if placeholder.requires_grad and torch.is_grad_enabled() else values

    def stages(self, weight: Tensor) -> tuple[int, ...] | None:
        """The stages that hold a parameter; ``None`` if all do, or it is none."""
        return self._stages.get(id(weight))

    def end(self) -> None:
        """The step has ended: what was lent is let go of."""
        self._lent.clear()

    def _borrow(self, name: str, placeholder: Tensor) -> Tensor:
        if name not in self._lent:
            ranks = [self.layout.ranks[s] for s in self.layout.parameters.get(name) or self.layout.buffers[name]]
            if self.mailbox.rank in ranks:
                return self._held[name].detach()
            if not self._has_room(placeholder.numel() * placeholder.element_size()):
                self._lent.clear()
            self._count += 1
            self.mailbox.post(ranks[0], "?lend", self._count, name)
            what = f"the weights '{name}' from {self.mailbox.names[ranks[0]]}"
            values = self.mailbox.take("lent", self._count, what, ranks[0])
            self._lent[name] = to_device(values, placeholder.device)
        return self._lent[name]

    def _has_room(self, nbytes: int) -> bool:
        """Whether a device can hold that much more, and what a layer needs beside."""
        if self.device.type == "cpu":
            return True
        with suppress(AttributeError, RuntimeError):
            free, whole = torch.get_device_module(self.device).mem_get_info(self.device)
            return bool(free > nbytes + whole / 8)
        return True

    def _on_lend(self, source: int, key: Any, name: str) -> None:
        self.mailbox.post(source, "lent", key, self._held[name].detach())
