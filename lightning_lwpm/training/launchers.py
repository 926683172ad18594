"""Lightning's launchers, which also tell every rank of an exception as soon as it leaves the loop of one.

Lightning tells the strategy only after all callbacks' ``on_exception``, which may take long, and in spawned processes
never.
"""

from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
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
        starts = not self.cluster_environment.creates_processes_externally
        if starts and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise ConfigurationError(
                "this is one job of a Hydra sweep (--multirun), and start_method='popen' would run the whole sweep "
                "again for each further rank. Add trainer.strategy.start_method=spawn, or use strategy='lwpm_spawn'."
            )
        return super().launch(_Telling(function, trainer), *args, trainer=trainer, **kwargs)


class ProcessLauncher(MultiProcessingLauncher):
    """Starts a process for each rank by ``multiprocessing``."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        return super().launch(_Telling(function, trainer), *args, trainer=trainer, **kwargs)
