"""``train()`` and ``eval()`` of layers within steps of evaluation, of which other ranks see a part only.

::

    def validation_step(self, batch, index):      run by
        out = self(batch)                         all
        self.dropout.train()                      the last stage: the others have left the step
        outs = [self(batch) for _ in range(5)]    the last stage
        self.eval()                               the last stage

Ranks that leave begin with the next batch at once, in the modes in which they have begun with this one. So does the
last stage, if the step puts the modes back at its end. Where it does not, and layers are used as they were left, an
error says so; a step that sets its modes itself before it uses the layers needs nothing of what was left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_lwpm.errors import ConfigurationError

__all__ = ["Modes"]


class Modes:
    """The modes of a model's modules, from batch to batch of evaluation.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._named = list(root.named_modules())
        self._others: dict[str, tuple[nn.Module, bool]] = {}  # what a step has left otherwise than other ranks have it

    @contextmanager
    def step(self, last: bool) -> Iterator[None]:
        """The time of a stage's part of a step.

        Args:
            last: Whether it is that of the last stage, which runs the step to its end.

        Raises:
            ConfigurationError: if a mode that the step of another batch has left is looked at.
        """
        before = [module.training for _, module in self._named]
        self._others = {name: (m, mode) for name, (m, mode) in self._others.items() if m.training != mode}
        try:
            with _hidden(self._others):
                yield
        finally:
            for (name, module), mode in zip(self._named, before, strict=True):
                if module.training != mode:
                    if last:
                        self._others.setdefault(name, (module, mode))
                    else:
                        module.training = mode


@contextmanager
def _hidden(left: dict[str, tuple[nn.Module, bool]]) -> Iterator[None]:
    """Let modules have no mode until the step sets it."""
    if not left:
        yield
        return
    names = {id(module): name for name, (module, _) in left.items()}
    original = nn.Module.__getattr__

    def __getattr__(module: nn.Module, attribute: str) -> Any:
        if attribute != "training" or id(module) not in names:
            return original(module, attribute)
        where = names[id(module)]
        called, undo = ("eval", "train") if left[where][1] else ("train", "eval")
        raise ConfigurationError(
            f"{_tell(where)} is used in the mode in which the evaluation of an earlier batch has left it: `{called}()` "
            f"was called there, which other ranks may not have come to. Call `{undo}()` at the end of the step, or set "
            "modes at its beginning."
        )

    for module, _ in left.values():
        del module.__dict__["training"]
    nn.Module.__getattr__ = __getattr__  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for module, mode in left.values():
            module.__dict__.setdefault("training", not mode)


def _tell(name: str) -> str:
    return f"layer '{name}'" if name else "the model"
