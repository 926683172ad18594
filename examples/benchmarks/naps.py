"""Stages whose work is to sleep for a known time: what a step takes beyond that is the pipeline's own."""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lwpm.pipeline.action import Action, unit
from lightning_lwpm.pipeline.engine import Engine
from lightning_lwpm.staging.deferral import Deferral

__all__ = ["WIDTH", "Nap", "nap_in_parts", "seconds"]

WIDTH = 8


class Nap(nn.Module):
    """Sleeps in its forward pass, and in its backward pass.

    Args:
        forward_seconds: How long.
        backward_seconds: How long.
    """

    def __init__(self, forward_seconds: float, backward_seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.seconds = forward_seconds, backward_seconds

    def forward(self, x: Tensor) -> Tensor:
        """``x`` by the weight, later."""
        return _Sleep.apply(x * self.weight, *self.seconds)


class _Sleep(torch.autograd.Function):
    share = 1.0  # of a backward pass that is being done

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_seconds: float, backward_seconds: float) -> Tensor:
        ctx.seconds = backward_seconds
        time.sleep(forward_seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds * _Sleep.share)
        return gradients[0], None, None


def nap_in_parts(engine: Engine, span: float) -> None:
    """Let an engine sleep for half of a backward pass's time where it computes input gradients (I), and in W."""

    class Sleeping(Deferral):
        @contextmanager
        def inputs(self, key: Hashable) -> Iterator[None]:
            _Sleep.share = 0.5
            try:
                with super().inputs(key):
                    yield
            finally:
                _Sleep.share = 1.0

        def weights(self, key: Hashable) -> None:
            time.sleep(span)
            super().weights(key)

    assert engine.executor is not None
    engine.executor.deferral = Sleeping(engine.executor.deferral.between_layers)


def seconds(span: float, action: Action) -> float:
    """The time of an action if a forward pass takes ``span`` seconds; a whole backward pass takes twice that."""
    return span * unit(action)
