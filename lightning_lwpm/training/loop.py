"""What Lightning's loop is doing now, for the parts that must know: which stage, which loader, how much of it."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_lwpm.training.private import before_transfer, one_after_another, transfer

__all__ = ["Loop"]

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_STEPS = {
    RunningStage.TRAINING: "training_step",
    RunningStage.SANITY_CHECKING: "validation_step",
    RunningStage.VALIDATING: "validation_step",
    RunningStage.TESTING: "test_step",
    RunningStage.PREDICTING: "predict_step",
}


class Loop:
    """Lightning's loop, as the data sees it.

    Args:
        trainer: Runs it.
        module: The user's module.
        precision: Converts batches.
        device: Where batches go.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, precision: Precision, device: torch.device) -> None:
        self.trainer, self.module, self.precision, self.device = trainer, module, precision, device

    def evaluating(self) -> bool:
        """Whether this is anything but training."""
        return self.trainer.state.stage != RunningStage.TRAINING

    def pulls(self) -> bool:
        """Whether the present step takes its batches itself, from an argument ``dataloader_iter``."""
        name = _STEPS.get(self.trainer.state.stage)  # type: ignore[arg-type]
        return name is not None and is_param_in_hook_signature(
            getattr(self.module, name), "dataloader_iter", explicit=True
        )

    def hooks_transfer(self) -> bool:
        """Whether the user has a hand in how batches get to the device."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        places = [(self.module, LightningModule), (datamodule, LightningDataModule)]
        return self.pulls() or any(
            place is not None and is_overridden(name, place, kind) for place, kind in places for name in _TRANSFERS
        )

    def one_after_another(self) -> bool:
        """Whether the loaders of this evaluation are read one after another."""
        return one_after_another(self.trainer)

    def transfer(self, batch: Any, dataloader_idx: int = 0, device: torch.device | None = None) -> Any:
        """A batch as it comes from its loader, put on the device as a loop does it, the user's hooks included."""
        if self.pulls():
            return batch  # left to the step
        batch = before_transfer(self.module, self.precision.convert_input(batch), dataloader_idx)
        return transfer(self.module, batch, device or self.device, dataloader_idx)

    def index(self, loader: Any) -> int:
        """The place of a loader among those of this evaluation."""
        loaders, _ = self._evaluation()
        flat = CombinedLoader(loaders).flattened if loaders is not None else []
        return next((i for i, other in enumerate(flat) if other is loader), 0)

    def limit(self, index: int) -> float:
        """How many batches of an evaluation loader the loop will use."""
        _, limits = self._evaluation()
        return limits[index] if index < len(limits) else float("inf")

    def training_limit(self) -> float:
        """How many batches of an epoch the loop will use."""
        return self.trainer.num_training_batches

    def _evaluation(self) -> tuple[Any, list[float]]:
        trainer, stage = self.trainer, self.trainer.state.stage
        if stage == RunningStage.SANITY_CHECKING:
            return trainer.val_dataloaders, trainer.num_sanity_val_batches
        if stage == RunningStage.VALIDATING:
            return trainer.val_dataloaders, trainer.num_val_batches  # type: ignore[return-value]
        if stage == RunningStage.TESTING:
            return trainer.test_dataloaders, trainer.num_test_batches  # type: ignore[return-value]
        return trainer.predict_dataloaders, trainer.num_predict_batches  # type: ignore[return-value]
