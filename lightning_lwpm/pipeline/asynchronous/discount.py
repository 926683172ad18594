"""Discount: a stage whose gradients are late takes smaller steps."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay

__all__ = ["Discount"]


class Discount(Correction):
    """Divide the learning rate by max(1, mean delay)^p, where p falls from 1 to 0 over the first ``steps`` steps.

    Formula: learning rate rescheduling, T1 of PipeMare (Yang et al., MLSys 2021, as AsyncPP has it), whose divisor is
    the delay itself; here a delay below one step makes no step larger. Any optimizer. Memory: none.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        steps: Steps after which the learning rate is the user's.
    """

    name = "discount"

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], delay: Delay, steps: float = 1000) -> None:
        super().__init__(optimizer, parameters, delay)
        self.steps = steps
        self.divisor = max(1.0, delay.mean)
        self._done = 0
        self._rates: list[float | Tensor] = []

    @override
    def before_step(self) -> None:
        if self.divisor == 1 or not self.late:
            return
        factor = self.divisor ** -max(0.0, 1 - self._done / self.steps)
        self._done += 1
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    @override
    def after_step(self) -> None:
        # the very objects: schedulers multiply what they find
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=bool(self._rates)):
            group["lr"] = rate

    @override
    def state_dict(self) -> dict[str, int]:
        return {"done": self._done}

    @override
    def load_state_dict(self, state: dict[str, int]) -> None:
        self._done = state["done"]
