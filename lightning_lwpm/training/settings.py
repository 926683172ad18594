"""What code that rank 0 alone runs has set, for the other ranks, on which it may decide about steps to come.

The end of a step, after the last layer, and hooks of the module run on rank 0. They may set plain attributes of modules
(see ``attributes``), which parameters are frozen, and options of optimizers, such as ``group["lr"]``.
"""

from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_lwpm.training.attributes import Attributes, Change

__all__ = ["News", "Settings"]


class News(NamedTuple):
    """What has changed on rank 0.

    Attributes:
        attributes: Plain attributes that have been set.
        trainable: Whether each parameter requires a gradient; ``None`` if that has not changed.
        options: Those of each group of each optimizer; ``None`` if they have not changed.
    """

    attributes: list[Change]
    trainable: list[bool] | None
    options: list[list[dict[str, Any]]] | None


class Settings:
    """What decides on steps to come.

    Args:
        module: The partitioned model.
        trainer: Has its optimizers.

    Attributes:
        attributes: The plain attributes of its modules.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module, self.trainer = module, trainer
        self.attributes = Attributes(module)
        self._trainable, self._options = self._frozen(), self._groups()

    def watch(self) -> None:
        """On rank 0: what is set from now on is told by :meth:`news`."""
        self.attributes.watch()
        self._trainable, self._options = self._frozen(), self._groups()

    def news(self) -> News:
        """On rank 0: what has been set since the last call of this or of :meth:`watch`."""
        changes, trainable, options = self.attributes.changes(), self._frozen(), self._groups()
        news = News(
            changes,
            trainable if trainable != self._trainable else None,
            options if options != self._options else None,
        )
        self.watch()
        return news

    def adopt(self, news: News) -> None:
        """Set the same here; on the other ranks."""
        self.attributes.adopt(news.attributes)
        if news.trainable is not None:
            for parameter, requires_grad in zip(self.module.parameters(), news.trainable, strict=True):
                parameter.requires_grad_(requires_grad)
        if news.options is not None:
            for optimizer, groups in zip(self.trainer.optimizers, news.options, strict=True):
                for group, options in zip(optimizer.param_groups, groups, strict=False):
                    group.update(options)

    def _frozen(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.module.parameters()]

    def _groups(self) -> list[list[dict[str, Any]]]:
        return [
            [
                {name: _copied(value) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
            for optimizer in self.trainer.optimizers
        ]


def _copied(value: Any) -> Any:
    """A learning rate may be a tensor, which is changed in place."""
    return value.clone() if isinstance(value, Tensor) else value
