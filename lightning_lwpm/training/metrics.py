"""torchmetrics objects in a step: updated by the last stage only, on real values, never synchronised over stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_lwpm.staging.step import StagedStep

__all__ = ["Metrics"]


class Metrics:
    """The metric objects of a module.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        found = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
        inner = {id(child) for m in found for child in m.modules() if child is not m}
        self.metrics = [m for m in found if id(m) not in inner]
        for metric in found:
            if isinstance(metric, Metric):
                metric.distributed_available_fn = _never  # all its state is on one rank

    def parts(self) -> list[nn.Module]:
        """The metrics and the modules within them."""
        return [part for metric in self.metrics for part in metric.modules()]

    @contextmanager
    def in_step(self, step: StagedStep | None) -> Iterator[None]:
        """While a step runs, metrics are no part of the model: not counted, not ghosted."""
        if step is None or not self.metrics:
            yield
            return
        saved = []
        for metric in self.metrics:
            for name in ("forward", "update"):
                saved.append((metric, name, metric.__dict__.get(name, _ABSENT)))
                metric.__dict__[name] = self._stand_in(getattr(metric, name), step)
        try:
            yield
        finally:
            for metric, name, value in saved:
                if value is _ABSENT:
                    del metric.__dict__[name]
                else:
                    metric.__dict__[name] = value

    @staticmethod
    def _stand_in(original: Callable[..., Any], step: StagedStep) -> Callable[..., Any]:
        if step.last:
            return lambda *args, **kwargs: step.aside(original, *args, **kwargs)

        def unread(*args: Any, **kwargs: Any) -> Any:
            step.keep((args, kwargs))  # the last stage reads it
            return step.aside(torch.tensor, 0.0)

        return unread


_ABSENT = object()


def _never() -> bool:
    return False
