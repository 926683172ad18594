"""How a run goes on: what the user's code sets of it on rank 0, every rank gets; what it sets elsewhere only goes back.

::

    if trainer.is_global_zero:                       in a hook that every rank runs, or one that rank 0 runs alone,
        trainer.limit_val_batches = 2                or in a step after the last layer
    for group in self.optimizers().param_groups:
        group["lr"] *= 0.5

All ranks have the same values before, so only what has changed on rank 0 is told.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_lwpm.errors import ConfigurationError

__all__ = ["Course", "Limits", "Setting"]

Setting = tuple[str | int, ...]
"""Where a setting is; its name is the last item."""

_LOOPS = ("max_epochs", "min_epochs", "max_batches")
_STEPS = ("max_steps", "min_steps")
_TRAINER = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("val_check_batch", "val_check_interval", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
)


class Course:
    """What decides about batches to come on this rank: settings of the trainer, and options of optimizers.

    Args:
        trainer: Runs them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._before: dict[Setting, Any] = {}

    def watch(self) -> None:
        """Begin: what is set from now on is told by :meth:`changes`."""
        self._before = {setting: _copied(holder[setting[-1]]) for setting, holder in self._settings()}

    def changes(self) -> dict[Setting, Any]:
        """What has been set since :meth:`watch`."""
        before = self._before
        now = {setting: holder[setting[-1]] for setting, holder in self._settings() if setting in before}
        return {setting: _copied(value) for setting, value in now.items() if not _same(before[setting], value)}

    def back(self) -> None:
        """Undo what has been set since :meth:`watch`."""
        for setting, holder in self._settings():
            if setting in self._before and not _same(self._before[setting], holder[setting[-1]]):
                holder[setting[-1]] = self._before[setting]

    def follow(self, changes: Mapping[Setting, Any]) -> None:
        """Have what rank 0 has set since :meth:`watch`, and nothing that this rank has set by itself."""
        self.back()
        self.adopt(changes)

    def adopt(self, changes: Mapping[Setting, Any]) -> None:
        """Set what rank 0 has set."""
        for setting, holder in self._settings():
            if setting in changes:
                holder[setting[-1]] = changes[setting]

    def _settings(self) -> Iterator[tuple[Setting, dict[Any, Any]]]:
        """Each setting, and what holds it under its name."""
        trainer = self.trainer
        for place, owner, names in (
            ("trainer", trainer, _TRAINER),
            ("epochs", trainer.fit_loop, _LOOPS),
            ("steps", trainer.fit_loop.epoch_loop, _STEPS),
        ):
            yield from (((place, name), vars(owner)) for name in names if name in vars(owner))
        for i, optimizer in enumerate(trainer.optimizers):
            for j, group in enumerate(optimizer.param_groups):
                for name in group:
                    if name != "params":
                        yield ("optimizer", i, j, name), group


class Limits:
    """What the loaders of training were set up by: here that is done early, to look at the first batch.

    Args:
        trainer: Its loaders have just been set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self._before = trainer, self._now(trainer)

    def check(self) -> None:
        """Before the first training batch.

        Raises:
            ConfigurationError: if one device would have set them up by something else.
        """
        for name, now in self._now(self.trainer).items():
            if now != self._before[name]:
                raise ConfigurationError(
                    f"`trainer.{name}` was set to {now} in a hook that comes after the loaders have been set up, such "
                    "as `on_fit_start`. Set it in the hook `setup`, or before `trainer.fit`."
                )

    @staticmethod
    def _now(trainer: Trainer) -> dict[str, Any]:
        return {name: vars(trainer).get(name) for name in ("limit_train_batches", "val_check_interval")}


def _copied(value: Any) -> Any:
    """A learning rate may be a tensor, which is changed in place."""
    return value.clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))
