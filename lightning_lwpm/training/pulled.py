"""Steps that take their batches themselves: ``def training_step(self, dataloader_iter)``."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning_lwpm.errors import ConfigurationError

__all__ = ["Item", "LookedAt", "Pulled"]

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
                "the step takes more than one batch from `dataloader_iter`, and in a pipeline it can take one. Let the "
                "loader give larger batches, take `batch` in the place of `dataloader_iter`, or pass "
                "schedule='sequential': it takes as many as it likes then, and saves memory, not time."
            )
        self._left = 0
        return (self.batch, *self.place)


class LookedAt(Iterator[Item]):
    """The same while a step is looked at, which takes as many batches as it likes.

    Args:
        batch: The first one.
        read: Reads another one by its number; gives ``None`` where there is none.

    Attributes:
        taken: How many the step has taken.
    """

    def __init__(self, batch: Any, read: Callable[[int], Any]) -> None:
        self.batch, self.read, self.taken = batch, read, 0
        self.done = False

    def __next__(self) -> Item:
        batch = self.read(self.taken) if self.taken else self.batch
        if batch is None:
            raise StopIteration
        self.taken += 1
        return batch, self.taken - 1, 0
