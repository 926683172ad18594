"""``self.log`` inside a step: recorded where it happens for real, merged over micro-batches, replayed on every rank."""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lightning_lwpm.pipeline.hosted import hosted
from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.staging.remote import localise
from lightning_lwpm.staging.step import StagedStep

__all__ = ["Entry", "LogBook", "sendable"]

Entry = tuple[str, Any, dict[str, Any]]


class LogBook:
    """The log calls of one batch.

    Args:
        module: The LightningModule, whose ``log`` is replaced while a step runs.
        mailbox: Carries what was logged from rank 0, which holds the last stage, to the others.
    """

    def __init__(self, module: LightningModule, mailbox: Mailbox) -> None:
        self.module, self.mailbox = module, mailbox
        self.writes = mailbox.rank == 0
        self._entries: list[tuple[float, int, Entry]] = []
        self._weight, self._real = 1.0, True
        self._calls: Counter[str] = Counter()  # of each name in this micro-batch

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep log calls in the book instead of passing them on; on other ranks than the last stage's, drop them."""
        self._entries = []
        self.module.__dict__["log"] = self._note if self.writes else _drop
        try:
            yield
        finally:
            del self.module.__dict__["log"]

    @contextmanager
    def in_evaluation(self, step: StagedStep | None, real: bool) -> Iterator[None]:
        """In evaluation a batch is whole: log calls pass on where they are real, and are no part of the model."""
        if step is None and real:
            yield
            return
        log, before = self.module.log, self.module.__dict__.get("log")
        self.module.__dict__["log"] = functools.partial(step.aside, log) if real and step is not None else _drop
        try:
            yield
        finally:
            del self.module.__dict__["log"]
            if before is not None:
                self.module.__dict__["log"] = before

    def microbatch(self, samples: float, real: bool) -> None:
        """What is logged from now on comes from a micro-batch of so many samples, and counts if it is ``real``."""
        self._weight, self._real = samples, real
        self._calls.clear()

    @property
    def entries(self) -> list[Entry]:
        """All calls, in order."""
        return [entry for _, _, entry in self._entries]

    def merged(self) -> list[Entry]:
        """Each call once: reduced over micro-batches by its ``reduce_fx``, weighted by samples.

        A name that the step logs several times is left so: Lightning decides what becomes of it.
        """
        by_call: dict[tuple[str, int], list[tuple[float, Entry]]] = {}
        for weight, place, entry in self._entries:
            by_call.setdefault((entry[0], place), []).append((weight, entry))
        several = [call[1] for calls in by_call.values() if len(calls) > 1 for _, call in calls]
        several = [value for value in several if isinstance(value, Tensor)]
        here = dict(zip(map(id, several), hosted(several), strict=True))
        out = []
        for (name, _), calls in by_call.items():
            kwargs = dict(calls[-1][1][2])
            weights = [call[2].get("batch_size") or weight for weight, call in calls]
            if kwargs.get("batch_size") is not None:
                kwargs["batch_size"] = int(sum(weights))
            values = [here.get(id(call[1]), call[1]) for _, call in calls]
            out.append((name, _reduce(values, weights, kwargs.get("reduce_fx", "mean")), kwargs))
        return out

    def replay(self, entries: list[Entry]) -> None:
        """Log merged entries, as if each had been logged once."""
        for name, value, kwargs in entries:
            self.module.log(name, value, **kwargs)

    def _note(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not self._real:  # an earlier stage of the last one's rank
            return
        kwargs = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        if isinstance(value, Tensor):
            value = localise(value).detach().clone()
        self._entries.append((self._weight, self._calls[name], (name, value, kwargs)))
        self._calls[name] += 1


_POSITIONAL = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx")  # LightningModule.log's order after the value


def _drop(*_: Any, **__: Any) -> None:
    """A log call on a rank that does not hold the last stage."""


def _reduce(values: list[Any], weights: list[float], reduce_fx: Any) -> Any:
    if len(values) == 1 or isinstance(values[0], Metric):
        return values[-1]  # a metric object has seen every micro-batch itself
    kind = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    numbers = torch.stack([torch.as_tensor(value, dtype=None).float().cpu() for value in values])
    if kind in ("min", "amin"):
        return numbers.min()
    if kind in ("max", "amax"):
        return numbers.max()
    if kind == "sum":
        return numbers.sum()
    shares = torch.tensor(weights)
    return (numbers * shares).sum() / shares.sum()


def sendable(entries: list[Entry]) -> list[Entry]:
    """Entries for other ranks: for a metric object its value in this step; the end of the epoch puts it right.

    One that was only updated has none, and is not logged before then on one device either.
    """
    told = [(name, _value(value), {**options, "metric_attribute": None}) for name, value, options in entries]
    return [entry for entry in told if entry[1] is not None]


def _value(value: Any) -> Any:
    if not isinstance(value, Metric):
        return value
    step = value._forward_cache  # what Lightning itself logs for the step
    return step.detach() if isinstance(step, Tensor) and step.numel() == 1 else None
