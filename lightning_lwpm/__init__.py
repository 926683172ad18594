"""Layer-wise model parallelism for PyTorch Lightning: unchanged model, exact result.

Importing it registers the strategy names, so that ``Trainer(strategy="lwpm", devices=4)`` works.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_lwpm.errors import ConfigurationError, LWPMError, PipelineError
from lightning_lwpm.strategy import LWPMStrategy
from lightning_lwpm.training.private import accept_compiled

__all__ = ["ConfigurationError", "LWPMError", "LWPMStrategy", "PipelineError"]

LWPMStrategy.register_strategies(StrategyRegistry)
accept_compiled(LWPMStrategy)
