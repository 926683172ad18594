"""Anticipation: the step that a forward pass is ahead of is taken on trial, with the gradient so far."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.direction import check, foretold
from lightning_lwpm.pipeline.asynchronous.in_place import writable

__all__ = ["Anticipation"]


class Anticipation(Correction):
    """Forward passes use w + d u, where u is the next update as the state and the gradient so far foretell it.

    When a micro-batch of the next batch goes forward at stage k, some of this batch's have gone backward already: all
    but p-1-k of them for the first, all but one for the last. Their gradient is known, and only the rest is taken from
    momentum (``direction.foretold``): the later the stage, the less is guessed. d is the number of steps until the
    micro-batch's backward pass. SGD with momentum, Adam and AdamW. Memory: none is kept; one copy during a forward
    pass. Work: that of an optimizer's step for each forward pass that a step crosses.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        limit: The most steps that are predicted.
        strength: Factor of d.
    """

    name = "anticipation"

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        delay: Delay,
        limit: float = float("inf"),
        strength: float = 1.0,
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        check(optimizer, self.name)
        self.limit, self.strength = limit, strength

    @override
    @contextmanager
    def forward(self, crossed: int, done: int = 0) -> Iterator[None]:
        distance = self.strength * min(self.limit, crossed)
        if not distance:
            yield
            return
        now = [parameter.detach().clone() for parameter in self.parameters]
        own = {id(parameter) for parameter in self.parameters}
        with writable(self.parameters):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    state = self.optimizer.state.get(parameter)
                    if id(parameter) not in own or not state:
                        continue
                    share = done / self.delay.num_microbatches
                    update = foretold(state, group, group["lr"], parameter.grad, share)
                    if update is not None:
                        parameter.add_(update, alpha=distance)
        try:
            yield
        finally:
            with writable(self.parameters):
                for parameter, was in zip(self.parameters, now, strict=True):
                    parameter.copy_(was)
