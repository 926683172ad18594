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

        with correction.forward(crossed):    # around the forward pass of a micro-batch
        with correction.backward(crossed):   # around its backward pass
        correction.before_step(); optimizer.step(); correction.after_step()
        with correction.base():              # around validation and whatever saves weights

    where ``crossed`` is the number of the stage's steps between the two passes (``Delay.crossed``). What a correction
    does to weights it does in place, and under ``in_place.writable``. An engine that trains exactly for a while sets ``late``
    to False before the last step that is followed by a gradient that is not late, and back to True likewise. Formula: none. Memory: none.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
    """

    name = "none"

    copies: float = 0
    """Extra memory, in copies of the stage's weights, at a stage that is late."""

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], delay: Delay) -> None:
        self.optimizer = optimizer
        self.parameters = list(parameters)
        self.delay = delay
        self.late = True

    def forward(self, crossed: int) -> AbstractContextManager[None]:
        """Weights for a forward pass whose backward pass comes ``crossed`` steps later."""
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
