"""Lightning's launchers, which also tell every rank of an exception as soon as it leaves the loop of one.

Lightning tells the strategy only after all callbacks' ``on_exception``, which may take long, and in spawned processes
never.
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_lwpm.training.private import MultiProcessingLauncher, SubprocessScriptLauncher, TunerExit

__all__ = ["ProcessLauncher", "ScriptLauncher"]


class _Telling:
    """Runs a function of a trainer, and tells every rank of its exception."""

    def __init__(self, function: Callable[..., Any], trainer: Trainer | None) -> None:
        self.function, self.trainer = function, trainer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except TunerExit:
            raise  # a way to end, taken by all ranks
        except BaseException as error:
            if self.trainer is not None:
                self.trainer.strategy.tell(error)  # type: ignore[attr-defined]
            raise


class ScriptLauncher(SubprocessScriptLauncher):
    """Runs the script once more for each further rank, unless all are there already."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(_Telling(function, trainer), *args, trainer=trainer, **kwargs)


class ProcessLauncher(MultiProcessingLauncher):
    """Starts a process for each rank by ``multiprocessing``."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(_Telling(function, trainer), *args, trainer=trainer, **kwargs)
