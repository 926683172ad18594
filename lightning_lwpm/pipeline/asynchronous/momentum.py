"""Momentum: weights run ahead by what the optimizer's own state foretells, without a copy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.direction import check, foretold
from lightning_lwpm.pipeline.asynchronous.in_place import writable

__all__ = ["Momentum"]


class Momentum(Correction):
    """Error feedback whose update is computed from the optimizer's state, rather than kept.

    The weights in use are v = w + rho u(state), u the update that momentum foretells (``direction.foretold``), rho as
    in ``ErrorFeedback``. Before the optimizer's step rho u is subtracted again: w is exact up to rounding, one unit in
    the last place of a weight a step, which suits float32 weights and not bfloat16 ones. SGD with momentum, Adam and
    AdamW. Memory: none; a copy while base weights are evaluated or saved.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        limit: The largest mean delay that is made up for, in steps.
        strength: Factor of what is made up for.
    """

    name = "momentum"

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        delay: Delay,
        limit: float = 1.0,
        strength: float = 1.0,
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        check(optimizer, self.name)
        self.rho = strength * min(limit, delay.mean)
        self._rates: list[float | Tensor] = []  # of each group, as they were at the last step
        self._ahead = 0.0  # updates that the weights are ahead

    @override
    def before_step(self) -> None:
        self._run(-self._ahead)

    @override
    def after_step(self) -> None:
        self._ahead = self.rho if self.late else 0.0
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        self._run(self._ahead)

    @override
    @contextmanager
    def base(self) -> Iterator[None]:
        # a copy, because what is subtracted and added again leaves other bits
        live = [parameter.detach().clone() for parameter in self.parameters] if self._ahead else []
        self._run(-self._ahead)
        try:
            yield
        finally:
            with writable(self.parameters):
                for parameter, was in zip(self.parameters, live, strict=bool(live)):
                    parameter.copy_(was)

    def _run(self, distance: float) -> None:
        """Move the weights by ``distance`` foretold updates."""
        if not (distance and self._rates):
            return
        own = {id(parameter) for parameter in self.parameters}
        with writable(self.parameters):
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                for parameter in group["params"]:
                    if id(parameter) not in own:
                        continue
                    update = foretold(self.optimizer.state.get(parameter, {}), group, rate)
                    if update is not None:
                        parameter.add_(update, alpha=distance)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rates": self._rates, "ahead": self._ahead}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rates, self._ahead = state["rates"], state["ahead"]
        self._run(self._ahead)
