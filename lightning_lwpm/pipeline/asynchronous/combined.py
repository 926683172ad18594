"""Several corrections at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay

__all__ = ["Combined"]


class Combined(Correction):
    """Corrections inside one another, the first outermost; formulas, optimizers and memory are those of each.

    Args:
        optimizer: The stage's optimizer.
        parameters: The weights of the stage that the optimizer trains.
        delay: How late gradients come at this stage.
        kinds: What makes each of them, called with (optimizer, parameters, delay).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        delay: Delay,
        kinds: Sequence[Callable[..., Correction]],
    ) -> None:
        super().__init__(optimizer, parameters, delay)
        self.parts = [kind(optimizer, self.parameters, delay) for kind in kinds]
        self.name = "+".join(part.name for part in self.parts)
        self.copies = sum(part.copies for part in self.parts)

    @override
    @contextmanager
    def forward(self, crossed: int, done: int = 0) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.forward(crossed, done))
            yield

    @override
    @contextmanager
    def backward(self, crossed: int) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.backward(crossed))
            yield

    @override
    def before_step(self) -> None:
        for part in self.parts:
            part.late = self.late
            part.before_step()

    @override
    def after_step(self) -> None:
        for part in reversed(self.parts):
            part.after_step()

    @override
    @contextmanager
    def base(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.base())
            yield

    @override
    def kept(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.kept()]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
