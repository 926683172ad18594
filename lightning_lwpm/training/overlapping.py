"""The part of the strategy that asynchronous training needs, and exact training does not."""

from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.training.gradients import clip_by_norm, norm_over_stages
from lightning_lwpm.training.overlap import Overlap
from lightning_lwpm.training.private import (
    after_closure,
    after_unscaling,
    forget_after_closure,
    forget_after_unscaling,
    taking_norms,
)
from lightning_lwpm.training.processes import ProcessesStrategy

__all__ = ["OverlappingStrategy"]


class OverlappingStrategy(ProcessesStrategy, ABC):
    """Tells an :class:`Overlap`, while there is one, of steps, of evaluations and of the end."""

    _overlap: Overlap | None = None

    def _begin_overlap(self, overlap: Overlap, precision: Precision) -> None:
        self._overlap = overlap
        after_closure(precision, overlap.before_step)

    def _end_overlap(self) -> None:
        self._overlap = None
        forget_after_closure(self.precision_plugin)

    def _join_precision(self) -> None:
        """Let the precision plugin act on what all stages know: the norm of gradients, and whether any overflow."""
        precision = self.precision_plugin
        precision.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            after_unscaling(precision.scaler, self._skips, self._lowers)

    def _skips(self, overflow: bool) -> bool:
        if self._overlap is None:
            return self.reduce_boolean_decision(overflow, all=False)
        return self._overlap.skip(overflow)

    def _lowers(self, skipped: bool) -> bool:
        return skipped if self._overlap is None else self._overlap.lower()

    def _part_precision(self) -> None:
        """Undo :meth:`_join_precision`."""
        precision = self.precision_plugin
        precision.__dict__.pop("clip_grad_by_norm", None)
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            forget_after_unscaling(precision.scaler)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        step = super().optimizer_step
        with self._norms():
            if self._overlap is None:
                return step(optimizer, *args, **kwargs)
            return self._overlap.step(lambda: step(optimizer, *args, **kwargs))

    def _norms(self) -> AbstractContextManager[None]:
        """Where hooks run on every rank: the user's own clipping goes by the norm over all stages."""
        if self.world_size == 1 or self.lightning_module is None:
            return nullcontext()
        if self._overlap is not None:
            return taking_norms(_refused)
        return taking_norms(norm_over_stages(self.mailbox, self.next_turn, self.lightning_module.parameters))

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        parameters = self.precision_plugin.main_params(optimizer)
        if self._overlap is None:
            clip_by_norm(self.mailbox, self.next_turn(), parameters, float(clip_val))
        else:
            self._overlap.clip(parameters, float(clip_val))

    @override
    def on_validation_start(self) -> None:
        if self._overlap is not None:
            self._overlap.rest()

    @override
    def on_validation_end(self) -> None:
        if self._overlap is not None:
            self._overlap.go_on()

    @override
    def on_train_end(self) -> None:
        if self._overlap is not None:
            self._overlap.finish()

    @contextmanager
    def _resting(self, checkpoint: dict[str, Any]) -> Iterator[None]:
        """Weights as they are to be saved; what continues asynchronous training is put into the checkpoint."""
        if self._overlap is None:
            yield
            return
        if "optimizer_states" in checkpoint:  # else training does not go on from it
            with self.told("saving the state of corrections"):
                self._overlap.save(checkpoint, self.next_turn())
        with self._overlap.at_rest():
            yield

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._overlap is not None:
            self._overlap.load(checkpoint)


def _refused(*_: Any, **__: Any) -> Any:
    raise ConfigurationError(
        "`torch.nn.utils.clip_grad_norm_` was called with schedule='async', where stages are at different steps. Use "
        "the Trainer's `gradient_clip_val`, or `self.clip_gradients` in `configure_gradient_clipping`."
    )
