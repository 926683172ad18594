"""A batch that the user's step skips by returning ``None``: Lightning does with it what it does on one device.

There its loop makes no backward pass and calls the optimizer as always; with several processes it refuses ``None``.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from typing_extensions import override

__all__ = ["SKIPPED", "accept_skipped", "refuse_skipped"]


class _Skipped:
    """What the strategy returns to Lightning for such a batch."""

    def __repr__(self) -> str:
        return "a batch that `training_step` has skipped"


SKIPPED = _Skipped()


class _Result(ClosureResult):
    """What the loop makes of what the strategy returns."""

    @override
    @classmethod
    def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> ClosureResult:
        output = None if training_step_output is SKIPPED else training_step_output
        return super().from_training_step_output(output, normalize)


def accept_skipped(trainer: Trainer) -> None:
    """Let a trainer's loop take :data:`SKIPPED` for what ``None`` is on one device."""
    trainer.fit_loop.epoch_loop.automatic_optimization.output_result_cls = _Result


def refuse_skipped(trainer: Trainer) -> None:
    """Undo :func:`accept_skipped`."""
    vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("output_result_cls", None)
