"""torchmetrics objects in a step: updated by the last stage only, on real values, never synchronised over stages."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_lwpm.staging.step import StagedStep

__all__ = ["Metrics", "metrics_of", "never_synchronise"]


def metrics_of(module: nn.Module) -> list[nn.Module]:
    """The metric objects of a module, also those in plain lists, tuples and dicts; without those inside of others."""
    found: dict[nn.Module, None] = {}
    for owner in module.modules():
        held = [*vars(owner).values(), *owner.children()]
        for value in [v for attribute in held for v in _items(attribute)]:
            if isinstance(value, Metric | MetricCollection):
                found[value] = None
    inner = {child for metric in found for child in metric.modules() if child is not metric}
    return [metric for metric in found if metric not in inner]


def _items(value: Any) -> Iterable[Any]:
    if type(value) in (list, tuple):
        return value
    return value.values() if type(value) is dict else (value,)


class Metrics:
    """The metric objects of a module.

    Args:
        module: The LightningModule.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.metrics = module, metrics_of(module)

    def parts(self) -> list[nn.Module]:
        """The metrics and the modules within them."""
        return [part for metric in self.metrics for part in metric.modules()]

    @contextmanager
    def in_step(
        self, step: StagedStep | None, told: Callable[[Callable[[], Any]], Any] | None = None
    ) -> Iterator[None]:
        """While a step runs, metrics are no part of the model: not counted, not ghosted.

        Args:
            step: The step.
            told: Gives every rank what a function returns on the reporting one, where all run the step to its end.
        """
        if told is not None:  # all ranks run what is done with those made since, such as by `MetricTracker.increment`
            self.metrics = metrics_of(self.module)
        if step is None or not self.metrics:
            yield
            return
        saved = []
        for metric in self.metrics:
            for name in ("forward", "update", "compute") if told is not None else ("forward", "update"):
                saved.append((metric, name, metric.__dict__.get(name, _ABSENT)))
                stand_in = self._stand_in(getattr(metric, name), step)
                if told is not None and name != "update":
                    stand_in = _told(stand_in, step, told)
                metric.__dict__[name] = stand_in
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


def _told(stand_in: Callable[..., Any], step: StagedStep, told: Callable[[Callable[[], Any]], Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        # within another metric, or a layer, not all ranks come here
        return stand_in(*args, **kwargs) if step.inside else told(lambda: stand_in(*args, **kwargs))

    return run


_ABSENT = object()
_sync = Metric.sync
_pipelines: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()


def never_synchronise(group: dist.ProcessGroup) -> None:
    """Metrics do not synchronise while this process group is the default: all of their state is on one rank.

    This holds for every metric object, also those in lists and callbacks, those that are made later, and after the run.
    """
    _pipelines.add(group)
    Metric.sync = _sync_elsewhere  # type: ignore[method-assign]


@functools.wraps(_sync)
def _sync_elsewhere(self: Metric, dist_sync_fn: Any = None, process_group: Any = None, *args: Any, **more: Any) -> None:
    if process_group is not None or not dist.is_initialized() or dist.group.WORLD not in _pipelines:
        _sync(self, dist_sync_fn, process_group, *args, **more)
