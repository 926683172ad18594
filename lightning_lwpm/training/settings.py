"""What code that rank 0 alone runs has set, for the other ranks, on which it may decide about steps to come.

The end of a step, after the last layer, and hooks of the module run on rank 0. They may set

- plain attributes of modules: ``self.temperature *= 0.9``, ``self.loss_so_far = 0.9 * self.loss_so_far + float(loss)``;
- which parameters are frozen;
- options of optimizers: ``group["lr"] = ...``.

Rank 0 tells what has changed since it was last asked. Plain are numbers, text, small tensors, and small containers of
numbers and text; metric objects are left out, as only rank 0 uses them.
"""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lwpm.training.metrics import metrics_of

__all__ = ["News", "Settings"]

_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, dict, set)
_MOST = 64  # items of a container
_SMALL = 16 << 10  # bytes of a tensor
_LIGHTNINGS = frozenset(vars(LightningModule())) - {"training"}

Place = tuple[str, str]
"""The name of a module, and of its attribute."""


class News(NamedTuple):
    """What has changed on rank 0.

    Attributes:
        attributes: Plain attributes that have been set.
        trainable: Whether each parameter requires a gradient; ``None`` if that has not changed.
        options: Those of each group of each optimizer; ``None`` if they have not changed.
    """

    attributes: dict[Place, Any]
    trainable: list[bool] | None = None
    options: list[list[dict[str, Any]]] | None = None


class Settings:
    """What decides on steps to come.

    Args:
        module: The partitioned model.
        trainer: Has its optimizers.
        ahead: Whether other ranks may have begun steps that rank 0 has not: what those set is newer than its own.
    """

    def __init__(self, module: LightningModule, trainer: Trainer, ahead: bool) -> None:
        self.module, self.trainer, self.ahead = module, trainer, ahead
        apart = {part for metric in metrics_of(module) for part in metric.modules()}
        self._modules = {name: m for name, m in module.named_modules() if m not in apart}
        self._known = self._images(self._modules)
        self._trainable, self._options = self._frozen(), self._groups()

    def after_step(self) -> News:
        """What the end of a step has set; on rank 0. Of the LightningModule's own attributes only: they are few."""
        return News(self._changed({"": self.module}))

    def after_hook(self) -> News:
        """What a hook has set; on rank 0."""
        trainable, options = self._frozen(), self._groups()
        news = News(
            self._changed(self._modules),
            trainable if trainable != self._trainable else None,
            options if options != self._options else None,
        )
        self._trainable, self._options = trainable, options
        return news

    def adopt(self, news: News) -> None:
        """Set the same here; on the other ranks."""
        own = self._changed({"": self.module}) if self.ahead else {}
        for place, value in news.attributes.items():
            if place not in own:
                name, key = place
                vars(self._modules[name])[key] = value.to(self.module.device) if isinstance(value, Tensor) else value
        if news.trainable is not None:
            for parameter, requires_grad in zip(self.module.parameters(), news.trainable, strict=True):
                parameter.requires_grad_(requires_grad)
        if news.options is not None:
            for optimizer, groups in zip(self.trainer.optimizers, news.options, strict=True):
                for group, options in zip(optimizer.param_groups, groups, strict=False):
                    group.update(options)

    def _changed(self, modules: dict[str, nn.Module]) -> dict[Place, Any]:
        """The attributes that have changed since they were last looked at, with their values."""
        images = self._images(modules)
        changed = [place for place, image in images.items() if self._known.get(place, _image) != image]
        self._known.update(images)
        values = {place: vars(modules[place[0]])[place[1]] for place in changed}
        return {place: value.detach() if isinstance(value, Tensor) else value for place, value in values.items()}

    @staticmethod
    def _images(modules: dict[str, nn.Module]) -> dict[Place, Any]:
        found = {}
        for name, module in modules.items():
            for key, value in vars(module).items():
                kind = type(value)
                if (kind in _SCALARS or kind in _CONTAINERS or kind is Tensor) and key not in _LIGHTNINGS:
                    image = _image(value)
                    if image is not None:
                        found[name, key] = image
        return found

    def _frozen(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self.module.parameters()]

    def _groups(self) -> list[list[dict[str, Any]]]:
        return [
            [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            for optimizer in self.trainer.optimizers
        ]


def _image(value: Any) -> Any:
    """What tells whether an attribute has changed; ``None`` if it is not plain."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunction():
            small = value.layout is torch.strided and value.nbytes <= _SMALL
            return (_Held(value), 0 if value.is_inference() else value._version) if small else None
    if isinstance(value, _SCALARS):
        return type(value), value
    if len(value) > _MOST:
        return None
    items = [*value.items()] if isinstance(value, dict) else list(value)
    flat = [part for item in items for part in item] if isinstance(value, dict) else items
    return (type(value), items) if all(isinstance(part, _SCALARS) for part in flat) else None


class _Held:
    """Tells whether two tensors are one; an address may be used again, so that the tensor is kept."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]
