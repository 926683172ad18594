"""Autocast's casts, made before an operation instead of inside it: the same nodes of the graph, shared alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Casts"]


class Casts:
    """Casts as autocast makes them: a leaf is cast once as long as autocast remembers it, anything else each time.

    Two uses of a weight then add their gradients in the lower precision before these are cast back, as on any device
    under autocast. What autocast remembers cannot be asked; whether it has forgotten is seen in a leaf of our own.
    """

    def __init__(self) -> None:
        self._known: dict[nn.Parameter, Tensor] = {}
        self._node: Any = None
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, device: str) -> Callable[[Any], Any] | None:
        """What autocast does to the arguments of an operation now, or ``None`` where it does nothing.

        Args:
            device: The type of the device.
        """
        if not torch.is_autocast_enabled(device):
            return None
        if device not in self._leaves:
            self._leaves[device] = torch.empty(0, 1, device=device), nn.Parameter(torch.zeros(1, 1, device=device))
        rows, leaf = self._leaves[device]
        node = torch.mm(rows, leaf).grad_fn.next_functions[1][0]  # type: ignore[union-attr]
        if node is not self._node:
            self._node, self._known = node, {}
        dtype = torch.get_autocast_dtype(device)

        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if value.dtype in (torch.float64, dtype):
                return value
            if not (type(value) is nn.Parameter and value.requires_grad and value.dtype is torch.float32):
                return value.to(dtype)
            if value not in self._known:
                self._known[value] = value.to(dtype)
            return self._known[value]

        return cast

    def clear(self) -> None:
        """Let go of all."""
        self._node, self._known = None, {}
