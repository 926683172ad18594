"""SIGTERM: whichever rank is told to end, all ranks end before the same batch.

Lightning asks rank 0 by a broadcast before each training batch, and tells the others by one in the signal's handler.
The former is a barrier in each batch, so that no stage could begin a batch before all have ended the one before; and a
handler that waits for other ranks may wait for ever. Here a handler only takes note. Ranks tell rank 0 when they next
come to the end of a batch, and rank 0 tells all of them with the batch's loss.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lwpm.pipeline.mailbox import Mailbox
from lightning_lwpm.training.private import end_on_sigterm, forget_sigterm, replace_sigterm

__all__ = ["Termination"]


class Termination:
    """What this rank knows of a wish to end.

    Args:
        trainer: Runs the loop.
        mailbox: Tells rank 0.

    Attributes:
        agreed: Whether all ranks end before the next batch; set on all of them at the end of a batch.
    """

    def __init__(self, trainer: Trainer, mailbox: Mailbox) -> None:
        self.trainer, self.mailbox = trainer, mailbox
        self.agreed = False
        self._asked = self._told = False
        if mailbox.rank == 0:
            mailbox.handle("?terminate", lambda *_: self._ask())

    def install(self) -> None:
        """Take the place of Lightning's way."""
        replace_sigterm(self.trainer, self._notice, self._check)

    def remove(self) -> None:
        """Give it back."""
        forget_sigterm(self.trainer)

    def batch_ended(self) -> bool:
        """To be called at the end of a batch; on rank 0, whether to tell all ranks to end."""
        if self.mailbox.rank and self._asked and not self._told:
            self._told = True
            self.mailbox.post(0, "?terminate", None)
        return self._asked

    def _ask(self) -> None:
        self._asked = True

    def _notice(self, signum: int, _: Any) -> None:
        launcher = self.trainer.strategy.launcher
        if not self._asked and launcher is not None:
            launcher.kill(signum)  # a scheduler may have told this process only
        self._asked = True

    def _check(self) -> None:
        if self.agreed:
            self.mailbox.gather("terminated", None, "all ranks to end, as SIGTERM has asked for")
            end_on_sigterm(self.trainer)
            raise SIGTERMException
