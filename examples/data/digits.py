"""Handwritten digits, 8 x 8 grey pictures, as they ship with scikit-learn."""

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override


class DigitsDataModule(L.LightningDataModule):
    """Splits the 1,797 pictures once and for all, and scales them by the training set's mean and deviation.

    Args:
        batch_size: Pictures in a batch.
        val_size: Pictures to validate with.
        test_size: Pictures to test with.
        seed: Seed of the split and of the order of training.
    """

    unit = "samples"

    def __init__(self, batch_size: int = 64, val_size: int = 180, test_size: int = 360, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Pictures in a batch."""
        return len(batch[0])

    @override
    def setup(self, stage: str) -> None:
        hp = self.hparams
        pictures, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(pictures).float().view(-1, 1, 8, 8)
        y = torch.from_numpy(labels).long()

        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(hp.seed))
        test, val, train = order.split([hp.test_size, hp.val_size, len(x) - hp.test_size - hp.val_size])
        x = (x - x[train].mean()) / x[train].std()
        self.train, self.val, self.test = (TensorDataset(x[rows], y[rows]) for rows in (train, val, test))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.hparams.seed)
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True, generator=generator)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, self.hparams.batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test, self.hparams.batch_size)
