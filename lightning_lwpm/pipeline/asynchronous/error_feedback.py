"""Error feedback on updates: weights run ahead of themselves by the share of a step that gradients are late."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import exchanged, writable

__all__ = ["ErrorFeedback"]


class ErrorFeedback(Correction):
    """Add to each update u what it differs by from the one before, rho (u - u_prev).

    The weights in use are then v = w + rho u: the base weights w are the plain sum of the optimizer's updates, and v is
    where they will be, if the next update is like the last, when gradients computed now arrive. So

        w' = Opt(w, gradient at v);   u = w' - w;   v' = w' + rho u,   rho = min(limit, mean delay) * strength

    The difference of consecutive updates is from Zmushko et al. (arXiv 2606.30634), whose delay is one step at every
    stage; rho is ours. The optimizer steps from w, not v: that matters to weight decay only, and w has the same bits
    whatever v was. Any optimizer. Memory: one copy (of w), none at stages that are not late.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        limit: The largest mean delay that is made up for, in steps: predictions get worse the farther they reach.
        strength: Factor of what is made up for.
    """

    name = "error_feedback"
    copies = 1

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        delay: Delay,
        limit: float = 1.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        self.rho = strength * min(limit, delay.mean)
        self._base: list[Tensor] = []

    @override
    def before_step(self) -> None:
        if not self._base:
            if self.rho and self.late:
                self._base = [parameter.detach().clone() for parameter in self.parameters]
            return
        with writable(self.parameters):
            for parameter, base in zip(self.parameters, self._base, strict=True):
                parameter.copy_(base)

    @override
    def after_step(self) -> None:
        if not self.late:
            self._base = []
        if not self._base:
            return
        with writable(self.parameters):
            for parameter, base in zip(self.parameters, self._base, strict=True):
                update = parameter - base
                base.copy_(parameter)
                parameter.add_(update, alpha=self.rho)

    @override
    def base(self) -> AbstractContextManager[None]:
        return exchanged(self.parameters, self._base) if self._base else nullcontext()

    @override
    def kept(self) -> list[Tensor]:
        return self._base

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ahead": [parameter.detach().clone() for parameter in self.parameters] if self._base else []}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._base = []
        if state["ahead"]:
            self._base = [parameter.detach().clone() for parameter in self.parameters]
            with writable(self.parameters):
                for parameter, ahead in zip(self.parameters, state["ahead"], strict=True):
                    parameter.copy_(ahead)
