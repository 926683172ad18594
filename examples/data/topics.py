"""Characters of the help texts that ship with Python: half a megabyte of English about one subject."""

from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override


class TopicsDataModule(L.LightningDataModule):
    """Cuts the text into windows, the first ones to train with, then those to validate, then those to test with.

    Args:
        vocab_size: Tokens. The text's most frequent characters have one each, all others share the last, so that the
            model's size does not change with the version of Python, whose texts differ a little.
        block_size: Characters in a window.
        batch_size: Windows in a batch.
        val_share: Share of the text to validate with.
        test_share: Share of the text to test with.
        seed: Seed of the order of training.
    """

    unit = "tokens"

    def __init__(
        self,
        vocab_size: int = 96,
        block_size: int = 64,
        batch_size: int = 32,
        val_share: float = 0.05,
        test_share: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def count(self, batch: tuple[Tensor, Tensor]) -> int:
        """Characters in a batch."""
        return batch[0].numel()

    @override
    def setup(self, stage: str) -> None:
        hp = self.hparams
        text = "\n".join(topics[name] for name in sorted(topics))
        # Sorted first, because characters that are equally frequent would otherwise come in order of appearance.
        frequent = Counter(sorted(text)).most_common(hp.vocab_size - 1)
        tokens = {character: token for token, (character, _) in enumerate(frequent)}
        data = torch.tensor([tokens.get(character, hp.vocab_size - 1) for character in text])

        val, test = int(len(data) * hp.val_share), int(len(data) * hp.test_share)
        parts = data.split([len(data) - val - test, val, test])
        self.train, self.val, self.test = (self._windows(part) for part in parts)

    def _windows(self, data: Tensor) -> TensorDataset:
        """Windows side by side; each character's target is the one after it."""
        size = self.hparams.block_size
        count = (len(data) - 1) // size
        inputs, targets = data[: count * size], data[1 : count * size + 1]
        return TensorDataset(inputs.view(count, size), targets.view(count, size))

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
