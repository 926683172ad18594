"""What an engine calls while it trains without flushes; by itself, no correction at all."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lwpm.pipeline.asynchronous.delay import Delay

__all__ = ["Correction"]


class Correction:
    """No correction, and the base of those that do something.

    An engine calls, at one stage,

        with correction.forward(crossed, done):  # around the forward pass of a micro-batch
        with correction.backward(crossed):         # around its backward pass
        correction.before_step(); optimizer.step(); correction.after_step()
        with correction.base():                        # around validation and whatever saves weights

    where ``crossed`` is the number of the stage's steps between the two passes (``Delay.crossed``), and ``done`` that
    of backward passes since its last step. What a correction does to weights it does in place, and under
    ``in_place.writable``. Formula: none. Memory: none.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
    """

    name = "none"

    copies: float = 0
    """Memory that is kept between passes at a stage that is late, in copies of the stage's weights."""

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], delay: Delay) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.delay = delay
        self.late = True
        """Whether gradients are late after the next step: an engine says so where it trains exactly for a while."""

    def forward(self, crossed: int, done: int = 0) -> AbstractContextManager[None]:
        """Weights for a forward pass whose backward pass comes ``crossed`` steps later.

        Args:
            crossed: Steps of the stage in between.
            done: Backward passes of the stage since its last step, the gradients of which are summed already.
        """
        return nullcontext()

    def backward(self, crossed: int) -> AbstractContextManager[None]:
        """Weights for a backward pass whose forward pass came ``crossed`` steps earlier."""
        return nullcontext()

    def before_step(self) -> None:
        """To be called before the optimizer's step, when all gradients of the step are there."""

    def after_step(self) -> None:
        """To be called after the optimizer's step, before the learning rate's scheduler steps."""

    def base(self) -> AbstractContextManager[None]:
        """Weights that are to be evaluated and saved."""
        return nullcontext()

    def kept(self) -> list[Tensor]:
        """What the correction keeps between passes; its memory cost."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What continues the run, beside the base weights and the optimizer's state; to be taken outside ``base``."""
        return {"kept": [tensor.clone() for tensor in self.kept()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; the base weights and the optimizer's state are loaded already."""
