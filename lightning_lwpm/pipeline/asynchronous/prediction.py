"""Prediction: a forward pass uses the weights that its backward pass will probably find."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import writable

__all__ = ["Prediction"]


class Prediction(Correction):
    """Forward passes use w + d u, where u is the last update and d the number of steps until the backward pass.

    d is that of the micro-batch: one that no step crosses uses w itself. Backward passes use the weights as they are
    then, which the prediction aimed at. Formula: linear weight prediction, weight form (Kosson et al., Pipelined
    Backpropagation at Scale, MLSys 2021), for the forward pass only (PipeOptim, arXiv 2312.00839). Any optimizer.
    Memory: one copy (of u), and one during a forward pass; none at stages that are not late.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        limit: The most steps that are predicted.
        strength: Factor of d.
    """

    name = "prediction"
    copies = 1

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        delay: Delay,
        limit: float = float("inf"),
        strength: float = 1.0,
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        self.limit, self.strength = limit, strength
        self._update: list[Tensor] = []

    @override
    @contextmanager
    def forward(self, crossed: int, done: int = 0) -> Iterator[None]:
        distance = self.strength * min(self.limit, crossed)
        if not (distance and self._update):
            yield
            return
        with writable(self.parameters):
            now = [parameter.detach().clone() for parameter in self.parameters]
            for parameter, update in zip(self.parameters, self._update, strict=True):
                parameter.add_(update, alpha=distance)
        try:
            yield
        finally:
            with writable(self.parameters):
                for parameter, was in zip(self.parameters, now, strict=True):
                    parameter.copy_(was)

    @override
    def before_step(self) -> None:
        if self.delay.ahead:
            # holds -w until after the step, so that one copy is enough
            self._update = [parameter.detach().neg() for parameter in self.parameters]

    @override
    def after_step(self) -> None:
        if not self._update:
            return
        for parameter, update in zip(self.parameters, self._update, strict=True):
            update.add_(parameter.detach())

    @override
    def kept(self) -> list[Tensor]:
        return self._update

    @override
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        self._update = [tensor.clone() for tensor in state["kept"]]
