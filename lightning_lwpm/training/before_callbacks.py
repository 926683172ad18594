"""The callback that comes before all others, where the ranks agree on what hooks after it find."""

import copy
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_lwpm.training.hooks import Hooks

__all__ = ["BeforeCallbacks"]


class BeforeCallbacks(Callback):
    """The first of all callbacks: those after it find the same metrics on every rank.

    Args:
        hooks: What it calls.
    """

    def __init__(self, hooks: "Hooks") -> None:
        self.hooks = hooks

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.draw_unread()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.limits.check()
        self.hooks.show_example()
        self.hooks.before_data()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.share_epoch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.settings.watch()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.settings.watch()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.share_epoch()

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.share_epoch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.copy(self)
