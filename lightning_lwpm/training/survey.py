"""Plans without training: what a model would look like on several numbers of devices, found out on one."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_lwpm.errors import ConfigurationError
from lightning_lwpm.strategy import LWPMStrategy
from lightning_lwpm.training.planning import Planner
from lightning_lwpm.training.private import TunerExit
from lightning_lwpm.tuning.choose import Choice

__all__ = ["SurveyStrategy"]


class SurveyStrategy(LWPMStrategy):
    """Makes plans for several numbers of devices where training would begin, and ends the run there.

    Args:
        devices: Numbers of devices.
        options: As of :class:`~lightning_lwpm.LWPMStrategy`.

    Attributes:
        choices: For each number of devices what would be chosen, or why nothing can be.
    """

    def __init__(self, devices: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.wanted = list(devices)
        self.choices: dict[int, Choice | ConfigurationError] = {}

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._prepare(trainer)
        planner = Planner(self.mailbox, None, self.root_device, self.costs)
        assert self._feed is not None
        self.choices = planner.survey(trainer, self.lightning_module, self._feed, self._wish(), self.wanted)
        raise TunerExit
