"""The module's ``example_input_array``: run for graphs while the model is whole, hidden while it is partitioned.

Summaries and loggers of graphs run the model on it outside any step, which a partitioned model cannot do.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lwpm.staging.lazy import is_lazy
from lightning_lwpm.training.private import said_to_be_on

__all__ = ["Example", "log_graphs"]


def log_graphs(trainer: Trainer, module: LightningModule) -> None:
    """Let loggers log the graph of the whole model (``TensorBoardLogger(log_graph=True)``); to be called on rank 0.

    Args:
        trainer: Has the loggers.
        module: The model, not partitioned yet.
    """
    if any(map(is_lazy, module.parameters())):
        if module.example_input_array is not None:
            rank_zero_info("no graph of the model is logged: it is built in parts, which no rank holds together")
        return
    with said_to_be_on(module, torch.device("cpu")):
        for logger in trainer.loggers:
            logger.log_graph(module)


class Example:
    """Hides the example from what runs once the model is partitioned and before it is trained.

    Args:
        trainer: Has the loggers.
        module: The partitioned model.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.module, self._hidden = module, module.example_input_array
        self._loggers = [logger for logger in trainer.loggers if is_overridden("log_graph", logger, Logger)]
        module.example_input_array = None
        for logger in self._loggers:
            logger.__dict__["log_graph"] = _nothing  # it has been asked before, see `log_graphs`
        if self._hidden is not None:
            rank_zero_info("`example_input_array` is not run on a partitioned model: no sizes in summaries")

    def show(self) -> None:
        """Give it back."""
        if self._hidden is not None:
            self.module.example_input_array, self._hidden = self._hidden, None
        for logger in self._loggers:
            logger.__dict__.pop("log_graph", None)


def _nothing(*_: Any, **__: Any) -> None:
    """Logs no graph."""
