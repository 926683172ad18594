"""Steps that take their batches themselves: ``def training_step(self, dataloader_iter)``."""

from collections.abc import Iterator
from typing import Any

from lightning_lwpm.errors import ConfigurationError

__all__ = ["Pulled"]

Item = tuple[Any, int, int]
"""A batch, its number, and the number of its loader."""


class Pulled(Iterator[Item]):
    """What a step gets in the place of ``dataloader_iter``: one batch, or one micro-batch of it.

    Args:
        batch: The batch.
        place: Its number, and the number of its loader.
    """

    def __init__(self, batch: Any, place: tuple[int, int] = (0, 0)) -> None:
        self.batch, self.place = batch, place
        self._left = 1

    def __next__(self) -> Item:
        if not self._left:
            raise ConfigurationError(
                "the step takes more than one batch from `dataloader_iter`: with this strategy it can take one. Let "
                "the loader give larger batches, or take `batch` in the place of `dataloader_iter`."
            )
        self._left = 0
        return (self.batch, *self.place)
