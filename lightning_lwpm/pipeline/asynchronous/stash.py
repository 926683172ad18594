"""Stash: a backward pass uses the weights of its forward pass, which are kept for it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.pipeline.asynchronous.correction import Correction
from lightning_lwpm.pipeline.asynchronous.delay import Delay
from lightning_lwpm.pipeline.asynchronous.in_place import exchanged

__all__ = ["Stash"]


class Stash(Correction):
    """The gradient is that of the loss at the weights of the forward pass, w' = Opt(w, gradient at w_then).

    For comparison: it removes the mismatch of activations and weights, not the delay. With as many micro-batches as
    there are stages less one, or more, it keeps one version, as PipeDream-2BW (Narayanan et al., arXiv 2006.09503);
    with fewer, as many as a gradient is late, as PipeDream (SOSP 2019). Any optimizer. Memory: ``delay.most`` copies,
    and one parameter more for a moment.
    """

    name = "stash"

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], delay: Delay) -> None:
        super().__init__(optimizer, parameters, delay)
        self.copies = delay.most
        self._versions: list[list[Tensor]] = []  # the newest first

    @override
    def backward(self, crossed: int) -> AbstractContextManager[None]:
        return exchanged(self.parameters, self._versions[crossed - 1]) if crossed else nullcontext()

    @override
    def before_step(self) -> None:
        if self.delay.most == 0:
            return
        now = [parameter.detach().clone() for parameter in self.parameters]
        self._versions = [now, *self._versions[: self.delay.most - 1]]

    @override
    def kept(self) -> list[Tensor]:
        return [tensor for version in self._versions for tensor in version]

    @override
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        # nothing is in flight where a run continues, so that no backward pass asks for an old version
        self._versions = []
