"""The part of the strategy that Lightning's loops call: batches, steps, backward passes, optimizer steps."""

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.training.collectives import data_axis
from lightning_lwpm.training.hooks import Hooks
from lightning_lwpm.training.planned import PlannedStrategy
from lightning_lwpm.training.reviewing import Reviewer
from lightning_lwpm.training.steps import Steps

__all__ = ["SteppingStrategy"]


class SteppingStrategy(PlannedStrategy, ABC):
    """Runs what the loops ask for through the pipeline, while a run is."""

    _hooks: Hooks | None = None
    _steps: Steps | None = None
    _reviewer: Reviewer | None = None

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if self.world_size == 1 or self._feed is None:
            return dataloader
        return self._feed.wrap(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self.world_size == 1 or self._feed is None:
            return super().batch_to_device(batch, device, dataloader_idx)
        return self._feed.give(
            batch, lambda raw: super(SteppingStrategy, self).batch_to_device(raw, device, dataloader_idx)
        )

    @property
    def steps(self) -> Steps:
        """Runs the user's steps; there while a run is."""
        assert self._steps is not None
        return self._steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._norms(), data_axis():
            out = self.steps.train(*args, **kwargs)
        if self._reviewer is not None:
            self._reviewer.batch_done()
        return out

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        if not self.lightning_module.automatic_optimization:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.steps.backward(closure_loss, optimizer, *args, **kwargs)
        with self._norms():
            closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    @property
    @override
    def alone(self) -> bool:
        if self._hooks is not None and self._hooks.alone.active:
            return True
        return self.global_rank == 0 and self._apart

    @property
    def _apart(self) -> bool:
        return self._steps is not None and self._steps.apart

    @override
    def next_turn(self) -> int:
        if self.alone or self._apart:
            raise ConfigurationError(
                "a step, or a hook that runs on rank 0 only (the module's `on_..._batch_end` and `on_..._epoch_end`), "
                "does something in which all ranks have to take part, such as `trainer.save_checkpoint(...)`. Do it in "
                "a callback, which runs on every rank; ask for `trainer.log_dir` after the last layer, or in `setup`."
            )
        if self._steps is not None:
            self._steps.meet()
        return super().next_turn()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        with self.steps.paused():
            return super().optimizer_step(optimizer, self.steps.resumed(closure), *args, **kwargs)

    @override
    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        assert self._hooks is not None
        with self.steps.paused(), self._hooks.together.aside(changes=True):
            super()._clip_by_norm(optimizer, clip_val)

    @override
    @data_axis()
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("validation_step", self.precision_plugin.val_step_context, *args, **kwargs)

    @override
    @data_axis()
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("test_step", self.precision_plugin.test_step_context, *args, **kwargs)

    @override
    @data_axis()
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.evaluate("predict_step", self.precision_plugin.predict_step_context, *args, **kwargs)

    @override
    @contextmanager
    def told(self, what: str) -> Iterator[None]:
        aside = self._hooks.together.aside() if self._hooks is not None else nullcontext()
        with aside, super().told(what):
            yield
