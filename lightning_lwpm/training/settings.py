"""What code that rank 0 alone runs has set, for the other ranks, on which it may decide about steps to come.

The end of a step, after the last layer, and hooks of the module run on rank 0. They may set plain attributes of modules
(see ``attributes``), which parameters are frozen, and how the run goes on (see ``course``).
"""

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer

from lightning_lwpm.training.attributes import Attributes, Change
from lightning_lwpm.training.course import Course, Setting

__all__ = ["News", "Settings"]


class News(NamedTuple):
    """What has changed on rank 0.

    Attributes:
        attributes: Plain attributes that have been set.
        trainable: Whether each parameter requires a gradient; ``None`` if that has not changed.
        course: Settings of the trainer and options of optimizers that have been set.
    """

    attributes: list[Change]
    trainable: list[bool] | None
    course: dict[Setting, Any]


class Settings:
    """What decides on steps to come.

    Args:
        module: The partitioned model.
        trainer: Its trainer.

    Attributes:
        attributes: The plain attributes of its modules.
        course: Settings of the trainer and options of optimizers.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module = module
        self.attributes = Attributes(module)
        self.course = Course(trainer)
        self._trainable = self._frozen()

    def watch(self) -> None:
        """On rank 0: what is set from now on is told by :meth:`news`."""
        self.attributes.watch()
        self.course.watch()
        self._trainable = self._frozen()

    def news(self) -> News:
        """On rank 0: what has been set since the last call of this or of :meth:`watch`."""
        changes, trainable = self.attributes.changes(), self._frozen()
        news = News(changes, trainable if trainable != self._trainable else None, self.course.changes())
        self.watch()
        return news

    def adopt(self, news: News) -> None:
        """Set the same here; on the other ranks."""
        self.attributes.adopt(news.attributes)
        if news.trainable is not None:
            for parameter, requires_grad in zip(self.module.parameters(), news.trainable, strict=True):
                parameter.requires_grad_(requires_grad)
        self.course.adopt(news.course)

    def _frozen(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.module.parameters()]
