"""What stands in for a hook of the user's while a run lasts."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningModule

__all__ = ["Replaced"]


class Replaced:
    """Stands in for a hook of a module or callback. A copy of that gets its own hook back."""

    __wrapped__: Any  # Lightning looks through it to see whether the user has overridden the hook

    def __init__(self, place: LightningModule | Callback, name: str, run: Callable[..., Any], original: Any) -> None:
        self.place, self.name, self.run, self.original = place, name, run, original
        self.own = name in vars(place)

    def undo(self) -> None:
        """Put the hook back."""
        attributes = vars(self.place)
        if attributes.get(self.name) is self:
            del attributes[self.name]
            attributes.update({self.name: self.original} if self.own else {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self.place))
        if owner is None or not isinstance(self.original, MethodType):
            return self.original
        return MethodType(self.original.__func__, owner)

    def __reduce__(self) -> Any:
        return getattr, (self.place, self.name)
